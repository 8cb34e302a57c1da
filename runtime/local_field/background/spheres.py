"""Removal by the mean over spheres, which a harmonic field equals at their centres.

A field less its mean over a ball is free of background; what that does to the local field is
undone by deconvolution.

References
----------
Schweser et al., NeuroImage 54:2789-2807 (2011), SHARP; Wu et al., Magn Reson Med 67:137-147
(2012), V-SHARP; Sun & Wilman, Magn Reson Med 71:1151-1157 (2014), RESHARP.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.fft

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.kernels.inversion.grid import PaddedBox, ball_spectrum, padded_box
from qsm_deploy.kernels.inversion.least_squares import conjugate_gradients
from qsm_deploy.kernels.threads import workers
from qsm_deploy.runtime.local_field.background.removal import Task

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
    lam: float = 1e-3
    iterations: int = 200
    tolerance: float = 1e-3

    @property
    def steps(self) -> int:
        """How often it calls ``done``, at most."""
        return self.iterations

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm] and its mask, less than the task's by the radius."""
        grid, field = _embedded(task, self.radius_mm)
        less_mean, mask = _less_mean(task, grid, self.radius_mm)
        whole = grid.embed_mask(mask)

        def adjoint(volume: Volume) -> Volume:
            return less_mean(volume * whole)

        x, _, _ = conjugate_gradients(
            lambda x: adjoint(less_mean(x)) + np.float32(self.lam) * x,
            adjoint(less_mean(field)),
            iterations=self.iterations,
            tolerance=self.tolerance,
            done=task.done,
        )
        x[~whole] = 0
        return grid.restore(x), mask


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
    def steps(self) -> int:
        """How often it calls ``done``."""
        return len(self.radii_mm)

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm] and its mask, less than the task's by the last radius."""
        grid, field = _embedded(task, self.radii_mm[0])
        known = np.zeros(grid.shape, dtype=bool)
        rest = np.zeros_like(field)
        for radius in self.radii_mm:
            less_mean, mask = _less_mean(
                task, grid, radius, may_be_empty=radius > self.radii_mm[-1]
            )
            new = grid.embed_mask(mask & ~known)
            rest[new] = less_mean(field)[new]
            known |= mask
            task.done()
        largest = 1 - _mean_over_ball(grid, self.radii_mm[0])
        spectrum = scipy.fft.rfftn(rest, workers=workers())
        sure = np.abs(largest) > self.threshold
        spectrum *= np.divide(1, largest, out=np.zeros_like(largest), where=sure)
        local = scipy.fft.irfftn(spectrum, s=grid.geometry.shape, workers=workers())
        local[~grid.embed_mask(known)] = 0
        return grid.restore(local), known


def _embedded(task: Task, radius_mm: float) -> tuple[PaddedBox, Volume]:
    """Return the field on a grid on which no ball meets itself, 0 outside the mask."""
    grid = padded_box(task.mask, task.geometry, around_mm=radius_mm)
    return grid, grid.embed(task.field_ppm * task.mask)


def _mean_over_ball(grid: PaddedBox, radius_mm: float) -> Volume:
    """Return what the mean over a ball multiplies a half-spectrum with, 1 at DC."""
    ball = ball_spectrum(grid.geometry, radius_mm)
    return ball / ball[0, 0, 0]


def _less_mean(
    task: Task, grid: PaddedBox, radius_mm: float, *, may_be_empty: bool = False
) -> tuple[Callable[[Volume], Volume], Mask]:
    """Return what subtracts the mean over balls, and where these lie in the mask."""
    ball = _mean_over_ball(grid, radius_mm)

    def filtered(volume: Volume, multiplier: Volume) -> Volume:
        spectrum = scipy.fft.rfftn(volume, workers=workers())
        spectrum *= multiplier
        image: Volume = scipy.fft.irfftn(spectrum, s=grid.geometry.shape, workers=workers())
        return image

    inside = grid.embed_mask(task.mask)
    whole = inside & (filtered(inside.astype(np.float32), ball) > WHOLE)
    if not whole.any() and not may_be_empty:
        raise DataError(
            f"no ball of {radius_mm:g} mm lies in the mask; pass a larger mask, or remove the "
            "background by another method"
        )
    return lambda volume: filtered(volume, 1 - ball), grid.restore(whole) > 0
