"""Accuracy of a susceptibility map by anatomical region, for volumes that come with labels.

Labels are those of the 2019 reconstruction challenge: 1-6 the deep grey nuclei, 7-9 thalamus,
white and grey matter, 11 blood, 16 calcification. Only voxels of the mask count.

References
----------
QSM Challenge 2.0 Organization Committee, Magn Reson Med 86:1241-1255 (2021).
QSM-CI, https://github.com/QSMxT/QSM-CI, ``eval/qsm_eval.py``: the choices the paper leaves open.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.scan.agreement import Samples, detrended_nrmse_percent, linear_fit, varies

Labels = NDArray[np.integer]

DEEP_GREY = (1, 2, 3, 4, 5, 6)
TISSUE = (7, 8, 9)
BLOOD = 11
CALCIFICATION = 16

CUBE_MARGIN = 3  # voxels around the calcification in which it is looked for
RIM = 4  # voxels around that cube in which streaks are measured
SURROUNDINGS = 8  # voxels around that cube that set the calcification's threshold
THRESHOLD_STEP_PPM = 0.01


def regional_metrics(
    chi_ppm: Volume, truth_ppm: Volume, mask: Mask, labels: Labels
) -> dict[str, float]:
    """Return the metrics of every region that is present and varies in the truth.

    Parameters
    ----------
    chi_ppm, truth_ppm
        (x, y, z) reconstruction and truth [ppm], finite in the mask.
    mask
        (x, y, z) bool, True inside.
    labels
        (x, y, z) integer segmentation, 0 elsewhere.

    Returns
    -------
    dict
        ``nrmse_{tissue,deep_grey,blood}_detrended_percent``, blood grown by one voxel;
        ``dgm_linearity``, ``calc_moment_ppm_voxels``, ``calc_streak``.

    Raises
    ------
    GeometryError
        If the labels lie on another grid.
    """
    if labels.shape != mask.shape:
        raise GeometryError(
            f"the labels have shape {labels.shape}, expected the mask's {mask.shape}; "
            "resample them to its grid"
        )
    labels = np.where(mask, labels, 0)
    regions = {
        "tissue": np.isin(labels, TISSUE),
        "deep_grey": np.isin(labels, DEEP_GREY),
        "blood": binary_dilation(labels == BLOOD, np.ones((3, 3, 3), dtype=bool)) & mask,
    }
    metrics: dict[str, float] = {}
    for name, region in regions.items():
        r, t = _samples(chi_ppm, region), _samples(truth_ppm, region)
        if varies(t):
            metrics[f"nrmse_{name}_detrended_percent"] = detrended_nrmse_percent(r, t)
    slope = dgm_slope(chi_ppm, truth_ppm, labels)
    if slope is not None:
        metrics["dgm_linearity"] = abs(1 - slope)
    if np.any(labels == CALCIFICATION):
        metrics |= _calcification_metrics(chi_ppm, truth_ppm, mask, labels == CALCIFICATION)
    return metrics


def dgm_slope(chi_ppm: Volume, truth_ppm: Volume, labels: Labels) -> float | None:
    """Return the slope of the nuclei's mean susceptibilities against the true ones.

    Labels count wherever they are, so those outside the mask must be 0. Fewer than two nuclei,
    or nuclei that are equal in the truth, have no slope.
    """
    nuclei = [labels == label for label in DEEP_GREY if np.any(labels == label)]
    r = np.array([_samples(chi_ppm, nucleus).mean() for nucleus in nuclei])
    t = np.array([_samples(truth_ppm, nucleus).mean() for nucleus in nuclei])
    return linear_fit(t, r)[0] if varies(t) else None


def _calcification_metrics(
    chi_ppm: Volume, truth_ppm: Volume, mask: Mask, calcification: Mask
) -> dict[str, float]:
    """Return what the map misses of the calcification's moment, and how much it streaks.

    The calcification of the map is where a cube around the true one is below a threshold that
    nothing near the cube falls below. A map that shows none misses the whole moment, and has no
    ``calc_streak``, which is relative to its mean.
    """
    box = bounding_box(calcification, margin=CUBE_MARGIN + SURROUNDINGS)
    r, t = chi_ppm[box], truth_ppm[box]
    inside, calcification = mask[box], calcification[box]
    cube = _cube(calcification, CUBE_MARGIN)
    rim = _cube(calcification, CUBE_MARGIN + RIM) & ~cube & inside

    lowest_nearby = float(np.min(r, where=~cube & inside, initial=0.0))
    # the tolerance keeps a lowest value of exactly n steps from rounding up to n + 1
    steps = math.ceil(-lowest_nearby / THRESHOLD_STEP_PPM - 1e-9)
    seen = _samples(r, cube & inside & (r < -steps * THRESHOLD_STEP_PPM))

    moment = abs(float(_samples(t, calcification).sum() - seen.sum()))
    metrics = {"calc_moment_ppm_voxels": moment}
    if seen.size and rim.any():
        rim_r, rim_t = _samples(r, rim), _samples(t, rim)
        slope, intercept = linear_fit(rim_t, rim_r)
        residual = rim_r - slope * rim_t - intercept
        metrics["calc_streak"] = float(residual.std() / abs(seen.mean()))
    return metrics


def _cube(region: Mask, margin: int) -> Mask:
    """Return the mask of a region's bounding box grown by ``margin``."""
    cube = np.zeros_like(region)
    cube[bounding_box(region, margin=margin)] = True
    return cube


def _samples(volume: Volume, region: Mask) -> Samples:
    """Return the voxels of a region in double precision."""
    return volume[region].astype(np.float64)
