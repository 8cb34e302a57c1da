"""The phase at excitation, that of transmit and receive coils, which is smooth.

A Gaussian alone averages on one side only at the edge of a mask and leaves the slope of the phase
times its width there. A polynomial has no such edge, and takes nearly all; Gaussians, ever
narrower, take what it leaves. That is little, but where combining coils left a pole, around which
the phase turns: no polynomial unwinds it, and at its core it is not smooth at all.

References
----------
Eckstein et al., Magn Reson Med 79:2996-3006 (2018), for the phase that all echoes share.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.local_field.unwrapping import unwrap, wrap

ORDER, FITS = 3, 2  # of the polynomial; what is smoothed again is less steep at the mask's edge
TO_UNWRAP_MM, REST_MM, FINER_MM = 4.0, 8.0, (8.0, 4.0)  # standard deviations of Gaussians
ROUGH = 3.0  # is left at a pole: so many times the median
MOST_ELSEWHERE = 0.01  # of a mask has as much left without one, at lesions and bone
LARGE = 40_000  # voxels of a mask of which some tell a polynomial as well as all do
REACH = 2.5  # of the Gaussians, in standard deviations


def initial_phase(
    raw_rad: Volume, magnitude: Volume, mask: Mask, voxel_size_mm: tuple[float, float, float]
) -> Volume:
    """Return the smooth part of a phase.

    Parameters
    ----------
    raw_rad
        (x, y, z) wrapped phase without what grows with time.
    magnitude
        (x, y, z) signal, its weight.
    mask
        (x, y, z) bool, not empty.
    voxel_size_mm
        Edge lengths of a voxel.

    Returns
    -------
    (x, y, z) float32 array
        [rad], everywhere.
    """
    weight = magnitude * mask
    large = np.count_nonzero(mask) > LARGE
    some = tuple(
        slice(None, None, max(1, int(TO_UNWRAP_MM / 2 / v)) if large else 1) for v in voxel_size_mm
    )
    axes = [
        ((np.arange(n) - (n - 1) / 2) * v / 100).astype(np.float32)
        for n, v in zip(mask.shape, voxel_size_mm, strict=True)
    ]
    at = [axis[step] for axis, step in zip(axes, some, strict=True)]
    fit = np.zeros_like(raw_rad)
    for _ in range(FITS):
        smooth = _smooth(raw_rad - fit, weight, voxel_size_mm, TO_UNWRAP_MM)
        unwrapped = unwrap(smooth[some], mask[some], magnitude[some])
        fit += _polynomial(unwrapped, weight[some], mask[some], at, axes)
    fit += _smooth(raw_rad - fit, weight, voxel_size_mm, REST_MM)
    return fit


def followed(
    smooth_rad: Volume,
    raw_rad: Volume,
    magnitude: Volume,
    mask: Mask,
    voxel_size_mm: tuple[float, float, float],
) -> tuple[Volume, Mask]:
    """Return a smooth phase that follows another more closely, and where it cannot.

    Parameters
    ----------
    smooth_rad
        (x, y, z) smooth part of ``raw_rad``; it is changed.
    raw_rad, magnitude, mask, voxel_size_mm
        As for :func:`initial_phase`.

    Returns
    -------
    (x, y, z) float32 array
        [rad], everywhere.
    (x, y, z) bool array
        Where in the mask something is left that is not noise; nowhere, if only here and there.
    """
    weight = magnitude * mask
    for sigma_mm in FINER_MM:
        smooth_rad += _smooth(raw_rad - smooth_rad, weight, voxel_size_mm, sigma_mm)
    left = weight * np.abs(wrap(raw_rad - smooth_rad))  # as noise it is the same everywhere
    sigma = [FINER_MM[-1] / v for v in voxel_size_mm]
    left = gaussian_filter(left, sigma, truncate=REACH)
    left[mask] /= gaussian_filter(mask.astype(np.float32), sigma, truncate=REACH)[mask]
    rough: Mask = mask & (left > ROUGH * float(np.median(left[mask])))
    return smooth_rad, rough & (rough.sum() > MOST_ELSEWHERE * mask.sum())


def _polynomial(
    phase_rad: Volume, weight: Volume, mask: Mask, at: Sequence[Volume], to: Sequence[Volume]
) -> Volume:
    """Return the polynomial that fits a phase best, from one grid on another, given their axes."""
    powers = [p for p in itertools.product(range(ORDER + 1), repeat=3) if sum(p) <= ORDER]
    w = weight[mask]
    x, y, z = (axis[index] for axis, index in zip(at, np.nonzero(mask), strict=True))
    terms: NDArray[np.float32] = np.stack([w * x**i * y**j * z**k for i, j, k in powers], axis=1)
    factors = np.linalg.lstsq(terms, w * phase_rad[mask], rcond=None)[0]
    x, y, z = np.ix_(*to)
    fit = np.zeros([axis.size for axis in to], dtype=np.float32)
    for factor, (i, j, k) in zip(factors, powers, strict=True):
        fit += np.float32(factor) * x**i * y**j * z**k
    return fit


def _smooth(
    phase_rad: Volume, weight: Volume, voxel_size_mm: tuple[float, float, float], sigma_mm: float
) -> Volume:
    """Return a wrapped phase smoothed as the direction of complex numbers."""
    sigma = [sigma_mm / v for v in voxel_size_mm]
    real, imaginary = (
        gaussian_filter(weight * part(phase_rad), sigma, truncate=REACH)
        for part in (np.cos, np.sin)
    )
    angle: Volume = np.arctan2(imaginary, real)
    return angle
