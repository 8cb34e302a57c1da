"""The shapes that an engine is checked at, and those that a plan serves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.kernels.geometry import Shape, shape_text
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.gpu.building.profile import Profile, profile_from
from qsm_deploy.runtime.reconstruction.patches import PatchPlan

# a patch, a box of a head, and a head that is large enough to have all its nuclei
DEFAULT_SHAPES = ((32, 32, 32), (64, 64, 64), (96, 112, 96))
ANOTHER_PLAN = "or build another plan with qsm-export --shapes"


@dataclass(frozen=True)
class Shapes:
    """Smallest, typical and largest shape to check, and what a plan was built for.

    An ONNX file serves every shape: ``served`` is ``None``.
    """

    checked: tuple[Shape, Shape, Shape]
    served: Profile | None

    def refusal(self, plan: PatchPlan) -> EngineError | None:
        """Return why the engine cannot run a plan of patches, ``None`` where it can."""
        if self.served is None or _within(self.served, plan.patch_shape):
            return None
        kind = "a volume" if plan.whole else "patches"
        return EngineError(
            f"the plan does not serve {kind} of {shape_text(plan.patch_shape)}: it was built for "
            f"{self.served}; pass --patch with a size within these, {ANOTHER_PLAN}"
        )


def shapes_for(card: ModelCard, text: str | None) -> Shapes:
    """Return what ``--shapes`` asks for, a plan's own shapes, or those that suit a CPU.

    Raises
    ------
    UsageError
        If they are no three shapes that grow and that the divisor divides.
    EngineError
        If a plan does not serve one.
    """
    patchable = card.patchable != "no"
    built_for = card.options.get("shapes") if "engine" in card.options else None
    served = profile_from(built_for, card.divisor, patchable=patchable) if built_for else None
    if text is not None:
        checked = profile_from(text, card.divisor, patchable=patchable).shapes
    elif served is not None:
        checked = served.shapes
    else:
        small, typical, large = (_multiples(shape, card.divisor) for shape in DEFAULT_SHAPES)
        checked = (small, typical, large)
    for shape in checked:
        if served is not None and not _within(served, shape):
            raise EngineError(
                f"the plan does not serve {shape_text(shape)}: it was built for {served}; pass "
                f"--shapes within these, {ANOTHER_PLAN}"
            )
    return Shapes(checked, served)


def _within(profile: Profile, shape: Sequence[int]) -> bool:
    smallest, _, largest = profile.shapes
    return all(a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True))


def _multiples(shape: Shape, divisor: int) -> Shape:
    x, y, z = (divisor * math.ceil(n / divisor) for n in shape)
    return x, y, z
