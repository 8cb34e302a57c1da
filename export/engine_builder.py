"""From a graph to a plan, with TensorRT or with TensorRT for RTX, which share an interface.

Precision is what the graph says (the network is strongly typed) and FP32 means FP32: TF32 is off.
TensorRT for RTX builds on machines without a GPU. It has no timing cache.
"""

import functools
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx

from qsm_deploy.export.engine_shapes import Profile
from qsm_deploy.kernels.errors import ExportError, MissingDependencyError
from qsm_deploy.runtime.card import ModelCard, TensorInfo

Engine = Literal["tensorrt", "tensorrt-rtx"]
LIBRARIES: Mapping[Engine, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
BYTES_PER_MB = 10**6
# what the builder needs of a library; stub packages of that name have less
NEEDED = ("Builder", "OnnxParser", "ILogger", "NetworkDefinitionCreationFlag")


@dataclass(frozen=True)
class Plan:
    """A serialised engine, and the layers that went in, before any were fused."""

    data: bytes
    layers: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class PlanChoices:
    """What the user chose about a plan.

    Attributes
    ----------
    engine
        The flavour that builds, and later runs, the plan.
    shapes
        ``MIN,OPT,MAX``, if not the default ones.
    workspace_mb
        Most memory that a layer may take for itself while it runs [MB]; no limit by default.
    layers
        The file for a report on the layers, if there is to be one.
    """

    engine: Engine
    shapes: str | None = None
    workspace_mb: float | None = None
    layers: Path | None = None


def installed_engines() -> tuple[Engine, ...]:
    """Return the flavours of TensorRT whose library is installed."""
    return tuple(e for e in get_args(Engine) if importlib.util.find_spec(LIBRARIES[e]) is not None)


def require_engine(engine: Engine) -> Any:
    """Import the library of a flavour.

    Raises
    ------
    MissingDependencyError
        If it is not installed, or a stub without the builder.
    """
    try:
        library = importlib.import_module(LIBRARIES[engine])
    except ImportError as error:
        raise MissingDependencyError(LIBRARIES[engine], engine, f"--engine {engine}") from error
    if not all(hasattr(library, name) for name in NEEDED):
        raise MissingDependencyError(LIBRARIES[engine], engine, f"--engine {engine}")
    return library


def engine_version(engine: Engine) -> str:
    """Return the flavour and the version of its library."""
    return f"{engine} {require_engine(engine).__version__}"


def build_plan(
    model: onnx.ModelProto, card: ModelCard, profile: Profile, choices: PlanChoices
) -> Plan:
    """Build an engine that serves every shape of a profile.

    Parameters
    ----------
    model
        Of operators that the engine knows, with the types that it computes in.
    card
        Goes into the plan as the network's name.
    profile
        Smallest, typical and largest sizes.
    choices
        Engine and workspace.

    Raises
    ------
    MissingDependencyError
        If the library is not installed.
    ExportError
        If it refuses the graph.
    """
    engine = choices.engine
    trt = require_engine(engine)
    logger = _logger(engine)
    logger.messages.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, model, logger, engine)
    network.name = card.to_json()
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if choices.workspace_mb is not None:
        limit = int(choices.workspace_mb * BYTES_PER_MB)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    shapes = builder.create_optimization_profile()
    for tensor in card.inputs:
        if tensor.is_volume:
            shapes.set_shape(tensor.name, *_sizes(tensor, profile))
    config.add_optimization_profile(shapes)
    data = builder.build_serialized_network(network, config)
    if data is None:
        reason = logger.messages[0] if logger.messages else "it gives no reason"
        raise ExportError(f"{engine} cannot build this network: {reason}")
    return Plan(bytes(data), _layers(network))


def _parse(trt: Any, network: Any, model: onnx.ModelProto, logger: Any, engine: Engine) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse(model.SerializeToString()):
        return
    refused = [
        f"{error.node_operator()} ({error.node_name()}): {error.desc()}"
        for error in map(parser.get_error, range(parser.num_errors))
    ]
    raise ExportError(f"{engine} refuses the graph: {'; '.join(refused) or 'it is not readable'}")


def _sizes(tensor: TensorInfo, profile: Profile) -> Sequence[Sequence[int]]:
    channels = int(tensor.shape[1])
    return [(n, channels, *shape) for n, shape in zip(profile.batches, profile.shapes, strict=True)]


def _layers(network: Any) -> tuple[Mapping[str, str], ...]:
    layers = (network.get_layer(n) for n in range(network.num_layers))
    return tuple(
        {
            "layer": layer.name,
            "kind": layer.type.name.lower(),
            "precision": layer.get_output(0).dtype.name.lower(),
        }
        for layer in layers
    )


@functools.cache
def _logger(engine: Engine) -> Any:
    """Return what keeps the errors; a process has one for each library."""
    trt = require_engine(engine)

    class Errors(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(message)

    return Errors()
