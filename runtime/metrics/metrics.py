"""Accuracy of a susceptibility map inside a mask: against a truth, or against its own field.

Only voxels of the mask count: filters and the dipole see zeros elsewhere.

References
----------
QSM-CI, https://github.com/QSMxT/QSM-CI, ``eval/qsm_eval.py``: NRMSE and XSIM follow it.
Langkammer et al., Magn Reson Med 79:1661-1673 (2018): HFEN.
Milovic et al., Magn Reson Med (2025), doi 10.1002/mrm.30271: XSIM.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_laplace, uniform_filter

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import DataError, GeometryError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.runtime.metrics.difference import difference_ppb
from qsm_deploy.runtime.metrics.regional_metrics import regional_metrics
from qsm_deploy.runtime.scan.agreement import (
    Samples,
    detrended_nrmse_percent,
    nrmse_percent,
    require_variation,
    varies,
)

XSIM_WINDOW = 5
XSIM_C1, XSIM_C2 = 1e-4, 1e-6  # (K1 L)^2 and (K2 L)^2 with K1 = .01, K2 = .001, L = 1 ppm
HFEN_SIGMA, HFEN_TRUNCATE = 1.5, 5.0  # voxels; the kernel ends after 5 sigma


def all_metrics(
    chi_ppm: Volume, truth_ppm: Volume, mask: Mask, labels: NDArray[np.integer] | None = None
) -> dict[str, float]:
    """Return every metric that the data determine, by a stable name that tells its unit.

    Parameters
    ----------
    chi_ppm, truth_ppm
        (x, y, z) reconstruction and truth [ppm].
    mask
        (x, y, z) bool, True inside.
    labels
        (x, y, z) integer segmentation of the 2019 challenge, for the regional metrics.

    Returns
    -------
    dict
        Finite numbers only: a regional metric whose labels are absent is left out, and so is
        the PSNR of a perfect map.

    Raises
    ------
    DataError
        If the mask is empty, a volume is not finite inside it, or the truth is constant there.
    GeometryError
        If the shapes differ.
    """
    metrics = {
        "nrmse_percent": nrmse(chi_ppm, truth_ppm, mask),
        "nrmse_detrended_percent": nrmse_detrended(chi_ppm, truth_ppm, mask),
        "xsim_uniform5": xsim(chi_ppm, truth_ppm, mask),
        "hfen_percent": hfen(chi_ppm, truth_ppm, mask),
        "psnr_db": psnr(chi_ppm, truth_ppm, mask),
        "correlation": correlation(chi_ppm, truth_ppm, mask),
        "mean_abs_error_ppb": mean_abs_error_ppb(chi_ppm, truth_ppm, mask),
        "p999_abs_error_ppb": p999_abs_error_ppb(chi_ppm, truth_ppm, mask),
    }
    if labels is not None:
        metrics |= regional_metrics(chi_ppm, truth_ppm, mask, labels)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def nrmse(chi_ppm: Volume, truth_ppm: Volume, mask: Mask) -> float:
    """Return the error norm relative to the truth's, both demeaned in the mask [per cent]."""
    return nrmse_percent(*_samples(chi_ppm, truth_ppm, mask))


def nrmse_detrended(chi_ppm: Volume, truth_ppm: Volume, mask: Mask) -> float:
    """Return the NRMSE after a least-squares scale and offset were taken out [per cent]."""
    return detrended_nrmse_percent(*_samples(chi_ppm, truth_ppm, mask))


def correlation(chi_ppm: Volume, truth_ppm: Volume, mask: Mask) -> float:
    """Return Pearson's correlation in the mask, in [-1, 1]; 0 for a constant map."""
    r, t = _samples(chi_ppm, truth_ppm, mask)
    require_variation(t)
    if not varies(r):
        return 0.0
    r, t = r - r.mean(), t - t.mean()
    return float(r @ t / (np.linalg.norm(r) * np.linalg.norm(t)))


def psnr(chi_ppm: Volume, truth_ppm: Volume, mask: Mask) -> float:
    """Return the peak signal-to-noise ratio [dB]; infinite for a perfect map.

    The peak is the range of the truth in the mask.
    """
    r, t = _samples(chi_ppm, truth_ppm, mask)
    require_variation(t)
    rms_error = float(np.sqrt(np.mean((r - t) ** 2)))
    return 20 * math.log10(float(np.ptp(t)) / rms_error) if rms_error > 0 else math.inf


def mean_abs_error_ppb(chi_ppm: Volume, truth_ppm: Volume, mask: Mask) -> float:
    """Return the mean of ``|chi - truth|`` in the mask [ppb]."""
    _samples(chi_ppm, truth_ppm, mask)
    return float(np.abs(difference_ppb(chi_ppm, truth_ppm, mask)).mean())


