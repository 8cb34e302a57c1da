"""ONNX files that something else made: what they are, and whether a module computes the same."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from qsm_deploy.calibration.int8.qdq import is_quantised
from qsm_deploy.export.checkpoints.file_kind import require_weights_file
from qsm_deploy.export.graph.torch_graph import FLOATS, shapes_of, single_graph
from qsm_deploy.export.own.card_file import Stated
from qsm_deploy.kernels.errors import AccuracyError, UsageError, WeightsError
from qsm_deploy.kernels.geometry import Shape, shape_text
from qsm_deploy.runtime.card.card import METADATA_KEY
from qsm_deploy.runtime.sessions.open import installed_backends

Arrays = Sequence[NDArray[np.float32]]
Feeds = dict[str, NDArray[Any]]

LARGEST_DIFFERENCE = 1e-4  # of the output's range
LARGEST_OF_HALF = 5e-3  # of a file that rounds every operator to half precision
FREE = 48  # voxels a side of a graph that takes any size


def foreign_graph(path: Path) -> onnx.ModelProto:
    """Return what is in an ONNX file that something else made, its functions inlined.

    Raises
    ------
    WeightsError
        If it is missing, damaged, quantised, or its weights are in another file that is.
    UsageError
        If it has a card already.
    """
    require_weights_file(path, "pass an ONNX file to --onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own, which has no types
        raise WeightsError(f"--onnx {path}: damaged, or no ONNX file; get it again") from error
    if any(entry.key == METADATA_KEY for entry in model.metadata_props):
        raise UsageError(f"--onnx {path}: it has a card: run it as it is, with qsm-run")
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(path.resolve().parent))
    except Exception as error:  # of the file system, or of a path that leads elsewhere
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"--onnx {path}: its weights are in another file that cannot be read ({reason}); put "
            "it beside"
        ) from error
    try:
        model = single_graph(model)
        onnx.checker.check_model(model)
    except Exception as error:  # the checker's, the inliner's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"--onnx {path}: no valid graph ({reason})") from error
    if is_quantised(model):
        raise WeightsError(
            f"--onnx {path}: quantised to INT8 already; pass the file that it was made from"
        )
    return model


def inputs_of(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return what a graph takes, without its weights, which old files list too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def size_of(model: onnx.ModelProto) -> Shape | None:
    """Return the size of the volumes that a file is for, ``None`` if any axis is free."""
    shapes = shapes_of(model)
    for value in inputs_of(model):
        if len(shape := shapes[value.name]) == 5:
            x, y, z = shape[2:]
            return None if x is None or y is None or z is None else (x, y, z)
    return None


def require_channels(model: onnx.ModelProto, stated: Stated, path: Path) -> None:
    """Check what a card says of a graph's inputs and outputs against the graph.

    Raises
    ------
    UsageError
        If their numbers differ, or an input is neither a volume nor numbers.
    """
    shapes, inputs = shapes_of(model), inputs_of(model)
    names = ", ".join(f"{i.name} {_shape_text(shapes[i.name])}" for i in inputs)
    for value in inputs:
        if value.type.tensor_type.elem_type not in FLOATS:
            raise UsageError(f"--onnx {path}: the input {value.name} is of no floating point")
    if stated.inputs is None:
        return
    if len(stated.inputs) != len(inputs):
        raise UsageError(
            f"{stated.where}: inputs names {len(stated.inputs)} tensors, the graph takes {names}"
        )
    for group, value in zip(stated.inputs, inputs, strict=True):
        shape = shapes[value.name]
        if len(shape) == 5 and shape[1] not in (None, len(group)):
            raise UsageError(
                f"{stated.where}: inputs names {len(group)} channels for {value.name}, which has "
                f"{shape[1]}; several names in one list are channels"
            )
    given = [shapes[value.name] for value in model.graph.output]
    counts = [s[1] for s in given if len(s) == 5]
    channels = sum(n for n in counts if n is not None)
    known = len(counts) == len(given) and None not in counts
    if stated.outputs is not None and known and channels != len(stated.outputs):
        raise UsageError(
            f"{stated.where}: outputs names {len(stated.outputs)} maps, the graph gives {channels}"
        )


def require_same(
    model: onnx.ModelProto,
    module: nn.Module,
    size: Shape | None,
    divisor: int,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Check a module against the file that it was made of, run as it is.

    Parameters
    ----------
    model
        The file's.
    module
        Made of it.
    size
        Of the volumes it is for, if not any.
    divisor
        Of the size otherwise.
    say
        Called with the largest difference.

    Raises
    ------
    AccuracyError
        If they differ by more than :data:`LARGEST_DIFFERENCE` of the output's range.
    """
    x = divisor * max(1, round(FREE / divisor))
    shape = size or (x, x, x)
    rng = np.random.default_rng(0)
    shapes = shapes_of(model)
    given = [_noise(shapes[value.name], shape, rng) for value in inputs_of(model)]
    with torch.inference_mode():
        made = module(*map(torch.from_numpy, given))
    ours = [y.numpy() for y in (made if isinstance(made, tuple) else (made,))]
    worst, where = 0.0, ""
    for backend, theirs in _as_it_is(model, given):
        for a, b in zip(ours, theirs, strict=True):
            spread = float(b.max() - b.min()) or 1.0
            difference = float(np.abs(a - b).max()) / spread if a.shape == b.shape else np.inf
            if np.isnan(difference):  # which no comparison holds against it
                difference = np.inf
            if difference > worst:
                worst, where = difference, backend
    passes = LARGEST_OF_HALF if _is_half(model) else LARGEST_DIFFERENCE
    if not worst <= passes:
        raise AccuracyError(
            f"the graph as a module differs from the file in {where} by {worst:.3g} of the "
            f"output's range at {shape_text(shape)}, {passes:g} passes; an operator "
            "means something else here: nothing was written"
        )
    backends = " and ".join(installed_backends())
    say(f"the graph as a module is within {worst:.2g} of the output's range of {backends}")


