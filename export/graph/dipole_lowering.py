"""How a graph's dipole operators are written in its file, and which engines run it.

============ ================================= ============ ======== ============ ===============
file         ``qsm::DipoleConv`` is            ONNX Runtime OpenVINO TensorRT-RTX TensorRT
============ ================================= ============ ======== ============ ===============
``matmul``   matrix products                   yes          yes      builds       should build
``function`` a node, and a function for it     yes          no       no           no
``plugin``   a node                            no           no       no           needs the plugin
============ ================================= ============ ======== ============ ===============

A library of custom operators that is registered with ONNX Runtime replaces the function.
Seen with ONNX Runtime 1.31, OpenVINO 2026.4 and TensorRT-RTX 1.7; the column on TensorRT is from
its documentation and the source of its parser, which expands a function before it looks for a
plugin of that name and then stumbles over the text among the attributes.
"""

from typing import Literal, get_args

import onnx
import onnx.inliner
import onnx_ir
from onnx_ir.passes import Sequential, common

from qsm_deploy.export.graph.dipole_function import RESPONSE, dipole_functions
from qsm_deploy.export.graph.dipole_node import DOMAIN, NODE
from qsm_deploy.runtime.sessions.session import BACKENDS, Backend

DipoleOp = Literal["matmul", "function", "plugin"]
DEFAULT: DipoleOp = "matmul"  # the fastest in every engine, and the only one that all run
RUN_BY: dict[DipoleOp, tuple[Backend, ...]] = {
    op: tuple(name for name, row in BACKENDS.items() if op in row.dipole_ops)
    for op in get_args(DipoleOp)
}


def lower_dipole(model: onnx.ModelProto, dipole_op: DipoleOp) -> onnx.ModelProto:
    """Return a graph with its nodes ``qsm::DipoleConv`` written in one of the ways.

    Parameters
    ----------
    model
        As traced; not changed.
    dipole_op
        The way.
    """
    if dipole_op == "plugin" or not any(_is(node, NODE) for node in model.graph.node):
        return model
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.functions.extend(dipole_functions())
    return whole if dipole_op == "function" else inline_dipole(whole)


def inline_dipole(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a ``function`` graph as a ``matmul`` one, for engines that refuse functions."""
    outer = onnx.inliner.inline_selected_functions(model, [(DOMAIN, NODE)])
    for node in outer.graph.node:
        if _is(node, RESPONSE):
            given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            node.op_type = given["multiplier"].decode()
    inlined = onnx_ir.from_proto(onnx.inliner.inline_local_functions(outer))
    _read_sizes_off_inputs(inlined.graph)
    # every operator came with the matrices of its axes; they are kept once
    passes = Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    return onnx_ir.to_proto(passes(inlined).model)


def _read_sizes_off_inputs(graph: onnx_ir.Graph) -> None:
    """Take sizes from an input where a tensor has the same: equal nodes are recognised then."""
    for node in graph:
        if node.op_type == "Shape" and (sizes := _known_sizes(node, node.inputs[0])):
            same = (value for value in graph.inputs if _known_sizes(node, value) == sizes)
            node.replace_input_with(0, next(same, node.inputs[0]))


def _known_sizes(
    shape_node: onnx_ir.Node, value: onnx_ir.Value | None
) -> tuple[int | onnx_ir.SymbolicDim, ...]:
    """Return what a Shape node would give for a tensor, as far as that has numbers or names."""
    if value is None or value.shape is None:
        return ()
    first, end = (shape_node.attributes.get_int(name, None) for name in ("start", "end"))
    dimensions = value.shape[slice(first, end)]
    return () if any(d == onnx_ir.SymbolicDim(None) for d in dimensions) else dimensions


def _is(node: onnx.NodeProto, name: str) -> bool:
    return bool(node.domain == DOMAIN and node.op_type == name)
