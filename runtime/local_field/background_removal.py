"""The local field: what is left of a field without the part that sources outside the mask make.

Sources outside are sought whose field is as near as possible to the measured one inside. What
they explain is taken for the background; nearly nothing of the field of inner sources can be made
by outer ones, because the two are almost orthogonal.
"""

from typing import Protocol

import numpy as np
import scipy.fft

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume

PAD_VOXELS = 8  # around the mask's box, where sources may lie too
MOST_ITERATIONS = 40
ENOUGH = 3e-3  # of the first gradient; smaller ones fit noise


class BackgroundRemoval(Protocol):
    """What removes the background field; :func:`remove_background` does."""

    def __call__(self, field_ppm: Volume, mask: Mask, geometry: Geometry) -> tuple[Volume, Mask]:
        """Return the local field [ppm], 0 outside a mask, and that mask."""


def remove_background(field_ppm: Volume, mask: Mask, geometry: Geometry) -> tuple[Volume, Mask]:
    """Remove the background field by projection onto dipole fields (PDF).

    Conjugate gradients seek the susceptibility outside the mask, on the mask's box and a rim
    around it, with periodic boundaries: what lies beyond is replaced by sources in the rim.

    Parameters
    ----------
    field_ppm
        (x, y, z) field; what lies outside the mask is ignored.
    mask
        (x, y, z) bool, True where the field is known.
    geometry
        The grid.

    Returns
    -------
    (x, y, z) float32 array, (x, y, z) bool array
        Local field [ppm], 0 outside its mask; the mask, as it was.

    Raises
    ------
    DataError
        If the mask is empty.

    References
    ----------
    Liu et al., NMR Biomed 24:1129-1136 (2011).
    """
    box = bounding_box(mask)
    x, y, z = (scipy.fft.next_fast_len(s.stop - s.start + 2 * PAD_VOXELS, real=True) for s in box)
    grid = Geometry((x, y, z), geometry.voxel_size_mm, geometry.b0_direction)
    inner = tuple(slice(PAD_VOXELS, PAD_VOXELS + s.stop - s.start) for s in box)
    inside = np.zeros(grid.shape, dtype=bool)
    inside[inner] = mask[box]
    rest = np.zeros(grid.shape, dtype=np.float32)
    rest[inner] = np.where(mask[box], field_ppm[box], np.float32(0))
    rest[inside] -= rest[inside].mean(dtype=np.float64)  # phase does not tell a constant
    _project(rest, inside, grid)
    local = np.zeros_like(field_ppm)
    local[box] = rest[inner]
    return local, mask


def _project(rest: Volume, inside: Mask, grid: Geometry) -> None:
    """Take out of ``rest`` what sources outside explain; 0 outside it stays."""
    gradient = _seen(rest, ~inside, grid)
    direction = gradient.copy()
    size = first = float(np.vdot(gradient, gradient))
    for _ in range(MOST_ITERATIONS):
        if size <= ENOUGH**2 * first:
            return
        change = _seen(direction, inside, grid)
        step = np.float32(size / float(np.vdot(change, change)))
        rest -= step * change
        gradient = _seen(rest, ~inside, grid)
        size, before = float(np.vdot(gradient, gradient)), size
        direction *= np.float32(size / before)
        direction += gradient


def _seen(sources: Volume, where: Mask, grid: Geometry) -> Volume:
    """Return the field of sources, 0 but where it is looked at."""
    field = dipole_convolve(sources, grid)
    field[~where] = 0
    return field
