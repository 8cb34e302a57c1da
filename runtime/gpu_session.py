"""An engine on a GPU, as the pipelines on the host see it.

Most networks run in :mod:`qsm_deploy.runtime.device_pipeline` and leave the GPU with the map only.
Those whose loop or whose grid is the host's business (the split forms, AFTER-QSM) call it patch by
patch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.runtime.card import ModelCard
from qsm_deploy.runtime.correction import Correction
from qsm_deploy.runtime.device import holding
from qsm_deploy.runtime.device_layout import FLOAT, DeviceWorkload, whole_units
from qsm_deploy.runtime.device_pipeline import Gpu
from qsm_deploy.runtime.device_reconstruction import reconstruct_on_device
from qsm_deploy.runtime.device_session import DeviceBackend, DeviceSession
from qsm_deploy.runtime.patches import PatchPlan
from qsm_deploy.runtime.pipeline import Volume, network_input
from qsm_deploy.runtime.scan import Scan
from qsm_deploy.runtime.session import Precision
from qsm_deploy.runtime.stages import Stages

SHARE_OF_FREE = 0.95  # the rest is for what the libraries take for themselves


class GpuSession:
    """An engine on a GPU behind :class:`qsm_deploy.runtime.session.Session`."""

    precision: Precision = "fp32"  # nothing below what the model file says

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.card = gpu.session.card
        self.backend: DeviceBackend = gpu.session.backend
        self.version = gpu.session.version
        self.device = f"cuda:{gpu.device.number} ({gpu.device.name})"

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Copy the tensors to the GPU, run the model once, and copy the output back."""
        device, session = self.gpu.device, self.gpu.session
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        with holding(device) as holdings:
            stream = holdings.stream()
            staged = {name: device.pinned(t.shape, np.float32) for name, t in tensors.items()}
            pointers = {}
            for name, tensor in tensors.items():
                np.copyto(staged[name], tensor)
                pointers[name] = holdings.buffer(tensor.nbytes)
                device.copy_in(pointers[name], staged[name], stream)
            output = device.pinned(session.output_shape(shapes), np.float32)
            made = holdings.buffer(output.nbytes)
            scratch = holdings.buffer(session.scratch_bytes(shapes))
            session.open_inference(shapes, scratch).enqueue(pointers, made, stream)
            device.copy_out(output, made, stream)
            device.synchronize()
        result: NDArray[np.float32] = output
        return result

    def reconstruct(
        self,
        work: DeviceWorkload,
        plan: PatchPlan,
        stages: Stages,
        done: Callable[[], object] = lambda: None,
    ) -> tuple[Volume, dict[str, Any]]:
        """Return the map; see :mod:`qsm_deploy.runtime.device_reconstruction`."""
        return reconstruct_on_device(self.gpu, work, plan, stages, done)

    def limit_bytes(self) -> float:
        """Return what a run may take of the GPU's memory, the engine included."""
        return SHARE_OF_FREE * self.gpu.device.free_bytes() + self.gpu.session.weights_bytes

    def workload(
        self, scan: Scan, correction: Correction | None = None, *, evaluates: bool = False
    ) -> "DeviceWorkload | CopyingWorkload":
        """Return what decides the GPU's memory in a run, which also says how it runs."""
        card = self.card
        if card.patchable == "split" or card.pipeline == "after":
            return CopyingWorkload(scan, self.gpu.session)
        return DeviceWorkload(scan, self.gpu.session, self.gpu.library, correction, evaluates)


@dataclass(frozen=True)
class CopyingWorkload:
    """What decides the GPU's memory where patches come from the host one by one."""

    scan: Scan
    session: DeviceSession

    @property
    def card(self) -> ModelCard:
        """The network's."""
        return self.session.card

    def peak_bytes(self, plan: PatchPlan) -> dict[str, float]:
        """Return the memory of the GPU that one patch takes [bytes]."""
        shapes: dict[str, tuple[int, ...]] = {}
        for tensor in self.card.inputs:
            if tensor.is_volume:
                shapes[tensor.name] = (1, int(tensor.shape[1]), *plan.patch_shape)
            else:
                shapes[tensor.name] = network_input(self.card, self.scan, tensor.name).shape
        sizes = [FLOAT * math.prod(shape) for shape in shapes.values()]
        sizes += [FLOAT * math.prod(self.session.output_shape(shapes))]
        sizes += [self.session.scratch_bytes(shapes)]
        return {"inference": float(self.session.weights_bytes + sum(map(whole_units, sizes)))}
