"""The phase at excitation, that of transmit and receive coils, which is smooth.

A Gaussian alone averages on one side only at the edge of a mask and leaves the slope of the phase
times its width there. A polynomial has no such edge, and takes nearly all; the Gaussian takes what
it leaves.

References
----------
Eckstein et al., Magn Reson Med 79:2996-3006 (2018), for the phase that all echoes share.
"""

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.local_field.unwrapping import unwrap, wrap

ORDER = 3  # of the polynomial
TO_UNWRAP_MM, REST_MM = 4.0, 8.0  # standard deviations; what varies faster is no coil's
ENOUGH = 40_000  # voxels tell a polynomial as well as all do
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
    smooth = _smooth(raw_rad, weight, voxel_size_mm, TO_UNWRAP_MM)
    polynomial = _polynomial(unwrap(smooth, mask, magnitude), weight, mask, voxel_size_mm)
    polynomial += _smooth(wrap(raw_rad - polynomial), weight, voxel_size_mm, REST_MM)
    return polynomial


def _polynomial(
    phase_rad: Volume, weight: Volume, mask: Mask, voxel_size_mm: tuple[float, float, float]
) -> Volume:
    """Return the polynomial in x, y and z that fits a phase best, on the whole grid."""
    axes = [
        ((np.arange(n) - (n - 1) / 2) * v / 100).astype(np.float32)
        for n, v in zip(mask.shape, voxel_size_mm, strict=True)
    ]
    powers = [p for p in itertools.product(range(ORDER + 1), repeat=3) if sum(p) <= ORDER]
    inside = np.flatnonzero(mask)
    some = inside[:: 1 + inside.size // ENOUGH]
    at = np.unravel_index(some, mask.shape)
    x, y, z = (axis[index] for axis, index in zip(axes, at, strict=True))
    terms: NDArray[np.float32] = np.stack([x**i * y**j * z**k for i, j, k in powers], axis=1)
    w = weight.ravel()[some]
    factors = np.linalg.lstsq(terms * w[:, None], phase_rad.ravel()[some] * w, rcond=None)[0]
    x, y, z = np.ix_(*axes)
    fit = np.zeros(mask.shape, dtype=np.float32)
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
