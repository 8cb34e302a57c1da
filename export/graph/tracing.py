"""From a PyTorch module to an ONNX graph, without what the exporter says of itself."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from qsm_deploy.export.graph.dipole_node import TRANSLATION
from qsm_deploy.kernels.errors import ExportError


def trace(
    module: nn.Module,
    tensors: Sequence[Tensor],
    dynamic_shapes: Sequence[Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """Return the graph of a module, its dipole operators as nodes ``qsm::DipoleConv``.

    Parameters
    ----------
    module
        In evaluation mode.
    tensors
        An example of each input.
    dynamic_shapes
        The free axes of each, as ``torch.export`` takes them.
    inputs, outputs
        The names they get.

    Returns
    -------
    ModelProto
        Without the exporter's notes on source files: they tell of the exporting machine, and they
        vary.

    Raises
    ------
    ExportError
        If it cannot be traced.
    """
    name, shapes = type(module).__name__, tuple(dynamic_shapes)
    if any(
        p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values()
    ):
        shapes = (shapes,)  # to PyTorch they are one argument
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module,
                tuple(tensors),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table=TRANSLATION,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"{name} cannot become ONNX: {_reason(error)}") from error
    if program is None:
        raise ExportError(f"{name}: the exporter returned nothing")
    model = program.model_proto
    _strip_notes(model)
    return model


def _reason(error: BaseException) -> str:
    """Return the first line of what is at the bottom of an error; the exporter wraps it twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _strip_notes(model: onnx.ModelProto) -> None:
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
