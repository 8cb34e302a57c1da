"""The layers of an engine: those of the graph, and what the library made of them."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.gpu.engines.tensorrt_library import Library, error_log, start

if TYPE_CHECKING:
    import tensorrt

GPU = 0  # as for a build
Layers = Sequence[Mapping[str, str]]


def network_layers(network: "tensorrt.INetworkDefinition") -> Layers:
    """Return the layers of a parsed network, before any are fused."""
    layers = (network.get_layer(n) for n in range(network.num_layers))
    return tuple(
        {
            "layer": layer.name,
            "kind": layer.type.name.lower(),
            "precision": layer.get_output(0).dtype.name.lower(),
        }
        for layer in layers
    )


def engine_layers(library: Library, data: bytes) -> Layers:
    """Return the layers of a plan as they run, with the kernel (tactic) that was chosen for each.

    Raises
    ------
    EngineError
        If there is no GPU, without which no plan can be loaded, or this one cannot.
    """
    from qsm_deploy.runtime.gpu.cuda_device import device_properties  # of CUDA's bindings

    device_properties(GPU)
    log = error_log(library)
    runtime = start(library.Runtime, log)
    runtime.engine_host_code_allowed = True  # it was built a moment ago
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"the plan cannot be loaded: {log.reason()}")
    inspector = engine.create_engine_inspector()
    told = json.loads(inspector.get_engine_information(library.LayerInformationFormat.JSON))
    return tuple(_row(layer) for layer in told.get("Layers", ()))


def layer_report(library: Library, before: Layers, data: bytes) -> str:
    """Return both kinds of layers as JSON, and why where the second is missing."""
    report: dict[str, Any] = {"network": before}
    try:
        report["engine"] = engine_layers(library, data)
    except EngineError as error:
        report |= {"engine": None, "why_no_engine": str(error)}
    return json.dumps(report, indent=2) + "\n"


def _row(layer: Any) -> Mapping[str, str]:
    """Return what the inspector says of a layer, which is its name alone if it knows no more."""
    if isinstance(layer, str):
        return {"layer": layer}
    outputs = (output.get("Format/Datatype", "") for output in layer.get("Outputs", ()))
    return {
        "layer": layer.get("Name", ""),
        "kind": layer.get("LayerType", ""),
        "tactic": layer.get("TacticName") or layer.get("TacticValue", ""),
        "formats": "; ".join(outputs),
    }
