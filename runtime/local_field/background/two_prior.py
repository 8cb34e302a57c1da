"""Two-prior projection: sources inside and outside are sought together.

Much of the field of inner sources is harmonic in the mask, so that outer ones explain it as well,
and projection onto these alone gives all of it away. Here both may explain the field, weak ones
inside and strong ones outside, and only what the outer ones make is taken away::

    min_x |w (f - D x)|^2 / n^2 + |x / p|^2,    local = f - D x_out

With ``x = p u`` it is ``(p D w^2 D p / n^2 + 1) u = p D w^2 f / n^2``, by conjugate gradients.
They multiply what is rounded: before they have converged, two machines differ by some per cent of
the local field, and are as far from the truth. Where the field is not trusted, w = 0, the sources
say what it is.
"""

from dataclasses import dataclass

import numpy as np

from qsm_deploy.kernels.dipole import half_dipole_kernel
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.kernels.inversion.grid import PaddedBox, filtered, grown
from qsm_deploy.kernels.inversion.least_squares import Orientations, conjugate_gradients, product
from qsm_deploy.runtime.local_field.background.removal import Task, padded

BEYOND_MM = 0.5  # a mask's edge, as voxels cut it


@dataclass(frozen=True)
class TwoPrior:
    """The projection, and what is known of the sources.

    Attributes
    ----------
    inner_ppm, outer_ppm
        How strong they are inside the mask and in a rim around it, and beyond.
    rim_mm
        Around the mask there is still brain, as deep as it was eroded; 0 if it was not.
    noise_ppm
        Of the field.
    around_mm
        How far outside the mask they may lie.
    iterations
        Of conjugate gradients; what stops early leaves background.
    """

    inner_ppm: float = 0.1
    outer_ppm: float = 3.0
    rim_mm: float = 2.0 + BEYOND_MM
    noise_ppm: float = 0.002
    around_mm: float = 12.0
    iterations: int = 60

    @property
    def steps(self) -> int:
        """How often it calls ``done``, at most."""
        return self.iterations

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm], 0 outside the mask, and the mask."""
        grid = padded(task, self)
        inside, trusted = grid.embed_mask(task.mask), grid.embed_mask(task.trusted)
        near = grown(inside, grid.geometry, self.rim_mm) if self.rim_mm else inside
        prior = np.where(near, np.float32(self.inner_ppm), np.float32(self.outer_ppm))
        field = grid.embed(task.field_ppm)
        field -= field[trusted].mean(dtype=np.float64)  # phase does not tell a constant
        x = self.sources(task, grid, prior, np.where(trusted, field, np.float32(0)))
        lost = inside & ~trusted
        dipole = half_dipole_kernel(grid.geometry)
        if lost.any():
            field[lost] = filtered(x, dipole)[lost]
        x[inside] = 0
        field -= filtered(x, dipole)
        field[~inside] = 0
        return grid.restore(field), task.mask

    def sources(self, task: Task, grid: PaddedBox, prior: Volume, known: Volume) -> Volume:
        """Return the sources inside and outside [ppm].

        Parameters
        ----------
        task
            What is solved.
        grid
            The padded one, of all volumes.
        prior
            How strong sources are [ppm].
        known
            The field [ppm], 0 where it is not trusted; overwritten.
        """
        system = Orientations(grid, [task.geometry.b0_direction], [task.trusted], prior)
        precision = np.float32(1 / self.noise_ppm**2)

        def normal(u: Volume) -> Volume:
            image = system.adjoint(system.fields(prior * u))
            image *= precision
            image += u
            return image

        known *= precision
        x, _, _ = conjugate_gradients(
            normal,
            system.adjoint([known]),
            iterations=self.iterations,
            inner=product,
            done=task.done,
        )
        x *= prior
        return x
