"""What networks share that part susceptibility into paramagnetic and diamagnetic sources.

They take three maps, each normalised by mean and standard deviation of the training data and 0
outside the mask, and give two magnitudes, normalised likewise.
"""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from qsm_deploy.export.checkpoints.normalisation import number_from
from qsm_deploy.export.networks.network import (
    CHI,
    CHI_NEGATIVE,
    CHI_POSITIVE,
    LOCAL_FIELD,
    MASK,
    R2_PRIME,
)

INPUTS = (LOCAL_FIELD, CHI, R2_PRIME, MASK)
OUTPUT, FURTHER_OUTPUTS = CHI_POSITIVE, (CHI_NEGATIVE,)
Numbers = Mapping[str, float]


def z_score(x: Tensor, mask: Tensor, numbers: Numbers, name: str) -> Tensor:
    """Return a map without its mean, over its standard deviation, 0 outside the mask."""
    return (x - numbers[f"{name}_mean"]) / numbers[f"{name}_std"] * mask


def undo_z_score(y: Tensor, numbers: Numbers, name: str) -> Tensor:
    """Return a map with the mean and the standard deviation of that name."""
    return y * numbers[f"{name}_std"] + numbers[f"{name}_mean"]


def statistics(
    given: Mapping[str, NDArray[Any]], names: Mapping[str, str], file: str
) -> dict[str, float]:
    """Return mean and standard deviation of every map, under our names.

    Parameters
    ----------
    given
        The authors' numbers.
    names
        What they call those of each map, with ``{}`` for ``mean`` or ``std``.
    file
        The file that they are in, for the message.

    Raises
    ------
    WeightsError
        If one is missing or no number.
    """
    return {
        f"{own}_{what}": number_from(given, theirs.format(what), file, positive=what == "std")
        for own, theirs in names.items()
        for what in ("mean", "std")
    }
