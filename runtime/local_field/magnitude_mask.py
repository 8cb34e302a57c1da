"""Where there is signal: the last resort, for those who give no brain mask.

It keeps everything that gives signal, scalp and neck too, half of it outside the brain.
"""

import numpy as np
from scipy.ndimage import binary_opening, gaussian_filter

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.local_field.quality_mask import largest_part

BINS = 256
SMOOTHING_VOXELS = 1.0
DARK_SHARE = 0.35  # of the bright class's mean; a darker class brighter than this is tissue


def mask_from_magnitude(magnitude: Volume) -> Mask:
    """Return the largest connected part of the volume that gives signal, without holes.

    The threshold is Otsu's. Where the darker class is not much darker there is no background,
    and all of the volume is in the mask.

    Parameters
    ----------
    magnitude
        (n, x, y, z) signal of each echo, not negative.

    Returns
    -------
    (x, y, z) bool array
        True where there is signal.

    Raises
    ------
    DataError
        If the magnitude is constant or not finite, or nothing is left.

    References
    ----------
    Otsu, IEEE Trans Syst Man Cybern 9:62-66 (1979).
    """
    signal = gaussian_filter(magnitude.sum(axis=0), SMOOTHING_VOXELS)
    if not np.isfinite(signal).all() or signal.min() == signal.max():
        raise DataError("the magnitude is constant or not finite; give a brain mask")
    bright = signal > otsu_threshold(signal)
    if signal[~bright].mean() > DARK_SHARE * signal[bright].mean():
        return np.ones(signal.shape, dtype=bool)
    opened = binary_opening(bright)
    if not opened.any():
        raise DataError("the magnitude gives no mask; give a brain mask")
    return largest_part(opened)


def otsu_threshold(values: Volume) -> float:
    """Return the value that separates a histogram into two classes with the least variance."""
    counts, edges = np.histogram(values, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(float)
    above = counts.sum() - below
    sum_below = np.cumsum(counts * centres)[:-1]
    sum_above = (counts * centres).sum() - sum_below
    # the first bin holds the minimum and the last the maximum, so neither class is empty
    between = below * above * (sum_below / below - sum_above / above) ** 2
    return float(edges[1 + int(np.argmax(between))])
