"""Where the brain is, told from the magnitude when nobody says."""

from typing import NamedTuple

from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.local_field.brain_mask import (
    DEEPBET_BYTES,
    EXTRA,
    brain_mask,
    has_deepbet,
)
from qsm_deploy.runtime.local_field.magnitude_mask import mask_from_magnitude


class FoundMask(NamedTuple):
    """A mask, who made it, and what the user should know of it."""

    mask: Mask
    origin: str
    notes: tuple[str, ...] = ()


def finding_bytes(magnitude: Volume) -> dict[str, float]:
    """Return what finding the brain takes besides the (n, x, y, z) magnitude and the phase."""
    return {"finding the brain": has_deepbet() * DEEPBET_BYTES + 2 * magnitude.nbytes}


def find_mask(magnitude: Volume) -> FoundMask:
    """Return the brain if deepbet is there to find it, else all that gives signal.

    Parameters
    ----------
    magnitude
        (n, x, y, z) signal of each echo, in canonical axes.

    Raises
    ------
    DataError
        If there is none: where deepbet finds no brain, its user is to say where it is.
    """
    if has_deepbet():
        found = "the brain that deepbet finds, trained on other images; look at it"
        return FoundMask(brain_mask(magnitude[0]), "of deepbet", (found,))
    signal = (
        "THIS IS NO BRAIN MASK but all that gives signal, scalp, neck and the edges of air too: "
        "the local field is wrong near them, and with it the map. Pass a brain mask with -m, or "
        f"install the extra qsm-deploy[{EXTRA}], which finds the brain"
    )
    return FoundMask(mask_from_magnitude(magnitude), "of the signal, NOT of the brain", (signal,))
