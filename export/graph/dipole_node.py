"""``qsm::DipoleConv``, the dipole operator as a node of an ONNX graph."""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import FLOAT, values

from qsm_deploy.export.dipole import op as dipole_op  # noqa: F401  (registers qsm::dipole_conv)
from qsm_deploy.export.dipole.multiplier import LAM, THRESHOLD

DOMAIN = "qsm"
VERSION = 1
NODE = "DipoleConv"
INPUTS = ("x", "voxel_size_mm", "b0_direction")
DEFAULTS = (
    onnx.helper.make_attribute("multiplier", "dipole"),
    onnx.helper.make_attribute("threshold", THRESHOLD),
    onnx.helper.make_attribute("lambda", LAM),
)
SCHEMA = OpSchema(
    NODE,
    DOMAIN,
    VERSION,
    "F^-1 [E(k) F x] of (n, c, x, y, z) volumes, E(k) made from the geometry.",
    inputs=[OpSchema.FormalParameter(name, "tensor(float)") for name in INPUTS],
    outputs=[OpSchema.FormalParameter("y", "tensor(float)")],
    attributes=[OpSchema.Attribute(a.name, a) for a in DEFAULTS],
)
if not onnx.defs.has(NODE, DOMAIN):
    onnx.defs.register_schema(SCHEMA)
_node = values.Op(values.Opset(DOMAIN, VERSION), NODE, SCHEMA)


def _translate(
    x: FLOAT,
    voxel_size_mm: FLOAT,
    b0_direction: FLOAT,
    multiplier: str = "dipole",
    threshold: float = THRESHOLD,
    lam: float = LAM,
) -> FLOAT:
    attributes = {"multiplier": multiplier, "threshold": threshold, "lambda": lam}
    y: FLOAT = _node(x, voxel_size_mm, b0_direction, **attributes)
    return y


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.qsm.dipole_conv.default: _translate
}
