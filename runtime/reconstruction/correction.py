"""What ``--data-consistency`` does: one step on the whole volume from a map towards its field."""

import math
from dataclasses import dataclass
from typing import Any

from qsm_deploy.kernels.data_consistency import data_consistency, masked_data_consistency
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.kernels.inversion.grid import SUPPORT_MM, padded_box
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.metrics.metrics import field_residual
from qsm_deploy.runtime.reconstruction.memory import FLOAT, PAD_VOXELS, TRANSFORM
from qsm_deploy.runtime.reconstruction.ranges import WEIGHT, require_iterations, require_within
from qsm_deploy.runtime.scan.scan import Scan

LEAST_SQUARES = 38  # bytes per voxel of the mask's padded box


@dataclass(frozen=True)
class Correction:
    """The weight of the map against the field, and the steps.

    Attributes
    ----------
    lam
        The weight, 1e-9 to 1000.
    iterations
        Of conjugate gradients, 1 to 10,000; ``None`` is the closed form.
    brought_back
        What takes its place for a map that comes back from another grid.
    name
        By which it was asked for, if not by its numbers.

    Raises
    ------
    UsageError
        If a number is beyond its range.
    """

    lam: float
    iterations: int | None = None
    brought_back: "Correction | None" = None
    name: str | None = None

    def __post_init__(self) -> None:
        require_within("--data-consistency", self.lam, WEIGHT)
        if self.iterations is not None:
            require_iterations("--dc-iterations", self.iterations)

    def require(self, scan: Scan) -> None:
        """Check that a scan has what the step needs.

        Raises
        ------
        UsageError
            If it has not one local field.
        """
        if scan.quantity != "local_field_ppm":
            raise UsageError(
                "--data-consistency needs a local field, this network takes a phase; drop it"
            )
        if len(scan.measured) != 1:
            raise UsageError(
                f"--data-consistency takes one field, {len(scan.measured)} were given; drop it"
            )

    def needed_bytes(self, scan: Scan) -> float:
        """Return the memory that the step takes above its map."""
        if self.iterations is None:
            padded = scan.geometry.padded(PAD_VOXELS).shape
            return TRANSFORM * math.prod(padded) + FLOAT * scan.mask.size
        return LEAST_SQUARES * math.prod(padded_box(scan.mask, scan.geometry).geometry.shape)

    def apply(self, chi_ppm: Volume, scan: Scan, stages: Stages) -> tuple[Volume, dict[str, Any]]:
        """Return the corrected map, 0 outside the mask, and what the report says of it."""
        field, mask, grid = scan.measured[0], scan.mask, scan.geometry
        with stages("field residual"):
            before = field_residual(chi_ppm, field, mask, grid)
        fitted = None
        with stages("data consistency"):
            if self.iterations is None:
                chi = data_consistency(chi_ppm, field, grid, lam=self.lam, pad_voxels=PAD_VOXELS)
                chi *= mask
            else:
                chi, fit = masked_data_consistency(
                    chi_ppm, field, mask, grid, lam=self.lam, iterations=self.iterations
                )
                fitted = fit.fitted_residual
        with stages("field residual"):
            after = field_residual(chi, field, mask, grid)
        return chi, self.report(before, after, fitted)

    def report(
        self, residual_before: float, residual_after: float, fitted_residual: float | None
    ) -> dict[str, Any]:
        """Return what a run's report says of the step; the last with the sources outside."""
        if fitted_residual is None:
            how: dict[str, Any] = {"pad_voxels": PAD_VOXELS}
        else:
            how = {"support_mm": SUPPORT_MM, "fitted_residual": fitted_residual}
        return {
            "lambda": self.lam,
            "iterations": self.iterations,
            "field_residual_before": residual_before,
            "field_residual_after": residual_after,
        } | how


# the least error of those that cost no network a point, whatever background removal left behind;
# of a map that interpolation smoothed, what cost none anything
AUTO = Correction(0.05, 10, Correction(0.3, name="auto"), "auto")
