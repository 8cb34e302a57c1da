"""Boxes cut out of an acquisition: small enough to run a network on them many times."""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.runtime.scan.bounding_box import Box
from qsm_deploy.runtime.scan.scan import Scan

Corner = tuple[int, int, int]


def box_at(corner: Corner, shape: Corner) -> Box:
    """Return the box with that first voxel and size."""
    x, y, z = (slice(first, first + n) for first, n in zip(corner, shape, strict=True))
    return x, y, z


def box_around(mask: NDArray[np.bool_], centre: Corner, size: int, divisor: int) -> Corner:
    """Return the corner of a cube around a voxel, moved so that it lies on the grid.

    Parameters
    ----------
    mask
        (x, y, z); only its shape counts.
    centre
        A voxel.
    size
        Of the cube; along a shorter axis the corner is 0.
    divisor
        What corners are multiples of, so that pooling grids line up.
    """
    x, y, z = (
        max(0, min(at - size // 2, n - size)) // divisor * divisor
        for at, n in zip(centre, mask.shape, strict=True)
    )
    return x, y, z


def middle_of(scan: Scan, size: int, divisor: int) -> Scan:
    """Return the cube around the middle of an acquisition's mask, shorter where the grid is."""
    x, y, z = (int(np.median(axis)) for axis in np.nonzero(scan.mask))
    corner = box_around(scan.mask, (x, y, z), size, divisor)
    a, b, c = (min(size, n) for n in scan.mask.shape)
    return scan.cut(box_at(corner, (a, b, c)))
