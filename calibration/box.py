"""Boxes cut out of an acquisition: small enough to run a network on them many times."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan import Scan

Corner = tuple[int, int, int]


def cut_scan(scan: Scan, corner: Corner, shape: Corner) -> Scan:
    """Return the part of an acquisition in a box, as an acquisition of its own.

    Its field has sources that lie outside; so has every acquisition's.

    Parameters
    ----------
    scan
        The whole.
    corner, shape
        First voxel and size of the box; it lies on the grid.
    """
    x, y, z = (slice(first, first + n) for first, n in zip(corner, shape, strict=True))
    truth = scan.truth_ppm
    return replace(
        scan,
        measured=np.ascontiguousarray(scan.measured[:, x, y, z]),
        mask=np.ascontiguousarray(scan.mask[x, y, z]),
        geometry=Geometry(shape, scan.geometry.voxel_size_mm, scan.geometry.b0_direction),
        truth_ppm=None if truth is None else np.ascontiguousarray(truth[x, y, z]),
        labels=None,
    )


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
    return cut_scan(scan, corner, (a, b, c))
