"""From a PyTorch module to one ONNX file that says what it is."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from torch.export import Dim

from qsm_deploy.export.networks.network import Network
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.runtime.card import METADATA_KEY, ModelCard

OUTPUT = "chi_ppm"
TRAINING_ONLY = frozenset({"BatchNormalization", "Dropout", "RandomNormal", "RandomNormalLike"})


def onnx_from_module(module: Network, inputs: Sequence[str]) -> onnx.ModelProto:
    """Trace a network for any batch and any spatial size that its divisor divides.

    Parameters
    ----------
    module
        In evaluation mode; takes (n, 1, x, y, z) tensors, returns one.
    inputs
        Their names, in order.

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
    if module.training:
        raise ExportError(f"{type(module).__name__} is in training mode; call .eval() on it")
    divisor = module.divisor
    axes: dict[int, Any] = {0: Dim("n")}
    axes |= {2 + i: divisor * Dim(name) for i, name in enumerate("xyz")}
    # one tensor for each: a tensor given twice would become one input used twice
    examples = tuple(torch.zeros(2, 1, 2 * divisor, 3 * divisor, 4 * divisor) for _ in inputs)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                dynamic_shapes={name: axes for name in inputs},
                input_names=list(inputs),
                output_names=[OUTPUT],
                verbose=False,
            )
        if program is None:
            raise ExportError(f"{type(module).__name__}: the exporter returned nothing")
        model = program.model_proto
        _strip_notes(model)
        onnx.checker.check_model(model, full_check=True)
    except (torch.onnx.OnnxExporterError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"{type(module).__name__} cannot become ONNX: {reason}") from error
    if left := TRAINING_ONLY & {node.op_type for node in model.graph.node}:
        raise ExportError(
            f"{type(module).__name__}: the graph holds {', '.join(sorted(left))}; "
            "take training and noise out of the module"
        )
    return model


def with_card(model: onnx.ModelProto, card: ModelCard) -> bytes:
    """Return the file's bytes with the card in its metadata."""
    onnx.helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _strip_notes(model: onnx.ModelProto) -> None:
    """Remove stack traces and source paths: they tell of the exporting machine, and they vary."""
    graph = model.graph
    for part in (model, graph):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for group in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for item in group:
            item.ClearField("doc_string")
            item.ClearField("metadata_props")


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says of itself, and nothing else."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")

    def about_others(record: logging.LogRecord) -> bool:
        return "torchvision is not installed" not in record.getMessage()

    registration.addFilter(about_others)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
            yield
    finally:
        registration.removeFilter(about_others)
