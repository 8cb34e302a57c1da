"""Whether the values of a map can be those of a tissue at all."""

import numpy as np

from qsm_deploy.kernels.geometry import Mask, Volume

MOST_PPM = 32.767  # no tissue has as much; the most of int16 in whole ppb


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
