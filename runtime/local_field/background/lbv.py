"""The Laplacian boundary value method: the background is harmonic, and all of the field at the rim.

References
----------
Zhou et al., NMR Biomed 27:312-319 (2014).
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_erosion

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.kernels.inversion.least_squares import conjugate_gradients
from qsm_deploy.runtime.local_field.background.removal import Task


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

    @property
    def steps(self) -> int:
        """How often it calls ``done``, at most."""
        return self.iterations

    def __call__(self, task: Task) -> tuple[Volume, Mask]:
        """Return the local field [ppm] and its mask, less than the task's by a layer of voxels."""
        box = bounding_box(task.mask)
        inside = np.pad(task.mask[box], 1)
        inner = binary_erosion(inside)
        if not inner.any():
            raise DataError("the mask is nowhere thicker than two voxels; pass a larger mask")
        field = np.pad(np.where(task.mask[box], task.field_ppm[box], np.float32(0)), 1)
        weights = [np.float32(1 / v**2) for v in task.geometry.voxel_size_mm]

        def laplacian(x: Volume) -> Volume:
            total = np.zeros_like(x)
            for axis, weight in enumerate(weights):
                along, out = np.moveaxis(x, axis, 0), np.moveaxis(total, axis, 0)
                out[1:-1] += weight * (along[:-2] - 2 * along[1:-1] + along[2:])
            total *= inner
            return total

        rim = np.where(inner, np.float32(0), field)
        harmonic, _, _ = conjugate_gradients(
            lambda x: -laplacian(x),
            laplacian(rim),
            iterations=self.iterations,
            tolerance=self.tolerance,
            done=task.done,
        )
        local = np.zeros_like(task.field_ppm, dtype=np.float32)
        local[box] = np.where(inner, field - harmonic, np.float32(0))[1:-1, 1:-1, 1:-1]
        mask = np.zeros_like(task.mask)
        mask[box] = inner[1:-1, 1:-1, 1:-1]
        return local, mask
