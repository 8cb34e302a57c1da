"""An engine on a GPU, as the pipelines on the host see it: called patch by patch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import UnservedShapeError
from qsm_deploy.runtime.card.card import UNROLLED, ModelCard
from qsm_deploy.runtime.gpu.device import Holdings, send
from qsm_deploy.runtime.gpu.engines.inference import DeviceBackend, DeviceSession
from qsm_deploy.runtime.gpu.engines.tensorrt import TensorRtSession
from qsm_deploy.runtime.gpu.layout import FLOAT, DeviceWorkload, own_bytes, whole_units
from qsm_deploy.runtime.gpu.pipeline import Gpu
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.pipeline import input_shapes
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import Precision

SHARE_OF_FREE = 0.95  # the rest is for what the libraries take for themselves


class GpuSession:
    """An engine on a GPU behind :class:`qsm_deploy.runtime.sessions.session.Session`."""

    precision: Precision = "fp32"  # nothing below what the model file says

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.card = gpu.session.card
        self.backend: DeviceBackend = gpu.session.backend
        self.version = gpu.session.version
        self.device = f"cuda:{gpu.device.number} ({gpu.device.name})"
        self._call: _Call | None = None

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Copy the tensors to the GPU, run the model once, and copy the output back.

        What a run of these shapes needs is kept for the next: execution contexts are costly.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if self._call is None or self._call.shapes != shapes:
            self.close()
            self._call = _Call(self.gpu, shapes)
        return self._call.run(tensors)

    def close(self) -> None:
        """Give back what a run left on the GPU."""
        if self._call is not None:
            self._call.close()
            self._call = None

    def __del__(self) -> None:
        self.close()

    def serve(self, unserved: UnservedShapeError) -> bool:
        """Take an engine for other shapes in the place of this one, if it can be built again."""
        engine = self.gpu.session
        rebuild = engine.rebuild if isinstance(engine, TensorRtSession) else None
        if rebuild is None or unserved.profile is None:
            return False
        self.gpu = replace(self.gpu, session=rebuild(unserved, unserved.profile))
        self.close()
        engine.close()
        return True

    def limit_bytes(self) -> float:
        """Return what a run may take of the GPU's memory, the engine included."""
        gpu = self.gpu
        return SHARE_OF_FREE * gpu.device.free_bytes() + gpu.session.weights_bytes

    def workload(
        self, scan: Scan, correction: Correction | None = None, *, evaluates: bool = False
    ) -> "DeviceWorkload | CopyingWorkload":
        """Return what decides the GPU's memory in a run, which also says how it runs."""
        several_echoes = scan.quantity == "phase_rad" and len(scan.measured) > 1  # a run for each
        if several_echoes or is_called_by_host(self.card):
            return CopyingWorkload(scan, self.gpu.session)
        return DeviceWorkload(scan, self.gpu.session, self.gpu.library, correction, evaluates)


def is_called_by_host(card: ModelCard) -> bool:
    """Tell whether a network's loop or grid is the host's business."""
    return card.pipeline in UNROLLED or card.pipeline == "after"


class _Call:
    """Buffers and an execution context for tensors of certain shapes."""

    def __init__(self, gpu: Gpu, shapes: dict[str, tuple[int, ...]]) -> None:
        self._device, session = gpu.device, gpu.session
        self.shapes = shapes
        self._holdings = Holdings(gpu.device)
        try:
            hold = self._holdings
            self._stream = hold.stream()
            self._pointers = {n: hold.buffer(FLOAT * math.prod(s)) for n, s in shapes.items()}
            self._output_shape = session.output_shape(shapes)
            self._output = hold.buffer(FLOAT * math.prod(self._output_shape))
            scratch = hold.buffer(session.scratch_bytes(shapes))
            self._inference = session.open_inference(shapes, scratch)
        except BaseException:
            self.close()
            raise

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        device, stream = self._device, self._stream
        staged = [send(device, self._pointers[n], t, stream) for n, t in tensors.items()]
        self._inference.enqueue(self._pointers, self._output, stream)
        output: NDArray[np.float32] = device.pinned(self._output_shape, np.float32)
        device.copy_out(output, self._output, stream)
        device.synchronize()
        del staged  # read by now
        return output

    def close(self) -> None:
        self._holdings.give_back()


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
        shapes = input_shapes(self.card, self.scan, plan)
        sizes = [FLOAT * math.prod(shape) for shape in shapes.values()]
        sizes += [FLOAT * math.prod(self.session.output_shape(shapes))]
        sizes += [self.session.scratch_bytes(shapes)]
        held = self.session.weights_bytes + own_bytes(self.session, shapes)
        return {"inference": float(held + sum(map(whole_units, sizes)))}
