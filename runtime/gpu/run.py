"""What every reconstruction on a GPU does: take the field, mark the times, hand out the map.

The field and the mask go in once and the map comes out once. Everything between is enqueued: the
host never waits inside a stage.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.cuda_library import CudaLibrary, PatchBox
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.kernels.inversion.grid import SUPPORT_MM, grown
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.arrays import DeviceView
from qsm_deploy.runtime.gpu.box import DeviceBox
from qsm_deploy.runtime.gpu.device import Array, Device, Holdings, send
from qsm_deploy.runtime.gpu.dipole import DeviceVectors, Pad, PaddedDipole
from qsm_deploy.runtime.gpu.layout import FIELD, DeviceWork, Layout, twice
from qsm_deploy.runtime.gpu.variation import BoxVariation
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.scan.units import require_field


@dataclass(frozen=True)
class Place:
    """A GPU, and the kernels that run on it."""

    device: Device
    library: CudaLibrary


class DeviceRun(ABC):
    """One reconstruction on a GPU, after everything it needs was allocated.

    Parameters
    ----------
    place
        Where.
    work
        What.
    plan
        How: whole or in patches.
    holdings
        Keep what is allocated.
    chi
        Pointer to the map.
    """

    def __init__(
        self, place: Place, work: DeviceWork, plan: PatchPlan, holdings: Holdings, chi: int
    ) -> None:
        self._holdings, self._scan, self._grid = holdings, work.scan, work.grid
        self._taken = work.field
        self._device, self._library = place.device, place.library
        lasting, self._stages = work.lasting(plan), work.stages(plan)
        self._at = lasting.at(holdings.buffer(lasting.total)) | {"chi": chi}
        self._scratch = holdings.buffer(max(stage.total for stage in self._stages.values()))
        self._stream = holdings.stream()
        self._vectors = DeviceVectors(
            self._library, work.voxels, self._at["sums"], self._at["dot"], self._stream
        )
        self._padded = replace(self._vectors, count=math.prod(self._grid.geometry.shape))
        self._marks: list[tuple[str, int]] = []
        self._kept: list[Any] = []  # what the GPU still uses: page-locked copies, contexts

    @abstractmethod
    def run(self, done: Callable[[], object]) -> dict[str, Any]:
        """Make the map; return what was found."""

    def download(self) -> Volume:
        """Enqueue the map's way to the host."""
        chi = self._device.pinned(self._scan.mask.shape, np.float32)
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

    def _take_field(self) -> None:
        """Take the field inside the mask from the host, or from where it lies on the GPU."""
        if self._taken is None:
            self._send(FIELD, self._scan.measured)
        else:
            self._adopt(self._taken)

    def _adopt(self, field: DeviceView) -> None:
        """Take it once its owner's work is done."""
        self._device.wait(self._stream, self._holdings.event(field.stream))
        mask = self._scan.mask
        self._send("chi", mask.astype(np.float32))  # a weight of 0 hides what is not finite
        whole = PatchBox(mask.shape, (0, 0, 0), mask.shape)
        to, weight = self._at[FIELD], self._at["chi"]
        self._library.patch_finish(whole, field.pointer, to, weight=weight, stream=self._stream)
        require_field(self.squared_norm(FIELD) / np.count_nonzero(mask))

    def _send(self, name: str, array: Array) -> None:
        self._copy_in(self._at[name], array)

    def _copy_in(self, pointer: int, array: Array) -> None:
        self._kept.append(send(self._device, pointer, array, self._stream))

    def _dipole(self, stage: Layout, pad: Pad) -> tuple[PaddedDipole, dict[str, int]]:
        """Return the operator in the scratch buffer, and the pointers of the stage."""
        at = stage.at(self._scratch)
        grid, size = self._scan.geometry, stage.sizes["workspace"]
        mask = np.pad(self._scan.mask.view(np.uint8), [(p, p) for p in pad])
        self._copy_in(at["padded mask"], mask)
        return PaddedDipole(self._library, grid, pad, at, size, self._stream), at

    def _box(self, stage: Layout) -> tuple[DeviceBox, dict[str, int]]:
        """Return the padded box in the scratch buffer, with its masks, and the stage's pointers."""
        at = stage.at(self._scratch)
        for name, mask in self._box_masks.items():
            self._copy_in(at[name], mask.view(np.uint8))
        masks, workspace = (at["mask"], at["support"]), (at["workspace"], stage.sizes["workspace"])
        return DeviceBox(self._library, self._grid, *masks, *workspace, self._stream), at

    @functools.cached_property
    def _box_masks(self) -> dict[str, Mask]:
        inside = self._grid.embed_mask(self._scan.mask)
        return {"mask": inside, "support": grown(inside, self._grid.geometry, SUPPORT_MM)}

    def _variation(
        self, box: DeviceBox, at: Mapping[str, int], alpha_ppm_mm: float
    ) -> BoxVariation:
        """Return total variation; this waits for the field's norm, by which edges shrink."""
        rms_ppm = math.sqrt(self.squared_norm(FIELD) / np.count_nonzero(self._scan.mask))
        return BoxVariation(self._device, self._holdings, box, at, alpha_ppm_mm, rms_ppm)

    def _tell(self, steps: Iterable[int], done: Callable[[], object]) -> None:
        """Tell of each step once the GPU is through with it."""
        for step in steps:  # everything is enqueued: waiting holds nothing up
            self._device.finish(step)
            done()

    def _residual(self) -> float:
        """Return the field residual of the map; this one waits for the GPU."""
        dipole, at = self._dipole(self._stages["field residual"], twice(self._scan.geometry))
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
