"""Forward differences per millimetre on a periodic grid, their adjoint, and what both do together.

``G_a x = (x[i_a + 1] - x) / h_a``; ``G^T G`` has the eigenvalues
``L(k) = sum_a (2 - 2 cos(2 pi i_a / n_a)) / h_a^2``.
"""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.geometry import Geometry, Volume


def gradient(x: Volume, geometry: Geometry, axis: int) -> Volume:
    """Return the forward difference along an axis [per mm], periodic."""
    difference = np.roll(x, -1, axis) - x
    difference /= np.float32(geometry.voxel_size_mm[axis])
    return difference


def gradient_adjoint(v: Volume, geometry: Geometry, axis: int) -> Volume:
    """Return the adjoint of :func:`gradient` along an axis."""
    difference = np.roll(v, 1, axis) - v
    difference /= np.float32(geometry.voxel_size_mm[axis])
    return difference


def laplacian_eigenvalues(geometry: Geometry) -> list[NDArray[np.float32]]:
    """Return the terms of L along each axis of a half spectrum [1/mm^2]; their outer sum is L."""
    terms = [
        ((2 - 2 * np.cos(2 * np.pi * np.arange(n) / n)) / h**2).astype(np.float32)
        for n, h in zip(geometry.shape, geometry.voxel_size_mm, strict=True)
    ]
    terms[2] = terms[2][: geometry.shape[2] // 2 + 1]
    return list(np.ix_(*terms))
