"""The Laplacian boundary value method: the background is harmonic, and all of the field at the rim.

References
----------
Zhou et al., NMR Biomed 27:312-319 (2014).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.ndimage import binary_erosion

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.kernels.inversion.least_squares import conjugate_gradients
from qsm_deploy.runtime.local_field.background.removal import Task, padded, trusted_field


@dataclass(frozen=True)
class Lbv:
    """The method.

    Attributes
    ----------
    iterations, tolerance
        Of conjugate gradients.
    """

    iterations: int = 500
    tolerance: float = 1e-4

    around_mm: ClassVar[float] = 0.0

    @property
    def steps(self) -> int:
        """How often it calls ``done``, at most."""
        return self.iterations

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm] and its mask, less than the task's by a layer of voxels."""
        grid = padded(task, self)
        inner = binary_erosion(grid.embed_mask(task.mask))
        if not inner.any():
            raise DataError("the mask is nowhere thicker than two voxels; pass a larger mask")
        field = trusted_field(task, grid)
        weights = [np.float32(1 / v**2) for v in task.geometry.voxel_size_mm]

        def laplacian(x: Volume) -> Volume:
            total = np.zeros_like(x)
            for axis, weight in enumerate(weights):
                along, out = np.moveaxis(x, axis, 0), np.moveaxis(total, axis, 0)
                out[1:-1] += weight * (along[:-2] - 2 * along[1:-1] + along[2:])
            total *= inner
            return total

        harmonic, _, _ = conjugate_gradients(
            lambda x: -laplacian(x),
            laplacian(np.where(inner, np.float32(0), field)),
            iterations=self.iterations,
            tolerance=self.tolerance,
            done=task.done,
        )
        local = grid.embed(task.field_ppm) - harmonic
        local[~inner] = 0
        return grid.restore(local), grid.restore(inner)
