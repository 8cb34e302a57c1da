"""From the echoes of a gradient echo to a local field, step by step.

Every step is a function of arrays, in canonical axes, and may be replaced.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.background.methods import DEFAULT, REMOVALS
from qsm_deploy.runtime.local_field.background.removal import BackgroundRemoval, Task
from qsm_deploy.runtime.local_field.echoes import Echoes
from qsm_deploy.runtime.local_field.field_mapping import FieldMap, FieldMapping, map_field
from qsm_deploy.runtime.local_field.initial_phase import ORDER, REST_MM
from qsm_deploy.runtime.local_field.masks import FoundMask, find_mask, finding_bytes
from qsm_deploy.runtime.local_field.memory import require_memory, stage_bytes
from qsm_deploy.runtime.local_field.quality_mask import QUALITY, Quality, quality_mask
from qsm_deploy.runtime.local_field.relaxation import r2_star
from qsm_deploy.runtime.scan.axes import STORED, Axes
from qsm_deploy.runtime.scan.wraps import undo_half_turns

EMPTY = "the mask is empty; it must be non-zero inside the brain"
LARGEST_BRAIN_L, SMALLEST_HEAD_L = 2.2, 0.3
LEAST_TOTAL_PPM = 0.02  # standard deviation of the field of all sources in a head, well shimmed
LARGEST_PPM = 0.03  # standard deviation of a head's local field: 0.008 to 0.013 is usual

T = TypeVar("T")
Lines = Generator[str, None, T]  # one when a step is done


@dataclass(frozen=True)
class Steps:
    """How a local field is made.

    Attributes
    ----------
    find_mask
        Where there is brain, of the magnitude of all echoes; for those who give no mask.
    map_field
        The field of the echoes.
    quality
        What is asked of a voxel.
    remove
        Removes what sources outside make.
    """

    find_mask: Callable[[Volume], FoundMask] = find_mask
    map_field: FieldMapping = map_field
    quality: Quality = QUALITY
    remove: BackgroundRemoval = REMOVALS[DEFAULT]


STEPS = Steps()


@dataclass(frozen=True)
class TotalField:
    """The field of all sources, as the echoes tell it.

    Attributes
    ----------
    found
        The field, its noise and its misfit, inside ``brain``.
    brain
        (x, y, z) bool.
    r2_star
        (x, y, z) decay [1/s], if it was asked for.
    facts, notes
        For a report, and for the user.
    """

    found: FieldMap
    brain: Mask
    r2_star: Volume | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LocalField:
    """The field of the sources inside a mask.

    Attributes
    ----------
    field_ppm
        (x, y, z), 0 outside the mask.
    mask
        (x, y, z) bool, what is left of the brain.
    found
        The field of all sources, its noise and its misfit.
    facts, notes
        For a report, and for the user.
    """

    field_ppm: Volume
    mask: Mask
    found: FieldMap
    facts: dict[str, Any]
    notes: list[str]

    def turned(self, axes: Axes) -> "LocalField":
        """Return the field in axes that are made of its own."""
        turn = axes.turn
        found = {
            name: turn(volume)
            for name in ("field_ppm", "noise_ppm", "misfit")
            if (volume := getattr(self.found, name)) is not None
        }
        return replace(
            self,
            field_ppm=turn(self.field_ppm),
            mask=turn(self.mask),
            found=replace(self.found, **found),
        )


def total_field_from_echoes(
    echoes: Echoes,
    mask: Mask | None,
    steps: Steps = STEPS,
    *,
    limit_bytes: float,
    stages: Stages,
    axes: Axes = STORED,
    wants_r2_star: bool = False,
) -> Lines[TotalField]:
    """Yield a line after every step; return the field of all sources.

    Parameters
    ----------
    echoes
        Phase and magnitude, whose slices may be corrected in place; the only reference to them,
        if their memory is to be free early.
    mask
        (x, y, z) bool, the brain; ``None`` finds it on the magnitude.
    steps
        What does it.
    limit_bytes
        The memory that the steps may take.
    stages
        Takes their time and memory.
    axes
        How the axes of the echoes are made of stored ones, which notes name.
    wants_r2_star
        Whether the decay is wanted too.

    Raises
    ------
    DataError
        If the mask is empty, or the echoes contradict each other.
    UnitsError
        If the phase is none.
    MemoryLimitError
        If a step would take more memory than that.
    """
    with stages("mask"):
        memory = {} if mask is not None else finding_bytes(echoes.magnitude)
        require_memory(memory, limit_bytes)
        brain = FoundMask(mask, "given") if mask is not None else steps.find_mask(echoes.magnitude)
        if not brain.mask.any():
            raise DataError(EMPTY)
        memory |= stage_bytes(len(echoes.echo_times_s), brain.mask, echoes.geometry, steps.remove)
        require_memory(memory, limit_bytes)
        share = f"{100 * brain.mask.mean():.0f} % of the volume"
        notes = [f"no mask given, taking {share}: {note}" for note in brain.notes]
        flips = undo_half_turns(echoes.phase_rad, brain.mask, axes)
    yield f"mask {brain.origin}, {share}"
    with stages("field mapping"):
        found = steps.map_field(echoes, brain.mask)
    decay = None
    if wants_r2_star:
        with stages("R2*"):
            decay = r2_star(echoes, brain.mask)
    facts = {
        "mask": {"origin": brain.origin, "voxels": int(np.count_nonzero(brain.mask))},
        "slice_flips": flips,
        "predicted_stage_bytes": memory,
        **found.facts,
    }
    yield "field mapped"
    return TotalField(found, brain.mask, decay, facts, [*notes, *flips, *found.notes])


def local_field_from_total(
    found: FieldMap,
    brain: Mask,
    geometry: Geometry,
    steps: Steps = STEPS,
    *,
    limit_bytes: float,
    stages: Stages,
    done: Callable[[], object] = lambda: None,
) -> LocalField:
    """Return the field of the sources inside what is left of a brain.

    Parameters
    ----------
    found
        The field of all sources.
    brain
        (x, y, z) bool.
    geometry
        The grid.
    steps
        What does it.
    limit_bytes
        The memory that the steps may take.
    stages
        Takes their time and memory.
    done
        Called after each of ``steps.remove.steps``.

    Raises
    ------
    DataError
        If nothing is left of the brain.
    MemoryLimitError
        If removal would take more memory than that.
    """
    require_memory(memory := stage_bytes(0, brain, geometry, steps.remove), limit_bytes)
    with stages("quality mask"):
        wanted, trusted = quality_mask(brain, found, geometry, steps.quality)
    with stages("background removal"):
        local, mask = steps.remove(Task(found.field_ppm, wanted, trusted, geometry, done))
    total_std, local_std = (float(f[mask].std()) for f in (found.field_ppm, local))
    facts = {
        "mask_kept_percent": round(100 * float(mask.sum() / brain.sum()), 1),
        "not_trusted_percent": round(100 * float((wanted & ~trusted).sum() / wanted.sum()), 2),
        "total_field_std_ppm": round(total_std, 4),
        "local_field_std_ppm": round(local_std, 4),
        "predicted_stage_bytes": memory,
        "steps": parameters(steps),
    }
    notes = _doubts(brain, total_std, geometry)
    if local_std > LARGEST_PPM:
        notes.append(
            f"the local field varies by {local_std:.3f} ppm, in heads it is 0.008 to 0.013: check "
            "the mask, and the field at air and veins"
        )
    return LocalField(local, mask, found, facts, notes)


def _doubts(brain: Mask, total_std_ppm: float, geometry: Geometry) -> list[str]:
    """Return notes on a mask that holds more than a brain, and on a field without background."""
    litres = np.count_nonzero(brain) * math.prod(geometry.voxel_size_mm) / 1e6
    notes = []
    if litres > LARGEST_BRAIN_L:
        notes.append(
            f"the mask holds {litres:.1f} litres, a brain 1 to 1.9: what else is in it spoils the "
            "local field; pass a mask of the brain"
        )
    if litres > SMALLEST_HEAD_L and total_std_ppm < LEAST_TOTAL_PPM:
        notes.append(
            f"the total field varies by {total_std_ppm:.3f} ppm, as one without background: if it "
            "is a local field, pass it with --local-field"
        )
    return notes


def parameters(steps: Steps) -> dict[str, dict[str, Any]]:
    """Return the name and the parameters of every step, for a report."""
    names = {type(step): name for name, step in REMOVALS.items()}
    remove: dict[str, Any] = asdict(steps.remove) if is_dataclass(steps.remove) else {}
    return {
        "mask": {"by": _name(steps.find_mask)},
        "field": {
            "by": _name(steps.map_field),
            "initial_phase_order": ORDER,
            "initial_phase_smoothing_mm": REST_MM,
        },
        "quality": asdict(steps.quality),
        "background": {"by": names.get(type(steps.remove), _name(steps.remove)), **remove},
    }


def _name(step: object) -> str:
    return str(getattr(step, "__name__", type(step).__name__))


def result_of(lines: Lines[T]) -> T:
    """Return what a generator of lines does, without them."""
    while True:
        try:
            next(lines)
        except StopIteration as finished:
            found: T = finished.value
            return found
