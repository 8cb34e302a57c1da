"""TensorRT, TensorRT for RTX, ONNX Runtime's CUDA provider: whether they load, maps, times."""

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.networks import Networks
from benchmarks.gpu.pipeline import Rows, maps_row, times_row
from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.runtime.gpu.building.builder import build_plan
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.building.config import plan_target
from qsm_deploy.runtime.gpu.building.profile import profile_from
from qsm_deploy.runtime.gpu.engines.inference import DeviceSession
from qsm_deploy.runtime.gpu.open import open_device_session

ONNX_RUNTIME = "onnxruntime-cuda"


def rows(machine: Machine, networks: Networks, libraries: tuple[str, ...]) -> Rows:
    """Yield what is measured in each library, first whether it runs a network at all."""
    for library in libraries:
        for name in machine.scale.compared:
            for precision in ("fp32", "fp16"):
                opened = partial(engine, networks, name, library, precision)
                yield f"{name}, {library} {precision}", partial(maps_row, networks, name, opened)
        for shape in machine.scale.sizes:
            for precision in ("fp32", "fp16"):
                opened = partial(engine, networks, "ir2qsm", library, precision)
                yield (
                    f"times of ir2qsm {shape_text(shape)}, {library} {precision}",
                    partial(times_row, networks, "ir2qsm", shape, opened),
                )


def engine(networks: Networks, name: str, library: str, precision: Any) -> DeviceSession:
    """Write a network for a library once, and load it on the GPU."""
    suffix = "onnx" if library == ONNX_RUNTIME else "plan"
    path = networks.machine.folder / f"{name.replace(' ', '-')}-{library}-{precision}.{suffix}"
    if not path.exists():
        choices: Any = None if library == ONNX_RUNTIME else PlanChoices(library)  # type: ignore[arg-type]
        target = plan_target(choices).options() if choices else {}  # says if it is not there
        model, card = networks.graph(name), networks.card(name, precision)
        if precision != "fp32":
            model = with_precision(model, precision)
        if choices:
            profile = profile_from(networks.machine.scale.profile, card.divisor, patchable=True)
            card = replace(card, options=card.options | target | {"shapes": str(profile)})
            path.write_bytes(build_plan(model.SerializeToString(), card, profile, choices).data)
        else:
            path.write_bytes(with_card(model, card))
    return open_device_session(path)
