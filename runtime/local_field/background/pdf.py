"""Projection onto dipole fields: what outer sources explain is the background.

Sources outside are sought whose field is as near as possible to the measured one inside. The
field of inner sources is nearly, not wholly, orthogonal to theirs: what of it is harmonic in the
mask is taken away too.

References
----------
Liu et al., NMR Biomed 24:1129-1136 (2011).
"""

from dataclasses import dataclass

import numpy as np

from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.kernels.inversion.least_squares import Orientations, conjugate_gradients
from qsm_deploy.runtime.local_field.background.removal import Task, padded


@dataclass(frozen=True)
class Pdf:
    """The projection.

    Attributes
    ----------
    around_mm
        How far outside the mask sources may lie.
    iterations, tolerance
        Of conjugate gradients, and of the gradient relative to the first; smaller ones fit noise.
    """

    around_mm: float = 8.0
    iterations: int = 40
    tolerance: float = 3e-3

    @property
    def steps(self) -> int:
        """How often it calls ``done``, at most."""
        return self.iterations

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm], 0 outside the mask, and the mask."""
        grid = padded(task, self)
        inside, trusted = grid.embed_mask(task.mask), grid.embed_mask(task.trusted)
        system = Orientations(grid, [task.geometry.b0_direction], [task.trusted], ~inside)
        field = grid.embed(task.field_ppm)
        field -= field[trusted].mean(dtype=np.float64)  # phase does not tell a constant
        outer, _, _ = conjugate_gradients(
            lambda x: system.adjoint(system.fields(x)),
            system.adjoint([np.where(trusted, field, np.float32(0))]),
            iterations=self.iterations,
            tolerance=self.tolerance,
            done=task.done,
        )
        (background,) = system.fields(outer)
        field -= background
        field[~inside] = 0
        return grid.restore(field), task.mask
