"""What ``qsm::DipoleConv`` means in standard operators, as functions inside an ONNX file.

The function of that name calls ``qsm::DipoleResponse`` for g(D), and that one of the functions
``qsm::dipole``, ``qsm::dipole_squared``, ``qsm::tkd`` and ``qsm::tikhonov``.
"""

import functools
from collections.abc import Sequence
from typing import get_args

import onnx
import onnx.parser
import torch
from torch import Tensor, nn
from torch.export import Dim

from qsm_deploy.export.dipole.matmul import dipole_conv_matmul
from qsm_deploy.export.dipole.multiplier import LAM, THRESHOLD, respond
from qsm_deploy.export.graph.dipole_node import DEFAULTS, DOMAIN, INPUTS, NODE, VERSION
from qsm_deploy.export.graph.tracing import trace
from qsm_deploy.kernels.cuda_library import MultiplierName

RESPONSE = "DipoleResponse"
FREE = {axis: Dim(f"s{axis}") for axis in range(5)}
EXAMPLE = (2, 3, 8, 12, 16)
# Chosen by comparing strings: functions that share a name and differ in the overload would be
# shorter, but TensorRT-RTX looks them up by the name alone and takes one for the other, where a
# string makes it refuse the file.
DISPATCH = f"""<domain: "{DOMAIN}", opset_import: ["": 20, "{DOMAIN}": {VERSION}]>
{RESPONSE} <multiplier: string = "dipole", threshold: float = {THRESHOLD}, lambda: float = {LAM}>
(d) => (g) {{
    name = Constant <value_string: string = @multiplier> ()
    squared = Constant <value_string = "dipole_squared"> ()
    tkd = Constant <value_string = "tkd"> ()
    tikhonov = Constant <value_string = "tikhonov"> ()
    is_squared = Equal (name, squared)
    is_tkd = Equal (name, tkd)
    is_tikhonov = Equal (name, tikhonov)
    g = If (is_squared) <
        then_branch = a () => (p) {{ p = {DOMAIN}.dipole_squared (d) }},
        else_branch = b () => (q) {{
            q = If (is_tkd) <
                then_branch = c () => (r) {{
                    r = {DOMAIN}.tkd <threshold: float = @threshold> (d)
                }},
                else_branch = e () => (s) {{
                    s = If (is_tikhonov) <
                        then_branch = f () => (t) {{
                            t = {DOMAIN}.tikhonov <lambda: float = @lambda> (d)
                        }},
                        else_branch = h () => (u) {{ u = {DOMAIN}.dipole (d) }}
                    >
                }}
            >
        }}
    >
}}"""


def dipole_functions() -> list[onnx.FunctionProto]:
    """Return the function of the operator and all that it calls."""
    dispatch = onnx.parser.parse_function(DISPATCH)
    responses = [_response(multiplier) for multiplier in get_args(MultiplierName)]
    return [_operator(), dispatch, *responses]


class _Operator(nn.Module):
    def forward(self, x: Tensor, voxel_size_mm: Tensor, b0_direction: Tensor) -> Tensor:
        return dipole_conv_matmul(x, voxel_size_mm, b0_direction, _response_node)


def _response_node(d: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{RESPONSE}", [d], dtype=d.dtype, shape=d.shape, version=VERSION
    )


class _Response(nn.Module):
    def __init__(self, multiplier: MultiplierName) -> None:
        super().__init__()
        self.multiplier = multiplier

    def forward(self, d: Tensor, parameter: Tensor) -> Tensor:
        return respond(d, self.multiplier, parameter)


@functools.cache
def _operator() -> onnx.FunctionProto:
    examples = (torch.ones(EXAMPLE), torch.ones(3), torch.ones(3))
    model = trace(_Operator().eval(), examples, (FREE, None, None), INPUTS, "y")
    for node in model.graph.node:
        if node.domain == DOMAIN:
            node.attribute.extend(map(_passed_on, DEFAULTS))
    return _function(NODE, model, INPUTS, DEFAULTS)


@functools.cache
def _response(multiplier: MultiplierName) -> onnx.FunctionProto:
    free = {axis: size for axis, size in FREE.items() if axis < 4}
    examples = (torch.ones(EXAMPLE[1:]), torch.tensor(0.5))
    model = trace(_Response(multiplier).eval(), examples, (free, None), ("d", "parameter"), "g")
    attributes = {"tkd": DEFAULTS[1:2], "tikhonov": DEFAULTS[2:]}.get(multiplier, ())
    for attribute in attributes:
        value = onnx.helper.make_node("Constant", [], ["parameter"])
        value.attribute.append(_passed_on(attribute, "value_float"))
        model.graph.node.insert(0, value)
    return _function(multiplier, model, ("d",), attributes)


def _passed_on(attribute: onnx.AttributeProto, name: str = "") -> onnx.AttributeProto:
    """Return a node's attribute that takes the value the function was called with."""
    return onnx.AttributeProto(
        name=name or attribute.name, type=attribute.type, ref_attr_name=attribute.name
    )


def _function(
    name: str,
    model: onnx.ModelProto,
    inputs: Sequence[str],
    attributes: Sequence[onnx.AttributeProto],
) -> onnx.FunctionProto:
    """Return a graph as a function, its initializers as constants."""
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    return onnx.helper.make_function(
        DOMAIN,
        name,
        list(inputs),
        [value.name for value in model.graph.output],
        [*constants, *model.graph.node],
        list(model.opset_import),
        attribute_protos=list(attributes),
    )
