"""The noise of a field, from the field itself, and the weight of edges that goes with it.

Next to the magic cone the dipole lets nothing through: what the spectrum of a field holds there is
noise, or what no dipole explains, which counts the same.
"""

import math
from collections.abc import Sequence

import numpy as np
import scipy.fft

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.dipole import half_dipole_kernel
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.threads import workers

Vector = tuple[float, float, float]
AXES: tuple[Vector, ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
NEAR_CONE = 0.03  # |D| below it
BAND = (0.8, 1.7)  # of the Nyquist frequency of the longest edge: beyond the anatomy
LEAST_SHARE = 0.02  # of the field's deviation, where zero-filled k-space hides the noise
NORMAL_PER_MEDIAN = 1.4826  # deviation of normal noise by its median size
MIDDLE_VOXELS = 64  # a side, which tell B0
EDGES_PER_NOISE = 23.0  # alpha = sigma h / this; chosen on drawn heads and a COSMOS map


def field_noise(field_ppm: Volume, mask: Mask, geometry: Geometry) -> float:
    """Return the standard deviation of the noise of a local field [ppm].

    Parameters
    ----------
    field_ppm
        (x, y, z) local field [ppm].
    mask
        (x, y, z) bool, True where it was measured.
    geometry
        The grid of both.

    Returns
    -------
    float
        At least 2 % of the field's own deviation in the mask; thick slices raise it, by a fifth
        at 0.8x0.8x2 mm, by half at 2x2x5 mm.

    Raises
    ------
    DataError
        If the mask is empty.
    """
    box = bounding_box(mask)
    inside = mask[box]
    count = np.count_nonzero(inside)
    field = np.where(inside, field_ppm[box], np.float32(0))
    field -= inside * np.float32(field.sum(dtype=np.float64) / count)
    deviation = float(np.linalg.norm(field)) / math.sqrt(count)
    x, y, z = field.shape
    cropped = Geometry((x, y, z), geometry.voxel_size_mm, geometry.b0_direction)
    near = np.abs(half_dipole_kernel(cropped)) < NEAR_CONE
    fx, fy, fz = np.ix_(
        *(np.fft.fftfreq(n, h) for n, h in zip(field.shape, geometry.voxel_size_mm, strict=True))
    )
    k = np.sqrt(fx * fx + fy * fy + fz[..., : z // 2 + 1] ** 2, dtype=np.float32)
    nyquist = 0.5 / max(geometry.voxel_size_mm)
    near &= (k > BAND[0] * nyquist) & (k < BAND[1] * nyquist)
    power = np.abs(scipy.fft.rfftn(field, workers=workers())[near]) ** 2
    # |F|^2 of white noise is exponential: its median is ln 2 times its mean
    noise = math.sqrt(float(np.median(power)) / math.log(2) / count) if power.size else 0.0
    return max(noise, LEAST_SHARE * deviation)


def noise_of_most(field_ppm: Volume, mask: Mask, sigma_ppm: float) -> float:
    """Return the noise of most voxels of a local field [ppm], however wrong a few of them are.

    It is told from what is left after a difference along each axis, edges of the anatomy included,
    and is ``sigma_ppm`` at most, which :func:`field_noise` returned.
    """
    box = bounding_box(mask)
    left = np.where(mask[box], field_ppm[box], np.float32(np.nan))
    for axis in range(3):
        left = np.diff(left, axis=axis)
    sizes = np.abs(left[np.isfinite(left)])
    noise = NORMAL_PER_MEDIAN * float(np.median(sizes)) / math.sqrt(8) if sizes.size else 0.0
    return min(noise or sigma_ppm, sigma_ppm)


def b0_contradicted(
    field_ppm: Volume, mask: Mask, geometry: Geometry, others: Sequence[Vector]
) -> Vector | None:
    """Return which of other directions B0 has by a field, if surely not the geometry's.

    Near the magic cone of the right one there is noise only, near that of another the field too.
    The middle of the mask tells. Parameters and errors are those of :func:`field_noise`.
    """
    box = tuple(
        slice(
            max(side.start, (side.start + side.stop - MIDDLE_VOXELS) // 2),
            min(side.stop, (side.start + side.stop + MIDDLE_VOXELS) // 2),
        )
        for side in bounding_box(mask)
    )
    field, inside = field_ppm[box], mask[box]
    if not (count := np.count_nonzero(inside)):
        return None
    x, y, z = field.shape

    def noise(b0_direction: Vector) -> float:
        return field_noise(field, inside, Geometry((x, y, z), geometry.voxel_size_mm, b0_direction))

    least = min(others, key=noise)
    sure = 1 + 25 / math.sqrt(count)  # 1.05 where the middle is full
    return least if noise(geometry.b0_direction) > sure * noise(least) else None


def alpha_of_noise(sigma_ppm: float, geometry: Geometry) -> float:
    """Return the weight of the edges [ppm mm] for a field with that noise [ppm]."""
    return sigma_ppm * math.prod(geometry.voxel_size_mm) ** (1 / 3) / EDGES_PER_NOISE
