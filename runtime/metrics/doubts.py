"""What of a finished map is doubtful: turned over, beyond any tissue, or of one value."""

import math

import numpy as np

from qsm_deploy.kernels.geometry import Geometry, Mask, Volume

BRAIN_ML = 300.0  # less need not hold what is told by
TAIL_PERCENT = 0.5
TURNED = 0.7  # highest over lowest values: 1.8 to 2.4 in brains, of patients with a haemorrhage too
MOST_PPM = 32.767  # no tissue has as much; the most of int16 in whole ppb


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


def doubt_of_values(chi_ppm: Volume, mask: Mask, fields: Volume) -> list[str]:
    """Return notes on a map beyond any tissue's, or the same everywhere where its field is not.

    Parameters
    ----------
    chi_ppm
        (x, y, z) susceptibility.
    mask
        (x, y, z) bool.
    fields
        (n, x, y, z) what it was made of.
    """
    low, high = _ends(chi_ppm, mask)
    notes = []
    if max(high, -low) > MOST_PPM:
        notes.append(
            f"the map goes from {low:.3g} to {high:.3g} ppm, no tissue has as much: look at it, "
            "and at the units of the field"
        )
    if low == high and any(np.ptp(_ends(field, mask)) > 0 for field in fields):
        notes.append(
            f"the map is {low:.3g} ppm everywhere inside the mask, although the field is not the "
            "same everywhere: look at what made it"
        )
    return notes


def _ends(volume: Volume, mask: Mask) -> tuple[float, float]:
    low = volume.min(where=mask, initial=np.inf)  # a copy of what is inside takes memory
    return float(low), float(volume.max(where=mask, initial=-np.inf))
