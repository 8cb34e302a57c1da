"""How far one map is from another in the mask, in ppb."""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.runtime.scan.agreement import Samples
from qsm_deploy.runtime.scan.units import PPB_PER_PPM


def difference_ppb(
    chi_ppm: NDArray[np.float32], reference_ppm: NDArray[np.float32], mask: NDArray[np.bool_]
) -> Samples:
    """Return ``chi - reference`` at the voxels of the mask [ppb].

    Parameters
    ----------
    chi_ppm, reference_ppm
        (..., x, y, z) maps [ppm]; where one is not finite, nor is the difference.
    mask
        (x, y, z) bool, True inside.
    """
    difference: Samples = (chi_ppm[..., mask].astype(np.float64) - reference_ppm[..., mask]).ravel()
    return difference * PPB_PER_PPM


def distribution_ppb(difference: Samples) -> dict[str, float]:
    """Return mean, median, 99.9th percentile and largest of its magnitude, and its mean [ppb].

    All but the last are NaN where one value is.
    """
    size = np.abs(difference)
    median, p999 = np.percentile(size, (50, 99.9))
    return {
        "mean_ppb": float(size.mean()),
        "median_ppb": float(median),
        "p999_ppb": float(p999),
        "max_ppb": float(size.max()),
        "bias_ppb": float(difference.mean()),
    }
