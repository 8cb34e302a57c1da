"""Whole volume when it fits the memory, otherwise the largest patches that do."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from qsm_deploy.kernels.errors import CardError, MemoryLimitError, UnservedShapeError, UsageError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.reconstruction.patches import Blend, PatchPlan, plan_patches, plan_whole
from qsm_deploy.runtime.scan.scan import Scan

PatchSize = int | Literal["auto", "off"]


@dataclass(frozen=True)
class PatchOptions:
    """What the user wants of the patches; ``None`` leaves the choice to the network's card."""

    patch: PatchSize = "auto"
    overlap: int | None = None
    blend: Blend | None = None


@dataclass(frozen=True)
class Decision:
    """A patch plan, the reason for it, and the peak memory predicted for each stage [bytes].

    ``exact`` tells whether the plan gives the whole-volume result by construction.
    """

    plan: PatchPlan
    reason: str
    exact: bool
    stage_bytes: Mapping[str, float]

    @property
    def peak_bytes(self) -> float:
        """The predicted peak of the whole run."""
        return max(self.stage_bytes.values(), default=0)

    def facts(self) -> dict[str, Any]:
        """Return how a volume is run, and what that was predicted to take, for the report."""
        plan = self.plan
        return {
            "whole_volume": plan.whole,
            "why": self.reason,
            "exact": self.exact,
            "padded_shape": [axis.padded for axis in plan.axes],
            "patches": plan.count,
            "patch_shape": list(plan.patch_shape),
            "overlap": plan.overlap,
            "blend": None if plan.whole else plan.blend,
            "predicted_peak_bytes": round(self.peak_bytes),
            "predicted_stage_bytes": {k: round(v) for k, v in self.stage_bytes.items()},
        }


class Demand(Protocol):
    """What decides how a volume is run: the network, the mask, and the memory that a plan takes."""

    @property
    def scan(self) -> Scan:
        """The acquisition."""

    @property
    def card(self) -> ModelCard:
        """The network's."""

    def peak_bytes(self, plan: PatchPlan) -> Mapping[str, float]:
        """Return the memory of every stage [bytes]."""


def decide(workload: Demand, options: PatchOptions, limit_bytes: float) -> Decision:
    """Return how to run a volume within a memory limit.

    Raises
    ------
    MemoryLimitError
        If it does not fit, not even in patches.
    UsageError
        If the patch options contradict each other or the network.
    UnservedShapeError
        If the engine was built for no shape that would do.
    """
    card = workload.card
    if card.tiles is not None:
        chosen = _in_tiles(workload, options)
    elif options.patch == "off" or (options.patch == "auto" and card.patchable == "no"):
        if (options.overlap, options.blend) != (None, None):
            raise UsageError("--overlap and --blend need patches; drop them or pass --patch N")
        why = "asked for" if options.patch == "off" else f"{card.why_whole}"
        chosen = _whole(workload, why)
    elif options.patch == "auto":
        chosen = _whole_or_patches(workload, options, limit_bytes)
    elif card.patchable == "no":
        raise UsageError(
            f"{card.network} cannot be run in patches: {card.why_whole}; pass --patch off"
        )
    else:
        chosen = _in_patches(workload, options, options.patch, "asked for")
    if chosen.peak_bytes > limit_bytes:
        raise MemoryLimitError(_too_much(chosen, limit_bytes, asked=options.patch != "auto"))
    return chosen


def as_told(workload: Demand, plan: PatchPlan) -> Decision:
    """Return what somebody else decided on, with the memory it takes here, if that is known."""
    needed: Mapping[str, float] = {}
    with suppress(CardError):  # a network that was not measured yet
        needed = workload.peak_bytes(plan)
    return Decision(plan, "as told", _is_exact(workload.card, plan), needed)


def patches_text(card: ModelCard, plan: PatchPlan) -> str:
    """Return in one line how patches fall short of the whole volume."""
    field = card.receptive_field
    return (
        f"patches approximate the whole volume: they share {plan.overlap} voxels, the network "
        f"sees {field.theoretical} to each side ({field.halo} for {field.energy_kept:.4%} of the "
        "gradient's energy)"
    )


