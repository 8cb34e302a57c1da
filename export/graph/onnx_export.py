"""From a PyTorch module to one ONNX file that says what it is."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.export import Dim

from qsm_deploy.export.graph.dipole_lowering import DEFAULT, DipoleOp, lower_dipole
from qsm_deploy.export.graph.tracing import trace
from qsm_deploy.export.networks.network import Network
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.runtime.card.card import METADATA_KEY, ModelCard, TensorInfo

SMALLEST_CELL = 4  # sizes of 0, 1 and 2 make the tracer take a special case for the general one
TRAINING_ONLY = frozenset({"BatchNormalization", "Dropout", "RandomNormal", "RandomNormalLike"})


def onnx_from_module(module: Network, dipole_op: DipoleOp = DEFAULT) -> onnx.ModelProto:
    """Trace a network for any batch and any spatial size that its divisor divides.

    One that computes at the size of its tiles only is traced for that, and for one volume.

    Parameters
    ----------
    module
        In evaluation mode.
    dipole_op
        How its dipole operators are written, if it has any.

    Returns
    -------
    ModelProto
        Checked, weights inside, batch normalisation folded into the convolutions, without the
        exporter's notes on source files.

    Raises
    ------
    ExportError
        If the network cannot be traced, or the graph still holds training or noise.
    """
    name = type(module).__name__
    if module.training:
        raise ExportError(f"{name} is in training mode; call .eval() on it")
    divisor = module.divisor
    cell = divisor * math.ceil(SMALLEST_CELL / divisor)
    sizes = {"n": 2, "x": 2 * cell, "y": 3 * cell, "z": 4 * cell}
    axes: dict[int, Any] | None = {0: Dim("n")} | {
        2 + i: divisor * Dim(axis) if divisor > 1 else Dim(axis) for i, axis in enumerate("xyz")
    }
    if module.only_tiles and module.tiles is not None:
        sizes, axes = {"n": 1} | dict(zip("xyz", module.tiles.size, strict=True)), None
    model = trace(
        module,
        example_tensors(module.inputs, sizes),
        [axes if tensor.is_volume else None for tensor in module.inputs],
        [tensor.name for tensor in module.inputs],
        [tensor.name for tensor in (module.output, *module.further_outputs)],
    )
    model = lower_dipole(model, dipole_op)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"{name} cannot become ONNX: {reason}") from error
    if left := TRAINING_ONLY & {node.op_type for node in model.graph.node}:
        raise ExportError(
            f"{name}: the graph holds {', '.join(sorted(left))}; "
            "take training and noise out of the module"
        )
    return model


def example_tensors(inputs: Sequence[TensorInfo], sizes: Mapping[str, int]) -> list[Tensor]:
    """Return a tensor of ones for each input, its letters replaced by ``sizes``.

    One tensor for each: a tensor given twice would become one input used twice.
    """
    return [
        torch.ones([sizes[n] if isinstance(n, str) else n for n in tensor.shape])
        for tensor in inputs
    ]


def with_card(model: onnx.ModelProto, card: ModelCard) -> bytes:
    """Return the file's bytes with the card in its metadata."""
    onnx.helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    data: bytes = model.SerializeToString(deterministic=True)
    return data