def p999_abs_error_ppb(chi_ppm: Volume, truth_ppm: Volume, mask: Mask) -> float:
    """Return the 99.9th percentile of ``|chi - truth|`` in the mask [ppb]."""
    _samples(chi_ppm, truth_ppm, mask)
    return float(np.percentile(np.abs(difference_ppb(chi_ppm, truth_ppm, mask)), 99.9))


def xsim(chi_ppm: Volume, truth_ppm: Volume, mask: Mask) -> float:
    """Return the structural similarity tuned for susceptibility maps, at most 1.

    The variant of QSM-CI: mean over the mask, uniform window of 5x5x5 voxels, truncated at the
    border of the grid. A Gaussian window of 7x7x7 is common elsewhere and gives other numbers.
    """
    _samples(chi_ppm, truth_ppm, mask)
    box = bounding_box(mask, margin=XSIM_WINDOW // 2)
    inside = mask[box]
    r, t = (np.where(inside, volume[box], np.float64(0)) for volume in (chi_ppm, truth_ppm))
    share = _window_mean(np.ones(inside.shape))[inside]  # of the window that lies in the grid

    def mean(x: Samples) -> Samples:
        in_mask: Samples = _window_mean(x)[inside] / share
        return in_mask

    mean_r, mean_t = mean(r), mean(t)
    cross, squares = mean(r * t), mean(r * r + t * t)
    product, power = mean_r * mean_t, mean_r**2 + mean_t**2
    similarity = (2 * product + XSIM_C1) * (2 * (cross - product) + XSIM_C2)
    similarity /= (power + XSIM_C1) * (squares - power + XSIM_C2)
    return float(similarity.mean())


def hfen(chi_ppm: Volume, truth_ppm: Volume, mask: Mask) -> float:
    """Return the high-frequency error norm [per cent]: the NRMSE of edges.

    Both maps are masked, then filtered by the Laplacian of a Gaussian (sigma 1.5 voxels); the
    norms are taken in the mask.
    """
    require_variation(_samples(chi_ppm, truth_ppm, mask)[1])
    box = bounding_box(mask)
    inside = mask[box]
    r, t = (np.where(inside, volume[box], np.float32(0)) for volume in (chi_ppm, truth_ppm))

    def edge_norm(volume: Volume) -> float:
        edges = gaussian_laplace(volume, HFEN_SIGMA, mode="constant", truncate=HFEN_TRUNCATE)
        return float(np.linalg.norm(edges[inside].astype(np.float64)))

    return 100 * edge_norm(r - t) / edge_norm(t)


def field_residual(
    chi_ppm: Volume, local_field_ppm: Volume, mask: Mask, geometry: Geometry
) -> float:
    """Return how much of the field a map leaves unexplained, ``||M (D chi - f)|| / ||M f||``.

    Parameters
    ----------
    chi_ppm
        (x, y, z) susceptibility [ppm].
    local_field_ppm
        (x, y, z) field f [ppm].
    mask
        (x, y, z) bool M, True inside.
    geometry
        The grid of both; the dipole D acts on it zero-padded to twice its size.

    Returns
    -------
    float
        0 for a map that explains the field, 1 for an empty map.

    Raises
    ------
    DataError
        If the mask is empty, a volume is not finite inside it, or the field is zero there.
    GeometryError
        If the shapes differ.
    """
    _samples(chi_ppm, local_field_ppm, mask)
    x, y, z = ((n + 1) // 2 for n in geometry.shape)
    chi_ppm = np.where(mask, chi_ppm, np.float32(0))
    predicted = dipole_convolve(chi_ppm, geometry, pad_voxels=(x, y, z))
    predicted_field, field = _samples(predicted, local_field_ppm, mask)
    norm = float(np.linalg.norm(field))
    if norm == 0:
        raise DataError("the field is zero in the whole mask; check the field and the mask")
    return float(np.linalg.norm(predicted_field - field)) / norm


def _window_mean(volume: Samples) -> Samples:
    """Return the mean over the XSIM window, zeros beyond the grid."""
    mean: Samples = uniform_filter(volume, XSIM_WINDOW, mode="constant")
    return mean


def _samples(volume: Volume, reference: Volume, mask: Mask) -> tuple[Samples, Samples]:
    """Return the voxels of the mask in double precision, checked."""
    if not volume.shape == reference.shape == mask.shape:
        raise GeometryError(
            f"shapes differ: {volume.shape} and {reference.shape} in a mask of {mask.shape}; "
            "all must lie on one grid"
        )
    if not mask.any():
        raise DataError("the mask is empty; pass one that is non-zero inside the brain")
    inside = volume[mask].astype(np.float64), reference[mask].astype(np.float64)
    bad = sum(int(np.count_nonzero(~np.isfinite(samples))) for samples in inside)
    if bad:
        raise DataError(f"{bad} values are NaN or Inf inside the mask; mask them out")
    return inside
