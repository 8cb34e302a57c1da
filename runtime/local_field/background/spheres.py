"""Removal by the mean over spheres, which a harmonic field equals at their centres.

A field less its mean over a ball is free of background; what that does to the local field is
undone by deconvolution.

References
----------
Schweser et al., NeuroImage 54:2789-2807 (2011), SHARP; Wu et al., Magn Reson Med 67:137-147
(2012), V-SHARP; Sun & Wilman, Magn Reson Med 71:1151-1157 (2014), RESHARP.
"""

from dataclasses import dataclass

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.kernels.inversion.grid import PaddedBox, ball_spectrum, filtered
from qsm_deploy.kernels.inversion.least_squares import conjugate_gradients
from qsm_deploy.runtime.local_field.background.removal import Task, padded, trusted_field

WHOLE = 1 - 1e-4  # of a ball that lies in the mask


@dataclass(frozen=True)
class Resharp:
    """SHARP with one radius, deconvolved by Tikhonov's regularisation.

    Attributes
    ----------
    radius_mm
        Of the ball; the mask loses as much.
    lam
        Weight of ``|local|^2``.
    iterations, tolerance
        Of conjugate gradients.
    """

    radius_mm: float = 6.0
    lam: float = 1e-4
    iterations: int = 200
    tolerance: float = 1e-3

    @property
    def around_mm(self) -> float:
        """How far around the mask its grid reaches."""
        return self.radius_mm

    @property
    def steps(self) -> int:
        """How often it calls ``done``, at most."""
        return self.iterations

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm] and its mask, less than the task's by the radius."""
        grid = padded(task, self)
        field = trusted_field(task, grid)
        ball = _mean_over_ball(grid, self.radius_mm)
        whole = _whole(grid.embed_mask(task.mask), ball)
        _require_any(whole, self.radius_mm)

        def normal(x: Volume, lam: float) -> Volume:
            image = filtered(filtered(x, 1 - ball) * whole, 1 - ball)
            return image + np.float32(lam) * x

        local, _, _ = conjugate_gradients(
            lambda x: normal(x, self.lam),
            normal(field, 0),
            iterations=self.iterations,
            tolerance=self.tolerance,
            done=task.done,
        )
        return _result(task, grid, field - local, whole)


@dataclass(frozen=True)
class VSharp:
    """SHARP with as large a ball as fits in every voxel, deconvolved by truncated division.

    Attributes
    ----------
    radii_mm
        Of the balls, falling; the mask loses the last.
    threshold
        Smallest value of the kernel that is divided by.
    """

    radii_mm: tuple[float, ...] = (12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0)
    threshold: float = 0.05

    @property
    def around_mm(self) -> float:
        """How far around the mask its grid reaches."""
        return self.radii_mm[0]

    @property
    def steps(self) -> int:
        """How often it calls ``done``."""
        return len(self.radii_mm)

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm] and its mask, less than the task's by the last radius."""
        grid = padded(task, self)
        field, inside = trusted_field(task, grid), grid.embed_mask(task.mask)
        rest, known = np.zeros_like(field), np.zeros_like(inside)
        for radius in self.radii_mm:
            ball = _mean_over_ball(grid, radius)
            new = _whole(inside, ball) & ~known
            rest[new] = filtered(field, 1 - ball)[new]
            known |= new
            task.done()
        _require_any(known, self.radii_mm[-1])
        largest = 1 - _mean_over_ball(grid, self.radii_mm[0])
        sure = np.abs(largest) > self.threshold
        inverse = np.divide(1, largest, out=np.zeros_like(largest), where=sure)
        return _result(task, grid, field - filtered(rest, inverse), known)


def _mean_over_ball(grid: PaddedBox, radius_mm: float) -> Volume:
    """Return what the mean over a ball multiplies a half-spectrum with, 1 at DC."""
    ball = ball_spectrum(grid.geometry, radius_mm)
    ball /= ball[0, 0, 0]
    return ball


def _whole(inside: Mask, ball: Volume) -> Mask:
    """Return the centres of the balls that lie in a mask."""
    whole: Mask = inside & (filtered(inside.astype(np.float32), ball) > WHOLE)
    return whole


def _require_any(whole: Mask, radius_mm: float) -> None:
    if not whole.any():
        raise DataError(
            f"no ball of {radius_mm:g} mm lies in the mask; pass a larger mask, or remove the "
            "background by another method"
        )


def _result(task: Task, grid: PaddedBox, background: Volume, whole: Mask) -> tuple[Volume, Mask]:
    """Return the field without the background, and where."""
    local = grid.embed(task.field_ppm)
    local -= background
    local[~whole] = 0
    return grid.restore(local), grid.restore(whole)
