"""Widths and depths of a network, read off the shapes and names of its weights."""

from collections.abc import Collection, Mapping
from itertools import count

from torch import Tensor

from qsm_deploy.kernels.errors import WeightsError


def channels_of(state: Mapping[str, Tensor], key: str, axis: int = 0) -> int:
    """Return the length of one axis of a kernel or a bias.

    Raises
    ------
    WeightsError
        If it has no such axis, or is empty.
    """
    shape = tuple(state[key].shape)
    if len(shape) <= axis or 0 in shape:
        raise WeightsError(
            f"{key} has shape {shape} in the weights, which is that of no such layer; "
            "pass the file for this network"
        )
    return shape[axis]


def count_parts(state: Collection[str], start_of_key: str, first: int = 0) -> int:
    """Return how many numbers in a row, from ``first`` on, have a key.

    One key of a part is enough, so that the lack of another one is not taken for a smaller
    network.

    Parameters
    ----------
    state
        The keys.
    start_of_key
        What the keys of a part start with, ``{}`` in the place of its number.
    first
        The lowest number.
    """

    def is_there(number: int) -> bool:
        return any(key.startswith(start_of_key.format(number)) for key in state)

    return next(n for n in count() if not is_there(first + n))
