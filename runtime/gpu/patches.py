"""Patches on a GPU: gathered, inferred and summed there, several in flight, never waited for.

Each worker has a stream, buffers and an execution context of its own. Sums are taken in the order
of the patches whatever their order of arrival, so that results repeat exactly.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from qsm_deploy.kernels.cuda_library import CudaLibrary, PatchBox
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.gpu.device import Device, Holdings
from qsm_deploy.runtime.gpu.engines.inference import DeviceSession, Inference
from qsm_deploy.runtime.reconstruction.patches import Patch

FLOAT = 4
WORTH_CAPTURING = 3  # runs of one worker: one is direct, one is captured, the rest are launched


@dataclass
class Worker:
    """One stream with its buffers and its execution context."""

    stream: int
    inputs: Mapping[str, int]
    output: int
    inference: Inference
    runs: int = 0
    graph: int | None = None


@dataclass(frozen=True)
class DevicePatches:
    """Everything that running the patches of one plan needs.

    Attributes
    ----------
    device, library, holdings
        The GPU, its kernels, and what is given back at the end.
    session
        The engine.
    volumes, channels
        Pointers to the (c, x, y, z) volumes that the network takes, and their channels.
    windows
        Pointers to the windows of the three axes, (patches, size) each.
    total
        Pointer to the (x, y, z) sum.
    workers
        At least one.
    """

    device: Device
    library: CudaLibrary
    holdings: Holdings
    session: DeviceSession
    volumes: Mapping[str, int]
    channels: Mapping[str, int]
    windows: tuple[int, int, int]
    total: int
    workers: list[Worker] = field(default_factory=list)

    def run(self, patches: list[Patch], stream: int, done: Callable[[], object]) -> None:
        """Run all patches between what ``stream`` has and will have to do.

        Parameters
        ----------
        patches
            Those that touch the mask.
        stream
            Made the volumes, and will use the sum.
        done
            Called for each patch when the GPU has summed it.

        Raises
        ------
        EngineError
            If the engine or the GPU fails.
        """
        ready = self.holdings.event(stream)
        for worker in self.workers:
            self.device.wait(worker.stream, ready)
        repeats = len(patches) >= WORTH_CAPTURING * len(self.workers)
        events = [ready]
        for count, patch in enumerate(patches):
            worker = self.workers[count % len(self.workers)]
            self._gather(patch, worker)
            self._infer(worker, repeats=repeats)
            self.device.wait(worker.stream, events[-1])
            self._accumulate(patch, worker)
            events.append(self.holdings.event(worker.stream))
        self.device.wait(stream, events[-1])
        for event in events[1:]:  # everything is enqueued: waiting holds nothing up
            self.device.finish(event)
            done()

    def _gather(self, patch: Patch, worker: Worker) -> None:
        for name, volume in self.volumes.items():
            box = PatchBox(patch.shape, patch.start, patch.size, self.channels[name])
            self.library.patch_gather(box, volume, worker.inputs[name], worker.stream)

    def _infer(self, worker: Worker, *, repeats: bool) -> None:
        """Run the engine: once directly, as it wants for new shapes, then as a CUDA graph."""

        def enqueue() -> None:
            worker.inference.enqueue(worker.inputs, worker.output, worker.stream)

        if worker.runs == 1 and repeats and self.session.capturable:
            with suppress(EngineError):  # some engines cannot be captured; they run without
                worker.graph = self.holdings.graph(worker.stream, enqueue)
        if worker.graph is None:
            enqueue()
        else:
            self.device.launch(worker.graph, worker.stream)
        worker.runs += 1

    def _accumulate(self, patch: Patch, worker: Worker) -> None:
        x, y, z = (
            base + FLOAT * size * index
            for base, size, index in zip(self.windows, patch.size, patch.index, strict=True)
        )
        self.library.patch_accumulate(
            PatchBox(patch.shape, patch.start, patch.size),
            worker.output,
            (x, y, z),
            self.total,
            stream=worker.stream,
        )
