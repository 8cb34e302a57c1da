"""Boxes of a grid: the smallest that holds a mask, and those around a voxel."""

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError

Box = tuple[slice, slice, slice]
Corner = tuple[int, int, int]


def bounding_box(mask: NDArray[np.bool_], *, margin: int = 0) -> Box:
    """Return the smallest box around a mask, grown and clipped to the grid.

    Parameters
    ----------
    mask
        (x, y, z) bool, True inside.
    margin
        Voxels added on both sides of each axis, as far as the grid reaches.

    Returns
    -------
    three slices
        Index of the box: ``volume[bounding_box(mask)]``.

    Raises
    ------
    DataError
        If the mask is empty.
    """
    found = scipy.ndimage.find_objects(mask.view(np.uint8), max_label=1)
    if found[0] is None:
        raise DataError("the mask is empty; pass one that is non-zero inside the brain")
    x, y, z = (
        slice(max(0, side.start - margin), min(n, side.stop + margin))
        for side, n in zip(found[0], mask.shape, strict=True)
    )
    return x, y, z


def box_at(corner: Corner, shape: Corner) -> Box:
    """Return the box with that first voxel and size."""
    x, y, z = (slice(first, first + n) for first, n in zip(corner, shape, strict=True))
    return x, y, z


def corner_around(centre: Corner, shape: Corner, grid: Corner, *, divisor: int = 1) -> Corner:
    """Return the corner of a box around a voxel, moved so that it lies on the grid.

    Parameters
    ----------
    centre
        A voxel.
    shape
        Of the box; along a shorter axis of the grid the corner is 0.
    grid
        Its shape.
    divisor
        What corners are multiples of, so that pooling grids line up.
    """
    x, y, z = (
        max(0, min(at - size // 2, n - size)) // divisor * divisor
        for at, size, n in zip(centre, shape, grid, strict=True)
    )
    return x, y, z
