"""The shapes that a plan serves, and what to say of others."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qsm_deploy.kernels.errors import EngineError, UnservedShapeError
from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.gpu.inference import Shapes
from qsm_deploy.runtime.gpu.plan_target import rebuild_command

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
                raise UnservedShapeError(
                    f"{self.path}: {name} of {shape_text(shape)} is not served, only "
                    f"{shape_text(smallest)} to {shape_text(largest)}; "
                    f"{self._way_out(shape, smallest, largest)}"
                )

    def _way_out(
        self, shape: tuple[int, ...], smallest: tuple[int, ...], largest: tuple[int, ...]
    ) -> str:
        if _within(smallest[2:], shape[2:], largest[2:]):
            return f"give it {smallest[:2]} to {largest[:2]} volumes and channels at once"
        divisor = self.card.divisor
        if any(n % divisor for n in shape[2:]):
            return f"no plan of {self.card.network} could: its sizes are multiples of {divisor}"
        low = tuple(map(min, smallest[2:], shape[2:]))
        high = tuple(map(max, largest[2:], shape[2:]))
        built = self.card.options.get("shapes", "").split(",")
        typical = built[1] if len(built) == 3 else shape_text(low)
        wanted = ",".join((shape_text(low), typical, shape_text(high)))
        command = rebuild_command(self.card, self.path.name, {"shapes": wanted})
        return f"rebuild it with: {command}"


def _within(low: tuple[int, ...], shape: tuple[int, ...], high: tuple[int, ...]) -> bool:
    return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
