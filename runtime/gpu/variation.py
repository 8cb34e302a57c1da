"""The iteration of :mod:`qsm_deploy.kernels.inversion.total_variation` in a GPU's memory.

Every iteration is one pointwise kernel and one in k-space between two transforms and two back.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from qsm_deploy.kernels.cuda_library import DipoleOperator, VariationBuffers
from qsm_deploy.kernels.inversion.total_variation import MU3, START_THRESHOLD, STEP_PER_FIELD, TINY
from qsm_deploy.runtime.gpu.box import DeviceBox
from qsm_deploy.runtime.gpu.device import Device, Holdings
from qsm_deploy.runtime.gpu.layout import DUALS, FLOAT, VOLUMES


class BoxVariation:
    """Total variation on a padded box, all work on one stream.

    Parameters
    ----------
    device, holdings
        The GPU, and what keeps events on it.
    box
        The padded box.
    at
        Pointers to its buffers, those of :meth:`..layout.DeviceWork.variation`.
    alpha_ppm_mm
        Weight of the edges.
    rms_ppm
        Of the field in the mask.
    """

    def __init__(
        self,
        device: Device,
        holdings: Holdings,
        box: DeviceBox,
        at: Mapping[str, int],
        alpha_ppm_mm: float,
        rms_ppm: float,
    ) -> None:
        self._device, self._holdings, self._box = device, holdings, box
        self._duals = [at[name] for name in DUALS]
        mu1 = alpha_ppm_mm / max(STEP_PER_FIELD * rms_ppm, TINY)
        volumes = {name: at[name] for name in VOLUMES} | {"mask": box.mask, "support": box.support}
        self.tv = VariationBuffers(box.grid.geometry, alpha_ppm_mm, mu1, MU3, **volumes)

    def solve(self, field: int, iterations: int) -> tuple[int, list[int]]:
        """Enqueue all iterations for a field on the scan's grid.

        Returns
        -------
        int
            The last map's pointer; ``tv.x`` is the one before, ``tv.q2`` the last one's field.
        list
            An event after each iteration.
        """
        self._start(field)
        tv, duals, steps = self.tv, list(self._duals), []
        workspace = self._box.workspace, self._box.workspace_bytes
        asked = replace(tv, alpha=0.0)  # the first split shrinks nothing
        for left in reversed(range(iterations)):
            self._box.library.tv_split(asked, duals[0], duals[1], self._box.stream)
            duals.reverse()
            # the last map goes where a dual was, to be compared with the one before
            asked = tv if left else replace(tv, x=duals[1])
            self._box.library.tv_solve(asked, *workspace, self._box.stream)
            steps.append(self._holdings.event(self._box.stream))
        return asked.x, steps

    def _start(self, field: int) -> None:
        """Begin from a masked TKD map, with duals of zero."""
        tv, box = self.tv, self._box
        box.load(field, tv.field)
        box.apply(DipoleOperator(tv.geometry, "tkd", threshold=START_THRESHOLD), tv.field, tv.b)
        box.masked(tv.b, tv.x)
        box.apply(DipoleOperator(tv.geometry), tv.x, tv.q2)
        for dual, components in ((self._duals[0], 3), (tv.s3, 1)):
            self._device.zero(dual, components * FLOAT * math.prod(box.shape), box.stream)
