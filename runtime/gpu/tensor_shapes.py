"""The sizes that the letters in a card's shapes stand for, given the inputs' shapes."""

from collections.abc import Mapping

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.runtime.card.card import ModelCard


def bound_sizes(card: ModelCard, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the size of every free axis, by its letter.

    Raises
    ------
    EngineError
        If an input is missing or too many, the sizes contradict each other or the card, or one is
        no multiple of the divisor.
    """
    stated = {tensor.name: tensor.shape for tensor in card.inputs}
    if shapes.keys() != stated.keys():
        raise EngineError(
            f"{card.network} takes {', '.join(stated)}, got shapes of {', '.join(shapes)}"
        )
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        given = shape_text(shape)
        expected = shape_text(stated[name])
        if len(shape) != len(stated[name]) or min(shape) < 1:
            raise EngineError(f"{name} is {given}, {card.network} takes {expected}")
        for axis, size in zip(stated[name], shape, strict=True):
            if size != (sizes.setdefault(axis, size) if isinstance(axis, str) else axis):
                raise EngineError(f"{name} is {given}, {card.network} takes {expected}")
    if wrong := [f"{k}={sizes[k]}" for k in "xyz" if sizes.get(k, 0) % card.divisor]:
        raise EngineError(
            f"{card.network} takes sizes that are multiples of {card.divisor}, got {wrong[0]}"
        )
    return sizes


def bound_shape(card: ModelCard, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the output's shape for inputs of these shapes.

    Raises
    ------
    EngineError
        As :func:`bound_sizes`.
    """
    sizes = bound_sizes(card, shapes)
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in card.output.shape)
