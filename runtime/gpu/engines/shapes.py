"""Which shapes an engine takes, and what to say of others.

A card says how sizes hang together, with letters for those that are free; a plan serves a range.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qsm_deploy.kernels.errors import EngineError, UnservedShapeError
from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.gpu.engines.inference import Shapes
from qsm_deploy.runtime.gpu.engines.plan_target import rebuild_command

Limits = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class ServedShapes:
    """The smallest and the largest shape of every input of a plan."""

    path: Path
    card: ModelCard
    limits: Limits

    def require(self, shapes: Shapes) -> None:
        """Refuse shapes that the plan was not built for.

        Raises
        ------
        UnservedShapeError
            Names the shape, what is served, and how to build a plan for it.
        EngineError
            If they are not of this network at all.
        """
        if shapes.keys() != self.limits.keys():
            raise EngineError(
                f"{self.path} takes {', '.join(self.limits)}, got shapes of {', '.join(shapes)}"
            )
        for name, shape in shapes.items():
            smallest, largest = self.limits[name]
            if len(shape) != len(smallest):
                raise EngineError(
                    f"{self.path}: {name} has {len(smallest)} axes, got {shape_text(shape)}"
                )
            if not _within(smallest, shape, largest):
                profile, way_out = self._way_out(shape, smallest, largest)
                raise UnservedShapeError(
                    f"{self.path}: {name} of {shape_text(shape)} is not served, only "
                    f"{shape_text(smallest)} to {shape_text(largest)}; {way_out}",
                    profile,
                )

    def _way_out(
        self, shape: tuple[int, ...], smallest: tuple[int, ...], largest: tuple[int, ...]
    ) -> tuple[str | None, str]:
        """Return MIN,OPT,MAX of an engine that serves a shape, if one could, and what to do."""
        if _within(smallest[2:], shape[2:], largest[2:]):
            return None, f"give it {smallest[:2]} to {largest[:2]} volumes and channels at once"
        divisor, network = self.card.divisor, self.card.network
        if any(n % divisor for n in shape[2:]):
            return None, f"no plan of {network} could: its sizes are multiples of {divisor}"
        low = tuple(map(min, smallest[2:], shape[2:]))
        high = tuple(map(max, largest[2:], shape[2:]))
        built = self.card.options.get("shapes", "").split(",")
        typical = built[1] if len(built) == 3 else shape_text(low)
        wanted = ",".join((shape_text(low), typical, shape_text(high)))
        command = rebuild_command(self.card, self.path.name, {"shapes": wanted})
        return wanted, f"rebuild it with: {command}"


def bound_sizes(card: ModelCard, shapes: Shapes) -> dict[str, int]:
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
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        given, expected = sizes(shape), sizes(stated[name])
        if len(shape) != len(stated[name]) or min(shape) < 1:
            raise EngineError(f"{name} is {given}, {card.network} takes {expected}")
        for axis, size in zip(stated[name], shape, strict=True):
            if size != (found.setdefault(axis, size) if isinstance(axis, str) else axis):
                raise EngineError(f"{name} is {given}, {card.network} takes {expected}")
    if wrong := [f"{k}={found[k]}" for k in "xyz" if found.get(k, 0) % card.divisor]:
        raise EngineError(
            f"{card.network} takes sizes that are multiples of {card.divisor}, got {wrong[0]}"
        )
    return found


def bound_shape(card: ModelCard, shapes: Shapes) -> tuple[int, ...]:
    """Return the output's shape for inputs of these shapes.

    Raises
    ------
    EngineError
        As :func:`bound_sizes`.
    """
    found = bound_sizes(card, shapes)
    return tuple(found[axis] if isinstance(axis, str) else axis for axis in card.output.shape)


def sizes(shape: Iterable[int | str]) -> str:
    """Return a shape as people write it."""
    return "x".join(map(str, shape))


def _within(low: tuple[int, ...], shape: tuple[int, ...], high: tuple[int, ...]) -> bool:
    return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
