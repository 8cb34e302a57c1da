"""From the scanner's voxel size to the one a network was trained at, and back.

Fourier interpolation, as for MRI data elsewhere: the spectrum is cut or filled with zeros, so the
first voxel and the field of view stay where they are. A phase goes through its complex number.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from scipy.signal import resample

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Shape, Volume
from qsm_deploy.runtime.scan.scan import Scan


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
    if scan.quantity == "phase_rad":
        measured = [np.angle(_fourier(np.exp(1j * m), finer.shape)) for m in scan.measured]
    else:
        measured = [_fourier(m, finer.shape) for m in scan.measured]
    return replace(
        scan,
        measured=np.stack(measured).astype(np.float32) * mask,
        mask=mask,
        geometry=finer,
        truth_ppm=None,
        labels=None,
    )


def resample_map(chi_ppm: Volume, mask: NDArray[np.bool_]) -> Volume:
    """Return a map on the grid of a mask, 0 outside it."""
    x, y, z = mask.shape
    back: Volume = _fourier(chi_ppm, (x, y, z)).astype(np.float32) * mask
    return back


def _fourier(volume: NDArray[np.inexact], shape: Shape) -> NDArray[np.inexact]:
    for axis, n in enumerate(shape):
        if volume.shape[axis] != n:
            volume = resample(volume, n, axis=axis)
    return volume


def _resample_mask(mask: NDArray[np.bool_], shape: Shape) -> NDArray[np.bool_]:
    """Return the voxels whose centres lie more inside than outside."""
    axes = [np.arange(m) * (n / m) for n, m in zip(mask.shape, shape, strict=True)]
    share = map_coordinates(
        mask.astype(np.float32), np.meshgrid(*axes, indexing="ij"), order=1, mode="nearest"
    )
    inside: NDArray[np.bool_] = share > 0.5
    return inside
