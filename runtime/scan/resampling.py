"""From the scanner's voxel size to the one a network was trained at, and back.

Fourier interpolation, as for MRI data elsewhere: the spectrum is cut or filled with zeros, so the
first voxel and the field of view stay where they are. A phase goes through its complex number.
Along an axis of which a mask reaches both ends, as a slab does, the volume is taken for mirrored at
its ends and not for periodic, so that the one end does not run into the other.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, rfft
from scipy.ndimage import affine_transform

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Shape, Volume
from qsm_deploy.kernels.threads import workers
from qsm_deploy.runtime.scan.scan import Scan

ROOM_VOXELS = 4  # at least, between the ends of a mask on a volume that is taken for periodic


def resample_scan(scan: Scan, voxel_size_mm: tuple[float, float, float]) -> Scan:
    """Return a scan on the grid nearest to a voxel size that spans the same field of view.

    The voxels differ from the wanted size by what rounding the shape costs. A truth and its
    labels are left behind: they belong to the original grid.

    Raises
    ------
    DataError
        If nothing of the mask is left.
    """
    grid = scan.geometry
    x, y, z = (
        max(2, round(n * old / new))
        for n, old, new in zip(grid.shape, grid.voxel_size_mm, voxel_size_mm, strict=True)
    )
    dx, dy, dz = (
        n * old / m for n, old, m in zip(grid.shape, grid.voxel_size_mm, (x, y, z), strict=True)
    )
    finer = Geometry((x, y, z), (dx, dy, dz), grid.b0_direction)
    mask = _resample_mask(scan.mask, finer.shape)
    if not mask.any():
        raise DataError("nothing of the mask is left on the grid of the network; pass a larger one")
    way = partial(_fourier, shape=finer.shape, mirrored=_fills(scan.mask))
    if scan.quantity == "phase_rad":
        measured = [np.arctan2(way(np.sin(m)), way(np.cos(m))) for m in scan.measured]
    else:
        measured = [way(m) for m in scan.measured]
    return scan.on_grid(finer, mask, np.stack(measured).astype(np.float32) * mask, way)


def resample_map(chi_ppm: Volume, mask: NDArray[np.bool_]) -> Volume:
    """Return a map on the grid of a mask, 0 outside it."""
    x, y, z = mask.shape
    return _fourier(chi_ppm, (x, y, z), _fills(mask)) * mask


def _fills(mask: NDArray[np.bool_]) -> list[bool]:
    """Return along which axes a mask reaches both ends, or nearly."""
    sides = zip(bounding_box(mask), mask.shape, strict=True)
    return [n - (side.stop - side.start) < ROOM_VOXELS for side, n in sides]


def _fourier(volume: Volume, shape: Shape, mirrored: list[bool]) -> Volume:
    """Return a volume whose spectrum is cut or filled with zeros along each axis."""
    for axis, (n, mirror) in enumerate(zip(shape, mirrored, strict=True)):
        if volume.shape[axis] == n:
            continue
        along = np.moveaxis(volume, axis, 0)
        if mirror:
            along = _resized(np.concatenate([along, along[::-1]]), 2 * n)[:n]
        else:
            along = _resized(along, n)
        volume = np.moveaxis(along, 0, axis)
    return np.ascontiguousarray(volume, dtype=np.float32)


def _resized(along: Volume, after: int) -> Volume:
    """Return a periodic volume with so many planes."""
    before = len(along)
    shared = min(before, after)
    kept = rfft(along, axis=0, workers=workers())[: shared // 2 + 1]
    if shared % 2 == 0:  # the bin at Nyquist's frequency stands for two on the finer grid
        kept[-1] *= 0.5 if after > before else 2
    finer: Volume = irfft(kept, after, axis=0, workers=workers()) * np.float32(after / before)
    return finer


def _resample_mask(mask: NDArray[np.bool_], shape: Shape) -> NDArray[np.bool_]:
    """Return the voxels whose centres lie more inside than outside."""
    steps = [n / m for n, m in zip(mask.shape, shape, strict=True)]
    share = affine_transform(
        mask.astype(np.float32), steps, output_shape=shape, order=1, mode="nearest"
    )
    inside: NDArray[np.bool_] = share > 0.5
    return inside
