"""Total variation on a GPU, from a field to its map and what is to be known of it.

All iterations are enqueued before the first is waited for.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from qsm_deploy.kernels.cuda_abi import DOT_WORKSPACE_BYTES
from qsm_deploy.kernels.cuda_library import CudaLibrary, VariationBuffers
from qsm_deploy.kernels.inversion.total_variation import ITERATIONS, OUTLIER_SIGMAS, Facts
from qsm_deploy.runtime.gpu.arrays import DeviceView
from qsm_deploy.runtime.gpu.box import DeviceBox
from qsm_deploy.runtime.gpu.device import Holdings
from qsm_deploy.runtime.gpu.layout import DOUBLE, FIELD, FLOAT, DeviceWork, Layout
from qsm_deploy.runtime.gpu.reconstruction import DeviceJob
from qsm_deploy.runtime.gpu.run import DeviceRun, Place
from qsm_deploy.runtime.reconstruction.patches import PatchPlan, plan_whole
from qsm_deploy.runtime.scan.scan import Scan

NUMBERS = 5  # sums that are needed at the same time
PADDED = "inversion"  # the stage on the padded grid


@dataclass(frozen=True)
class VariationWorkload(DeviceWork):
    """What decides the memory of total variation on a GPU; it takes the whole volume.

    Attributes
    ----------
    scan, library, evaluates, field
        As :class:`qsm_deploy.runtime.gpu.layout.DeviceWork` has them.
    iterations
        Number of them, positive.
    """

    scan: Scan
    library: CudaLibrary
    evaluates: bool = False
    field: DeviceView | None = None
    iterations: int = ITERATIONS

    def lasting(self, plan: PatchPlan) -> Layout:
        """Return what lives through the whole reconstruction."""
        numbers = {"sums": NUMBERS * DOUBLE, "dot": DOT_WORKSPACE_BYTES}
        return Layout({FIELD: FLOAT * self.voxels} | numbers)

    def stages(self, plan: PatchPlan) -> dict[str, Layout]:
        """Return what each stage needs for itself, in their order."""
        residual = {"field residual": self.residual()} if self.evaluates else {}
        return {PADDED: self.variation()} | residual

    def advice(self, free: str) -> str:
        """Return what to do where so little memory is free."""
        return "free more, or pass --device cpu"


def variation_job(
    place: Place, work: VariationWorkload, *, alpha_ppm_mm: float, sigma_ppm: float
) -> DeviceJob:
    """Return what makes a map of least total variation.

    Parameters
    ----------
    place
        Where.
    work
        The acquisition: one local field.
    alpha_ppm_mm, sigma_ppm
        Weight of the edges [ppm mm], and noise of most of the field [ppm], which tells outliers.
    """
    plan = plan_whole(work.scan.mask.shape, 1)
    begin = partial(DeviceVariation, place, work, plan, alpha_ppm_mm, sigma_ppm)
    return DeviceJob(place.device, work, plan, begin)


class DeviceVariation(DeviceRun):
    """Total variation of one acquisition, after everything it needs was allocated.

    Parameters
    ----------
    place, work, plan, holdings, chi
        As :class:`qsm_deploy.runtime.gpu.run.DeviceRun` has them.
    alpha_ppm_mm, sigma_ppm
        As :func:`variation_job` has them.
    """

    def __init__(
        self,
        place: Place,
        work: VariationWorkload,
        plan: PatchPlan,
        alpha_ppm_mm: float,
        sigma_ppm: float,
        holdings: Holdings,
        chi: int,
    ) -> None:
        super().__init__(place, work, plan, holdings, chi)
        self._work, self._alpha, self._sigma = work, alpha_ppm_mm, sigma_ppm

    def run(self, done: Callable[[], object]) -> dict[str, Any]:
        """Make the map; return what was found."""
        self._mark("")
        box, at = self._box(self._stages[PADDED])
        self._take_field()
        variation = self._variation(box, at, self._alpha)
        self._mark("upload")
        x, steps = variation.solve(self._at[FIELD], self._work.iterations)
        self._store(variation.tv, box, x)
        self._mark(PADDED)
        self._tell(steps, done)
        found = asdict(self._facts())
        return found | ({"field_residual": self._residual()} if self._work.evaluates else {})

    def _store(self, tv: VariationBuffers, box: DeviceBox, x: int) -> None:
        """Enqueue the map on the scan's grid, and the sums that tell what is to be known of it."""
        vectors = self._padded
        vectors.product(x, x, 0)
        vectors.combine(-1, x, 1, tv.x)
        vectors.product(tv.x, tv.x, 1)
        box.store(x, tv.b, self._at["chi"])
        box.masked(tv.q2, tv.s3)
        vectors.combine(-1, tv.field, 1, tv.s3)
        vectors.product(tv.s3, tv.s3, 2)
        vectors.product(tv.field, tv.field, 3)
        vectors.count_beyond(tv.s3, OUTLIER_SIGMAS * self._sigma, 4)

    def _facts(self) -> Facts:
        """Return what was found; this waits for the GPU."""
        *squares, outliers = self._numbers(NUMBERS)
        size, change, missed, field = np.sqrt(squares)
        return Facts(
            self._work.iterations,
            float(change / max(size, 1e-30)),
            float(missed / max(field, 1e-30)),
            float(outliers / np.count_nonzero(self._scan.mask)),
            self._grid.geometry.shape,
        )
