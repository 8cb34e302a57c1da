"""Whole volume when it fits the memory, otherwise the largest patches that do."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qsm_deploy.kernels.errors import MemoryLimitError, UsageError
from qsm_deploy.runtime.card import ModelCard
from qsm_deploy.runtime.memory import Workload
from qsm_deploy.runtime.patches import Blend, PatchPlan, plan_patches, plan_whole

PatchSize = int | Literal["auto", "off"]


@dataclass(frozen=True)
class PatchOptions:
    """What the user wants of the patches; ``None`` leaves the choice to the network's card."""

    patch: PatchSize = "auto"
    overlap: int | None = None
    blend: Blend | None = None


@dataclass(frozen=True)
class Decision:
    """A patch plan, the reason for it, and the peak memory predicted for each stage [bytes]."""

    plan: PatchPlan
    reason: str
    stage_bytes: dict[str, float]

    @property
    def peak_bytes(self) -> float:
        """The predicted peak of the whole run."""
        return max(self.stage_bytes.values())


def decide(workload: Workload, options: PatchOptions, limit_bytes: float) -> Decision:
    """Return how to run a volume within a memory limit.

    Raises
    ------
    MemoryLimitError
        If it does not fit, not even in the smallest patches.
    UsageError
        If the patch options contradict each other or the network.
    """
    card, mask = workload.card, workload.scan.mask

    def decision(plan: PatchPlan, reason: str) -> Decision:
        return Decision(plan, reason, workload.peak_bytes(plan))

    def in_patches(size: int) -> PatchPlan:
        overlap, blend = overlap_and_blend(card, options, size)
        return plan_patches(mask, card.divisor, size, overlap, blend)

    if options.patch == "off" or (options.patch == "auto" and card.patchable == "no"):
        if (options.overlap, options.blend) != (None, None):
            raise UsageError("--overlap and --blend need patches; drop them or pass --patch N")
        why = "asked for" if options.patch == "off" else "this network cannot be run in patches"
        chosen = decision(plan_whole(mask.shape, card.divisor), why)
    elif options.patch == "auto":
        chosen = decision(plan_whole(mask.shape, card.divisor), "it fits the memory")
        if chosen.peak_bytes > limit_bytes:
            needed = gib(chosen.peak_bytes)
            reason = f"the whole volume would need {needed}, more than {gib(limit_bytes)}"
            chosen = _largest_that_fits(workload, limit_bytes, reason, decision, in_patches)
    elif card.patchable == "no":
        raise UsageError(f"{card.network} cannot be run in patches; pass --patch off")
    else:
        chosen = decision(in_patches(options.patch), "asked for")
    if chosen.peak_bytes > limit_bytes:
        stage, most = max(chosen.stage_bytes.items(), key=lambda item: item[1])
        raise MemoryLimitError(
            f"this run needs {gib(most)} in its {stage} stage, the limit is {gib(limit_bytes)}; "
            "raise --memory-limit, free memory"
            + (", or drop --report" if stage == "field residual" else ", or use smaller patches")
        )
    return chosen


def overlap_and_blend(card: ModelCard, options: PatchOptions, patch: int) -> tuple[int, Blend]:
    """Return overlap [voxels] and blend of patches of a size, chosen by the network's halo.

    An overlap of twice the halo gives the whole-volume result when each voxel is taken from the
    patch that it lies deepest in. Where that would leave too little of the patch, half of it
    overlaps and fades.
    """
    exact = 2 * card.receptive_field.halo
    largest = max(0, patch - card.divisor)
    overlap = options.overlap
    if overlap is None:
        overlap = exact if exact <= patch // 2 else min(largest, patch // 2)
    return overlap, options.blend or ("crop" if overlap >= exact else "hann")


def gib(size: float) -> str:
    """Return a number of bytes as people read it."""
    return f"{size / 2**30:.2f} GiB"


def _largest_that_fits(
    workload: Workload,
    limit_bytes: float,
    reason: str,
    decision: Callable[[PatchPlan, str], Decision],
    in_patches: Callable[[int], PatchPlan],
) -> Decision:
    divisor = workload.card.divisor
    longest = divisor * math.ceil(max(workload.scan.mask.shape) / divisor)
    sizes = range(longest, smallest_patch(workload.card) - 1, -divisor)
    for size in sizes:
        chosen = decision(in_patches(size), reason)
        if chosen.peak_bytes <= limit_bytes:
            break
    return chosen


def smallest_patch(card: ModelCard) -> int:
    """Return the smallest edge that is worth running: more than the halo, at least four cells."""
    least = max(4 * card.divisor, card.receptive_field.halo + card.divisor)
    return card.divisor * math.ceil(least / card.divisor)
