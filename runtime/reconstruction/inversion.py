"""What makes a map: what it needs, what memory it takes, make it.

A network in a session is one kind; it need not be a network. Nobody who has one asks which.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from qsm_deploy.kernels.ends import RAS
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.card.card import TASKS, GeometryLimits, ModelCard
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.planning import Decision, PatchOptions
from qsm_deploy.runtime.scan.scan import Quantity, Scan

if TYPE_CHECKING:
    from qsm_deploy.runtime.reconstruction.correction import Correction

CHI = "chi_ppm"
CPU = "cpu"  # where an inversion runs, by its facts
Done = Callable[[], object]


@dataclass(frozen=True)
class Wants:
    """What is asked of one reconstruction.

    Attributes
    ----------
    patches
        How patches are to be.
    layout
        Whole volume or patches, where that is decided already.
    correction
        The data-consistency step, if there is to be one.
    allow_geometry
        Whether to run on the native grid although its voxel size or B0 direction are not those of
        the training.
    memory_limit
        Most memory that may be taken [bytes]; else most of what is free.
    evaluates, draws
        Whether the field residual is computed and a figure drawn after it, which takes memory.
    any_values
        Whether a map with NaN or Inf is returned and not an error: whoever asks judges it.
    """

    patches: PatchOptions = field(default_factory=PatchOptions)
    layout: PatchPlan | None = None
    correction: "Correction | None" = None
    allow_geometry: bool = False
    memory_limit: int | None = None
    evaluates: bool = False
    draws: bool = False
    any_values: bool = False


@dataclass(frozen=True)
class Needs:
    """What an inversion takes: fields, on grids within limits, the mask eroded first, a magnitude.

    The grid's axes run where the letters say, as in the training. A magnitude that is needed is
    looked for where nobody names one; a noise map that is taken is passed on where it is made.
    ``maps`` are volumes that are taken besides, ``gives`` what is made, by the names in cards; a
    field that is ``unmasked`` is one of the whole head.
    """

    network: str
    quantity: Quantity
    field_counts: range
    geometry: GeometryLimits
    mask_erosion_voxels: float = 0
    magnitude: bool = False
    takes_noise: bool = False
    axes: str = RAS
    maps: tuple[str, ...] = ()
    gives: tuple[str, ...] = (CHI,)
    unmasked: bool = False


def needs_of(card: ModelCard) -> Needs:
    """Return what a network takes, by its card."""
    taken, maps, gives = TASKS[card.task]
    return Needs(
        card.network,
        cast(Quantity, taken),
        card.field_counts,
        card.geometry,
        card.constants.get("mask_erosion_voxels", 0),
        axes=card.axes,
        maps=maps,
        gives=gives,
        unmasked=bool(card.constants.get("unmasked")),
    )


def grid_facts(geometry: Geometry) -> dict[str, Any]:
    """Return what the report says of a grid."""
    return {
        "shape": list(geometry.shape),
        "voxel_size_mm": list(geometry.voxel_size_mm),
        "b0_direction": list(geometry.b0_direction),
    }


@dataclass(frozen=True)
class Task:
    """A scan as an inversion will run it.

    Attributes
    ----------
    scan
        As it takes it.
    demand, decision
        What decided how it is run, as the inversion knows it; how it is run.
    runs
        Iterations and patches in all, for whoever tells how far it is.
    notes
        How the result falls short of the whole volume's.
    facts
        What the report says of it.
    before
        What an inversion in several parts does first.
    """

    scan: Scan
    demand: object
    decision: Decision
    runs: int
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    before: Any = None


@dataclass
class Made:
    """What was made, 0 outside the mask.

    Attributes
    ----------
    map_ppm
        (x, y, z) susceptibility, or what else a network gives first [ppm].
    findings
        What was found out on the way, for the report.
    further
        Further outputs, by the names in cards.
    scan
        The acquisition that it was made of, as it is for it; that of a chain's last part is made
        by the part before.
    between
        What the parts before gave, by the names in cards.
    """

    map_ppm: Volume
    findings: dict[str, Any] = field(default_factory=dict)
    further: dict[str, Volume] = field(default_factory=dict)
    scan: Scan | None = None
    between: dict[str, Volume] = field(default_factory=dict)

    @property
    def volumes(self) -> tuple[Volume, ...]:
        """All that was made, in the order of the card."""
        return (self.map_ppm, *self.further.values())


def require_finite(chi_ppm: Volume) -> None:
    """Refuse a map with voxels that are not finite.

    Raises
    ------
    EngineError
        If there are any.
    """
    if bad := int(np.count_nonzero(~np.isfinite(chi_ppm))):
        raise not_finite(bad)


def not_finite(count: int | None) -> EngineError:
    """Return what to say of a map with so many voxels that are not finite, if they were counted."""
    return EngineError(
        f"the map has {'' if count is None else f'{count} '}NaN or Inf voxels; check the field, or "
        "for a network try another backend or precision"
    )


class Inversion(Protocol):
    """From a scan to its map."""

    @property
    def name(self) -> str:
        """Method, precision, and what runs it, in one line."""

    @property
    def needs(self) -> Needs:
        """What it takes."""

    def facts(self) -> dict[str, Any]:
        """Return what the report says of it: ``model`` and ``backend``."""

    def require_fields(self, count: int) -> None:
        """Check that it takes so many fields.

        Raises
        ------
        UsageError
            If not.
        """

    def limit_bytes(self) -> float:
        """Return the memory that it may take, where it runs."""

    def task(self, scan: Scan, measured: Scan, wants: Wants, limit_bytes: float) -> Task:
        """Return how a scan would be run.

        Parameters
        ----------
        scan
            As the inversion takes it.
        measured
            As the map is for it: another one if it was resampled.
        wants
            What is asked for.
        limit_bytes
            Of memory.

        Raises
        ------
        MemoryLimitError
            If it does not fit, not even in patches.
        UsageError
            If the patch options contradict each other or the network.
        UnservedShapeError
            If the engine was built for no shape that would do.
        """

    def make(self, task: Task, stages: Stages, done: Done) -> Made:
        """Return the map on the scan's grid, finite or not.

        Raises
        ------
        DataError
            If the scan lacks a parameter that the network needs.
        EngineError
            If what runs it fails.
        """