def overlap_and_blend(card: ModelCard, options: PatchOptions, patch: int) -> tuple[int, Blend]:
    """Return overlap [voxels] and blend of patches of a size, chosen by how far the network sees.

    Patches give the whole-volume result when each voxel is taken from the patch that it lies
    deepest in and neighbours share twice the receptive field. Sharing twice the measured halo
    comes close. Neither takes more than half of the patch; else half of it overlaps and fades.
    """
    theoretical, halo = receptive_field(card)
    affordable = [2 * n for n in (theoretical, halo) if 4 * n <= patch]
    overlap = options.overlap
    if overlap is None:
        overlap = affordable[0] if affordable else min(patch - card.divisor, patch // 2)
    return overlap, options.blend or ("crop" if overlap >= 2 * halo else "hann")


def receptive_field(card: ModelCard) -> tuple[int, int]:
    """Return the theoretical receptive field and the halo of a network that can be patched.

    Raises
    ------
    CardError
        If its card knows none.
    """
    field = card.receptive_field
    if field.theoretical is None or field.halo is None:
        raise CardError(f"{card.network} sees the whole volume: {card.why_whole}")
    return field.theoretical, field.halo


def smallest_patch(card: ModelCard) -> int:
    """Return the smallest edge that is worth running: more than the halo, at least four cells."""
    least = max(4 * card.divisor, receptive_field(card)[1] + card.divisor)
    return card.divisor * math.ceil(least / card.divisor)


def _in_tiles(workload: Demand, options: PatchOptions) -> Decision:
    from qsm_deploy.runtime.reconstruction.tiles import plan_for

    card = workload.card
    if options != PatchOptions():
        raise UsageError(
            f"{card.network} has tiles of its own; drop --patch, --overlap and --blend"
        )
    plan = plan_for(card, workload.scan.mask.shape)
    return Decision(plan, f"{card.why_whole}", True, workload.peak_bytes(plan))


def _whole(workload: Demand, reason: str) -> Decision:
    plan = plan_whole(workload.scan.mask.shape, workload.card.divisor, workload.card.pad_front)
    return Decision(plan, reason, True, workload.peak_bytes(plan))


def _whole_or_patches(workload: Demand, options: PatchOptions, limit_bytes: float) -> Decision:
    """Return the whole volume if it fits, else the best patches, of what the engine serves.

    Raises
    ------
    UnservedShapeError
        If it serves none of them.
    """
    candidates: list[Decision] = []
    try:
        whole = _whole(workload, "it fits the memory")
    except UnservedShapeError as error:
        unserved: UnservedShapeError | None = error
        reason = str(error)
    else:
        if whole.peak_bytes <= limit_bytes:
            return whole
        unserved = None
        needed = memory_text(whole.peak_bytes)
        reason = f"the whole volume would need {needed}, more than {memory_text(limit_bytes)}"
        candidates.append(whole)  # none is smaller than some volumes
    card, longest = workload.card, max(workload.scan.mask.shape)
    for size in range(smallest_patch(card), longest + card.divisor, card.divisor):
        with suppress(UnservedShapeError):
            candidates.append(_in_patches(workload, options, size, reason))
    if not candidates:
        assert unserved is not None  # the whole volume would be a candidate
        raise unserved
    return _best(candidates, limit_bytes)


def _in_patches(workload: Demand, options: PatchOptions, size: int, reason: str) -> Decision:
    card = workload.card
    overlap, blend = overlap_and_blend(card, options, size)
    plan = plan_patches(workload.scan.mask, card.divisor, size, overlap, blend, card.pad_front)
    return Decision(plan, reason, _is_exact(card, plan), workload.peak_bytes(plan))


def _is_exact(card: ModelCard, plan: PatchPlan) -> bool:
    """Tell whether patches give the whole-volume result by construction."""
    if plan.whole or plan.count == 1:
        return True
    return plan.blend == "crop" and plan.overlap >= 2 * receptive_field(card)[0]


def _best(decisions: list[Decision], limit_bytes: float) -> Decision:
    """Return the one that computes least of those that fit, an exact one first; else the smallest.

    The largest patches that fit are not the fastest: eight that overlap by almost all of the
    volume compute it almost eight times.
    """
    fitting = [d for d in decisions if d.peak_bytes <= limit_bytes]
    if not fitting:
        return min(decisions, key=lambda d: d.peak_bytes)

    def cost(decision: Decision) -> tuple[bool, bool, int]:
        plan = decision.plan
        return not decision.exact, plan.blend != "crop", plan.count * math.prod(plan.patch_shape)

    return min(fitting, key=cost)


def _too_much(decision: Decision, limit_bytes: float, *, asked: bool) -> str:
    stage, most = max(decision.stage_bytes.items(), key=lambda item: item[1])
    plan = decision.plan
    how = "the whole volume" if plan.whole else f"patches of {max(plan.patch_shape)}"
    ways = {
        "inference": "pass --patch auto or smaller patches" if asked else "",
        "field residual": "drop --report and --json",
        "metrics": "drop --truth",
        "figure": "drop --figure",
    }
    way = ways.get(stage, "")
    return (
        f"{'' if asked or plan.whole else 'even '}{how} would need {memory_text(most)} in the "
        f"stage {stage}, the limit is {memory_text(limit_bytes)}; "
        f"{way + ', ' if way else ''}raise --memory-limit or free memory"
    )
