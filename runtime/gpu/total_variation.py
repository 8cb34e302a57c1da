"""Total variation on a GPU: the iteration of :mod:`qsm_deploy.kernels.inversion.total_variation`.

Every iteration is one pointwise kernel and one in k-space between two transforms and two back. All
of them are enqueued before the first is waited for.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from qsm_deploy.kernels.cuda_abi import DOT_WORKSPACE_BYTES
from qsm_deploy.kernels.cuda_library import (
    CudaLibrary,
    DipoleOperator,
    PatchBox,
    VariationBuffers,
)
from qsm_deploy.kernels.inversion.grid import SUPPORT_MM, PaddedBox, grown, padded_box
from qsm_deploy.kernels.inversion.total_variation import (
    ITERATIONS,
    MU3,
    OUTLIER_SIGMAS,
    START_THRESHOLD,
    STEP_PER_FIELD,
    TINY,
    Facts,
)
from qsm_deploy.runtime.gpu.arrays import DeviceView
from qsm_deploy.runtime.gpu.device import Holdings
from qsm_deploy.runtime.gpu.layout import DOUBLE, FIELD, FLOAT, DeviceWork, Layout
from qsm_deploy.runtime.gpu.reconstruction import DeviceJob
from qsm_deploy.runtime.gpu.run import DeviceRun, Place
from qsm_deploy.runtime.reconstruction.patches import PatchPlan, plan_whole
from qsm_deploy.runtime.scan.scan import Scan

NUMBERS = 5  # sums that are needed at the same time
PADDED = "inversion"  # the stage on the padded grid
VOLUMES, MASKS, DUALS = ("field", "x", "q2", "b", "s3"), ("mask", "support"), ("s1", "s1_next")


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

    @functools.cached_property
    def grid(self) -> PaddedBox:
        """The padded box of the mask."""
        return padded_box(self.scan.mask, self.scan.geometry)

    def lasting(self, plan: PatchPlan) -> Layout:
        """Return what lives through the whole reconstruction."""
        numbers = {"sums": NUMBERS * DOUBLE, "dot": DOT_WORKSPACE_BYTES}
        return Layout({FIELD: FLOAT * self.voxels} | numbers)

    def stages(self, plan: PatchPlan) -> dict[str, Layout]:
        """Return what each stage needs for itself, in their order."""
        voxels = math.prod(self.grid.geometry.shape)
        sizes = dict.fromkeys(VOLUMES, FLOAT * voxels) | dict.fromkeys(MASKS, voxels)
        sizes |= dict.fromkeys(DUALS, 3 * FLOAT * voxels)
        sizes["workspace"] = self.library.tv_workspace_bytes(self.grid.geometry)
        return {PADDED: Layout(sizes)} | (
            {"field residual": self.residual()} if self.evaluates else {}
        )

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
        Weight of the edges [ppm mm], and noise of the field [ppm], which tells outliers.
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
        self._work, self._grid = work, work.grid
        self._sigma = sigma_ppm
        stage = self._stages[PADDED]
        self._at |= stage.at(self._scratch)
        self._workspace = self._at["workspace"], stage.sizes["workspace"]
        named = {
            name: self._at[name] for name in ("field", "mask", "support", "x", "q2", "b", "s3")
        }
        self._padded = replace(self._vectors, count=math.prod(self._grid.geometry.shape))
        named = {name: self._at[name] for name in (*VOLUMES, *MASKS)}
        mu1 = 1.0  # until the field is there
        self._tv = VariationBuffers(self._grid.geometry, alpha_ppm_mm, mu1, MU3, **named)

    def run(self, done: Callable[[], object]) -> dict[str, Any]:
        """Make the map; return what was found."""
        self._mark("")
        self._upload()
        self._mark("upload")
        self._start()
        x, steps = self._iterate()
        self._store(x)
        self._mark(PADDED)
        for step in steps:  # everything is enqueued: waiting holds nothing up
            self._device.finish(step)
            done()
        facts = self._facts()
        return asdict(facts) | (
            {"field_residual": self._residual()} if self._work.evaluates else {}
        )

    def _upload(self) -> None:
        """Enqueue field and masks; waits for the field's norm, which sets how fast edges shrink."""
        inside = self._grid.embed_mask(self._scan.mask)
        support = grown(inside, self._grid.geometry, SUPPORT_MM)
        self._send("mask", inside.view(np.uint8))
        self._send("support", support.view(np.uint8))
        self._take_field()
        rms_ppm = math.sqrt(self.squared_norm(FIELD) / np.count_nonzero(inside))
        mu1 = self._tv.alpha / max(STEP_PER_FIELD * rms_ppm, TINY)
        self._tv = replace(self._tv, mu1=mu1)

    def _start(self) -> None:
        """Begin from a masked TKD map, with duals of zero."""
        tv, grid, library = self._tv, self._grid, self._library
        corner = [box.start - inner.start for box, inner in zip(grid.box, grid.inner, strict=True)]
        box = PatchBox(grid.shape, corner, grid.geometry.shape)
        library.patch_gather(box, self._at[FIELD], tv.field, self._stream)
        self._filter(DipoleOperator(tv.geometry, "tkd", threshold=START_THRESHOLD), tv.field, tv.b)
        self._masked(tv.b, tv.x)
        self._filter(DipoleOperator(tv.geometry), tv.x, tv.q2)
        for name in ("s1", "s3"):
            self._device.zero(self._at[name], self._stages[PADDED].sizes[name], self._stream)

    def _iterate(self) -> tuple[int, list[int]]:
        """Enqueue all iterations; return the last map's pointer, and an event after each."""
        tv, steps = replace(self._tv, alpha=0.0), []  # the first split shrinks nothing
        duals = [self._at[name] for name in DUALS]
        for left in reversed(range(self._work.iterations)):
            self._library.tv_split(tv, duals[0], duals[1], self._stream)
            duals.reverse()
            # the last map goes where a dual was, to be compared with the one before
            tv = self._tv if left else replace(self._tv, x=duals[1])
            self._library.tv_solve(tv, *self._workspace, self._stream)
            steps.append(self._holdings.event(self._stream))
        return tv.x, steps

    def _store(self, x: int) -> None:
        """Enqueue the map on the scan's grid, and the sums that tell what is to be known of it."""
        tv, grid, vectors = self._tv, self._grid, self._padded
        vectors.product(x, x, 0)
        vectors.combine(-1, x, 1, tv.x)
        vectors.product(tv.x, tv.x, 1)
        self._masked(x, tv.b)
        corner = [inner.start - box.start for box, inner in zip(grid.box, grid.inner, strict=True)]
        box = PatchBox(grid.geometry.shape, corner, grid.shape)
        self._library.patch_gather(box, tv.b, self._at["chi"], self._stream)
        self._masked(tv.q2, tv.s3)
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

    def _filter(self, operator: DipoleOperator, x: int, y: int) -> None:
        self._library.dipole_apply(operator, x, y, *self._workspace, self._stream)

    def _masked(self, x: int, y: int) -> None:
        shape = self._grid.geometry.shape
        box = PatchBox(shape, (0, 0, 0), shape)
        self._library.patch_finish(box, x, y, mask=self._tv.mask, stream=self._stream)
