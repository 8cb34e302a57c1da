"""From a graph to a plan, with TensorRT or with TensorRT for RTX, which share an interface.

Precision is what the graph says (the network is strongly typed) and FP32 means FP32: TF32 is off.
TensorRT for RTX builds on machines without a GPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.kernels.tensorrt_plugin import load_dipole_plugin
from qsm_deploy.runtime.card.card import ModelCard, TensorInfo
from qsm_deploy.runtime.gpu.building.build_progress import watched_build
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.building.config import builder_config, builder_library, building_gpu
from qsm_deploy.runtime.gpu.building.layers import layer_report, network_layers
from qsm_deploy.runtime.gpu.building.profile import Profile
from qsm_deploy.runtime.gpu.building.timing_cache import (
    attach_timing_cache,
    save_timing_cache,
    timing_cache_file,
)
from qsm_deploy.runtime.gpu.engines.tensorrt_library import (
    ErrorLog,
    Flavour,
    Library,
    error_log,
    start,
)

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True)
class Plan:
    """A serialised engine, and the report on its layers if one was asked for."""

    data: bytes
    layers: str | None


def build_plan(
    graph: bytes,
    card: ModelCard,
    profile: Profile,
    choices: PlanChoices,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Build an engine that serves every shape of a profile.

    Parameters
    ----------
    graph
        An ONNX file of operators that the engine knows, with the types that it computes in.
    card
        Goes into the plan as the network's name; says what the plan is built for.
    profile
        Smallest, typical and largest sizes.
    choices
        Flavour, compatibility and workspace.
    say
        Called with what the user must know.

    Raises
    ------
    MissingDependencyError
        If the library is not installed.
    ExportError
        If it refuses the graph.
    """
    if card.options.get("dipole_op") == "plugin":
        prepare_plugin(choices.engine)
    library = builder_library(choices)
    log = error_log(library)
    log.messages.clear()
    builder = start(library.Builder, log)
    typed = library.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(typed))
    _parse(library, network, graph, log, choices.engine)
    network.name = card.to_json()
    config = builder_config(library, builder, choices)
    shapes = builder.create_optimization_profile()
    for tensor in card.inputs:
        if tensor.is_volume:
            shapes.set_shape(tensor.name, *_sizes(library, tensor, profile))
    config.add_optimization_profile(shapes)
    timings = timing_cache_file(library, building_gpu(choices))
    has_timings = attach_timing_cache(config, timings, say)
    with watched_build(library, config, visible=choices.progress):
        data = builder.build_serialized_network(network, config)
    if data is None:
        raise ExportError(
            f"{choices.engine} cannot build this network: {log.reason()}; write an ONNX file with "
            "-o NAME.onnx"
        )
    if has_timings:
        save_timing_cache(config, timings, say)
    plan = bytes(data)
    wanted = choices.layers is not None
    return Plan(plan, layer_report(library, network_layers(network), plan) if wanted else None)


def prepare_plugin(engine: Flavour) -> None:
    """Make the dipole operator known to the library that is to parse it.

    Raises
    ------
    ExportError
        If the flavour takes no plugins; its parser would end the process over one.
    EngineError
        If the plugin cannot be loaded.
    """
    if engine == "tensorrt-rtx":
        raise ExportError(
            "tensorrt-rtx takes no plugins, which --dipole-op plugin needs; export with "
            "--dipole-op matmul, or with --engine tensorrt"
        )
    load_dipole_plugin()


def _parse(
    library: Library,
    network: "tensorrt.INetworkDefinition",
    graph: bytes,
    log: ErrorLog,
    engine: Flavour,
) -> None:
    parser = library.OnnxParser(network, log.logger)
    if parser.parse(graph):
        return
    refused = [
        f"{error.node_operator()} ({error.node_name()}): {error.desc()}"
        for error in map(parser.get_error, range(parser.num_errors))
    ]
    raise ExportError(f"{engine} refuses the graph: {'; '.join(refused) or 'it is not readable'}")


def _sizes(library: Library, tensor: TensorInfo, profile: Profile) -> Iterator["tensorrt.Dims"]:
    """Return the smallest, the typical and the largest shape of a tensor."""
    for n, shape in zip(profile.batches, profile.shapes, strict=True):
        yield library.Dims([n, int(tensor.shape[1]), *shape])