def _is_half(model: onnx.ModelProto) -> bool:
    """Tell whether a file computes in half precision, whose rounding is then part of it."""
    kinds = [tensor.data_type for tensor in model.graph.initializer]
    kinds += [value.type.tensor_type.elem_type for value in inputs_of(model)]
    return onnx.TensorProto.FLOAT16 in kinds or onnx.TensorProto.BFLOAT16 in kinds


def _noise(
    shape: tuple[int | None, ...], size: Shape, rng: np.random.Generator
) -> NDArray[np.float32]:
    free = (1, 1, *size)
    filled = [
        n if n is not None else (free[i] if len(shape) == 5 else 1) for i, n in enumerate(shape)
    ]
    return rng.standard_normal(filled).astype(np.float32)


def _as_it_is(model: onnx.ModelProto, given: Arrays) -> Iterator[tuple[str, Arrays]]:
    """Yield what each installed backend makes of a file."""
    data = model.SerializeToString()
    half = TensorProto.FLOAT16
    feeds = {
        value.name: array.astype(
            np.float16 if value.type.tensor_type.elem_type == half else np.float32
        )
        for value, array in zip(inputs_of(model), given, strict=True)
    }
    for backend in installed_backends():
        outputs = _RUN[backend](data, feeds)
        yield backend, [np.asarray(y, dtype=np.float32) for y in outputs]


def _in_onnxruntime(data: bytes, feeds: Feeds) -> Arrays:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs: Arrays = session.run(None, feeds)
    return outputs


def _in_openvino(data: bytes, feeds: Feeds) -> Arrays:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(data), "CPU", settings)
    found = compiled(feeds)
    return [found[i] for i in range(len(compiled.outputs))]


_RUN: dict[str, Callable[[bytes, Feeds], Arrays]] = {
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
}


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return "x".join("?" if n is None else str(n) for n in shape)
