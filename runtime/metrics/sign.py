"""Whether a map looks turned over, as of a phase that falls where the field is higher."""

import math

import numpy as np

from qsm_deploy.kernels.geometry import Geometry, Mask, Volume

BRAIN_ML = 300.0  # less need not hold what is told by
TAIL_PERCENT = 0.5
TURNED = 0.7  # highest over lowest values: 1.8 to 2.4 in brains, of patients with a haemorrhage too


def doubt_of_sign(chi_ppm: Volume, mask: Mask, geometry: Geometry) -> list[str]:
    """Return a note on a brain whose lowest values lie farther from the median than its highest.

    Veins and deep grey matter are the highest of a brain; only calcification is as low.

    Parameters
    ----------
    chi_ppm
        (x, y, z) susceptibility.
    mask
        (x, y, z) bool.
    geometry
        The grid.
    """
    if np.count_nonzero(mask) * math.prod(geometry.voxel_size_mm) < 1000 * BRAIN_ML:
        return []
    low, middle, high = np.percentile(chi_ppm[mask], (TAIL_PERCENT, 50, 100 - TAIL_PERCENT))
    if high - middle >= TURNED * (middle - low):
        return []
    return [
        f"the lowest values lie {1000 * (middle - low):.0f} ppb below the median, the highest "
        f"{1000 * (high - middle):.0f} above; in brains veins and deep grey matter make it the "
        "other way round: if they are dark in this map, the phase has the opposite sign: pass "
        "--negate"
    ]
