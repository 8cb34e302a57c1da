"""The stages from what was measured to a susceptibility map, one after the other on the GPU.

The field and the mask go in once and the map comes out once. Everything between is enqueued: the
host never waits inside a stage. Run on an H100 with PyTorch as the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.cuda_library import CudaLibrary, PatchBox
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.arrays import DeviceView
from qsm_deploy.runtime.gpu.device import Array, Device, Holdings, send
from qsm_deploy.runtime.gpu.dipole import DeviceVectors, Pad, PaddedDipole, correct
from qsm_deploy.runtime.gpu.engines.inference import DeviceSession
from qsm_deploy.runtime.gpu.layout import FIELD, FLOAT, WORKERS, DeviceWorkload, Layout, twice
from qsm_deploy.runtime.gpu.patches import DevicePatches, Worker
from qsm_deploy.runtime.reconstruction.memory import PAD_VOXELS
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.pipeline import network_input
from qsm_deploy.runtime.scan.units import require_field

TKD_INPUT = "tkd_chi_ppm"


@dataclass(frozen=True)
class Gpu:
    """A GPU, the kernels that run on it, and an engine loaded there."""

    device: Device
    library: CudaLibrary
    session: DeviceSession


class DevicePipeline:
    """One reconstruction on a GPU, after everything it needs was allocated.

    Parameters
    ----------
    gpu
        Where.
    work
        What: the acquisition, the engine and what follows it.
    plan
        How: whole or in patches.
    holdings
        Keep what is allocated.
    chi
        Pointer to the map.
    """

    def __init__(
        self, gpu: Gpu, work: DeviceWorkload, plan: PatchPlan, holdings: Holdings, chi: int
    ) -> None:
        self._gpu, self._work, self._plan, self._holdings = gpu, work, plan, holdings
        self._device, self._library = gpu.device, gpu.library
        lasting, self._stages = work.lasting(plan), work.stages(plan)
        self._at = lasting.at(holdings.buffer(lasting.total)) | {"chi": chi}
        self._scratch = holdings.buffer(max(stage.total for stage in self._stages.values()))
        self._stream = holdings.stream()
        self._vectors = DeviceVectors(
            self._library, work.voxels, self._at["sums"], self._at["dot"], self._stream
        )
        self._marks: list[tuple[str, int]] = []
        self._kept: list[Any] = []  # what the GPU still uses: page-locked copies, contexts

    def run(self, done: Callable[[], object]) -> dict[str, Any]:
        """Make the map; return what was found: the field residual, and the step taken."""
        self._mark("")
        self._upload()
        self._mark("upload")
        if self._work.card.tkd is not None:
            self._prepare_tkd()
            self._mark("prepare")
        self._infer(done)
        self._mark("inference")
        return self._compare_and_correct()

    def download(self) -> Volume:
        """Enqueue the map's way to the host."""
        chi = self._device.pinned(self._work.scan.mask.shape, np.float32)
        self._device.copy_out(chi, self._at["chi"], self._stream)
        self._mark("download")
        return chi

    def squared_norm(self, name: str) -> float:
        """Return the sum of a volume's squares; this waits for the GPU."""
        self._vectors.product(self._at[name], self._at[name], 0)
        return float(self._numbers(1)[0])

    def times(self, stages: Stages) -> None:
        """Give what each stage took on the GPU, once all is done."""
        for (_, first), (name, last) in zip(self._marks, self._marks[1:], strict=False):
            self._device.finish(last)
            stages.add(name, self._device.seconds_between(first, last))

    def _mark(self, name: str) -> None:
        self._marks.append((name, self._holdings.event(self._stream)))

    def _upload(self) -> None:
        work, scan = self._work, self._work.scan
        self._send("inside", scan.mask.view(np.uint8))
        for name in work.channels.keys() - {TKD_INPUT}:
            if name == FIELD and work.field is not None:
                self._adopt(work.field)
            else:
                self._send(name, network_input(work.card, scan, name))
        for name, values in work.numbers.items():
            self._send(name, values)
        for n, axis in enumerate(self._plan.axes):
            self._send(f"windows {n}", axis.windows)

    def _adopt(self, field: DeviceView) -> None:
        """Take the field inside the mask from where it lies, once its owner's work is done."""
        if field.stream is not None:
            self._device.wait(self._stream, self._holdings.event(field.stream))
        mask = self._work.scan.mask
        self._send("total", mask.astype(np.float32))  # a weight of 0 hides what is not finite
        whole = PatchBox(mask.shape, (0, 0, 0), mask.shape)
        to, weight = self._at[FIELD], self._at["total"]
        self._library.patch_finish(whole, field.pointer, to, weight=weight, stream=self._stream)
        require_field(self.squared_norm(FIELD) / np.count_nonzero(mask))

    def _masked(self, volume: int, to: int) -> None:
        shape = self._work.scan.mask.shape
        box = PatchBox(shape, (0, 0, 0), shape)
        self._library.patch_finish(box, volume, to, mask=self._at["inside"], stream=self._stream)

    def _send(self, name: str, array: Array) -> None:
        self._copy_in(self._at[name], array)

    def _copy_in(self, pointer: int, array: Array) -> None:
        self._kept.append(send(self._device, pointer, array, self._stream))

    def _dipole(self, stage: Layout, pad: Pad) -> tuple[PaddedDipole, dict[str, int]]:
        """Return the operator in the scratch buffer, and the pointers of the stage."""
        at = stage.at(self._scratch)
        grid, size = self._work.scan.geometry, stage.sizes["workspace"]
        mask = np.pad(self._work.scan.mask.view(np.uint8), [(p, p) for p in pad])
        self._copy_in(at["padded mask"], mask)
        return PaddedDipole(self._library, grid, pad, at, size, self._stream), at

    def _prepare_tkd(self) -> None:
        tkd = self._work.card.tkd
        assert tkd is not None  # the caller looked
        dipole, _ = self._dipole(self._stages["prepare"], (tkd.pad_voxels,) * 3)
        chi, threshold = self._at[TKD_INPUT], tkd.threshold
        dipole.filtered(self._at[FIELD], chi, "tkd", masked=tkd.masked, threshold=threshold)

    def _infer(self, done: Callable[[], object]) -> None:
        work, plan, at = self._work, self._plan, self._at
        mask = work.scan.mask
        inside = [patch for patch in plan if mask[patch.inside].any()]
        self._device.zero(at["total"], FLOAT * work.voxels, self._stream)
        DevicePatches(
            self._device,
            self._library,
            self._holdings,
            work.session,
            {name: at[name] for name in work.channels},
            work.channels,
            (at["windows 0"], at["windows 1"], at["windows 2"]),
            at["total"],
            self._workers(min(len(inside), WORKERS)),
        ).run(inside, self._stream, done)
        self._masked(at["total"], at["chi"])

    def _workers(self, count: int) -> list[Worker]:
        work = self._work
        shapes = work.shapes(self._plan)
        scratch = self._stages["inference"].at(self._scratch)
        numbers = {name: self._at[name] for name in work.numbers}
        workers = [
            Worker(
                self._holdings.stream(),
                {name: scratch[f"{name} {n}"] for name in work.channels} | numbers,
                scratch[f"output {n}"],
                work.session.open_inference(shapes, scratch[f"scratch {n}"]),
            )
            for n in range(count)
        ]
        self._kept += workers
        return workers

    def _compare_and_correct(self) -> dict[str, Any]:
        step = self._work.correction
        if step is None:
            return {"field_residual": self._residual()} if self._work.evaluates else {}
        before = self._residual()
        dipole, at = self._dipole(self._stages["data consistency"], (PAD_VOXELS,) * 3)
        correct(self._at["chi"], self._at[FIELD], step, dipole, self._vectors, at)
        self._mark("data consistency")
        return {"data_consistency": step.report(before, self._residual())}

    def _residual(self) -> float:
        """Return the field residual of the map; this one waits for the GPU."""
        grid = self._work.scan.geometry
        dipole, at = self._dipole(self._stages["field residual"], twice(grid))
        predicted, field = at["predicted"], self._at[FIELD]
        dipole.field_of(self._at["chi"], predicted)
        self._vectors.combine(-1, field, 1, predicted)
        self._vectors.product(predicted, predicted, 0)
        self._vectors.product(field, field, 1)
        self._mark("field residual")
        sums = self._numbers(2)
        if sums[1] == 0:
            raise DataError("the field is zero in the whole mask; check the field and the mask")
        return float(np.sqrt(sums[0] / sums[1]))

    def _numbers(self, count: int) -> NDArray[np.float64]:
        """Return the first of the dot products; this waits for the GPU."""
        numbers = self._device.pinned((count,), np.float64)
        self._device.copy_out(numbers, self._at["sums"], self._stream)
        self._device.finish(self._holdings.event(self._stream))
        return numbers
