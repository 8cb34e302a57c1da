"""From the scanner's voxel size to the one a network was trained at, and back.

Fourier interpolation, as for MRI data elsewhere: the spectrum is cut or filled with zeros, so the
first voxel and the field of view stay where they are. A phase goes through its complex number.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, rfft
from scipy.ndimage import affine_transform

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Shape, Volume
from qsm_deploy.kernels.threads import workers
from qsm_deploy.runtime.scan.scan import Scan

ROOM_VOXELS = 4  # at least, between the ends of a mask
MOST_OFF = 0.05  # of a voxel's size, by rounding their number


def with_room(scan: Scan, voxel_size_mm: tuple[float, float, float]) -> Scan:
    """Return a scan with room for Fourier interpolation after its last voxels, if it has none.

    The interpolation takes a volume for periodic, so that a mask which reaches both ends of an
    axis would run into itself; and few thin slices have no whole number of voxels of another size.
    Where there is room already, the scan is returned as it is.
    """
    grid = scan.geometry
    rooms = []
    for side, n, old, new in zip(
        bounding_box(scan.mask), grid.shape, grid.voxel_size_mm, voxel_size_mm, strict=True
    ):
        room = 0
        if round(n * old / new) != n:
            room = max(0, ROOM_VOXELS - (side.start + n - side.stop))
            while abs((whole := (n + room) * old / new) / max(2, round(whole)) - 1) > MOST_OFF:
                room += 1
        rooms.append((0, room))
    if not any(after for _, after in rooms):
        return scan
    mask = np.pad(scan.mask, rooms)
    x, y, z = mask.shape
    measured = np.pad(scan.measured, [(0, 0), *rooms])
    return replace(scan, measured=measured, mask=mask, geometry=replace(grid, shape=(x, y, z)))


def without_room(chi_ppm: Volume, shape: Shape) -> Volume:
    """Return the part of a map that is not room."""
    x, y, z = shape
    return chi_ppm[:x, :y, :z]


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
        measured = [
            np.arctan2(_fourier(np.sin(m), finer.shape), _fourier(np.cos(m), finer.shape))
            for m in scan.measured
        ]
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
    return _fourier(chi_ppm, (x, y, z)) * mask


def _fourier(volume: Volume, shape: Shape) -> Volume:
    """Return a volume whose spectrum is cut or filled with zeros along each axis."""
    for axis, (before, after) in enumerate(zip(volume.shape, shape, strict=True)):
        if before == after:
            continue
        spectrum = np.moveaxis(rfft(volume, axis=axis, workers=workers()), axis, 0)
        shared = min(before, after)
        kept = spectrum[: shared // 2 + 1]
        if shared % 2 == 0:  # the bin at Nyquist's frequency stands for two on the finer grid
            kept[-1] *= 0.5 if after > before else 2
        finer = irfft(kept, after, axis=0, workers=workers()) * np.float32(after / before)
        volume = np.moveaxis(finer, 0, axis)
    return np.ascontiguousarray(volume, dtype=np.float32)


def _resample_mask(mask: NDArray[np.bool_], shape: Shape) -> NDArray[np.bool_]:
    """Return the voxels whose centres lie more inside than outside."""
    steps = [n / m for n, m in zip(mask.shape, shape, strict=True)]
    share = affine_transform(
        mask.astype(np.float32), steps, output_shape=shape, order=1, mode="nearest"
    )
    inside: NDArray[np.bool_] = share > 0.5
    return inside
