"""What an engine is run on: volumes at its smallest, typical and largest shape, and patches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from qsm_deploy.calibration.phantom.measured_head import scan_from_phantom
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.check.shapes import Shapes
from qsm_deploy.export.measure.comparison import Row
from qsm_deploy.export.measure.torch_memory import in_torch
from qsm_deploy.kernels.bounding_box import Corner, box_at, corner_around
from qsm_deploy.kernels.errors import QsmDeployError, UsageError
from qsm_deploy.kernels.geometry import Geometry, Shape, Volume, shape_text
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.planning import PatchOptions, decide
from qsm_deploy.runtime.reconstruction.preparation import Prepared
from qsm_deploy.runtime.scan.scan import Scan

PatchChoice = int | Literal["auto", "off"]
SEEDS = (1, 2, 3)
# of the typical head, where the network takes any grid: what the runtime adds must hold there too
TILTED = Geometry((1, 1, 1), (0.9, 0.9, 1.8), (0.1, 0.4, 0.9))


@dataclass(frozen=True)
class Case:
    """One volume, run in one way.

    Attributes
    ----------
    subject
        Whose volume it is, in words.
    prepared
        The scan, as the network takes it and as the maps are compared.
    plan
        Whole volume or patches.
    is_phantom
        Whether it is a drawn head.
    box_of
        The scan that it is a box of, and the box's first voxel; ``None`` of a whole volume.
    """

    subject: str
    prepared: Prepared
    plan: PatchPlan
    is_phantom: bool
    box_of: tuple[Scan, Corner] | None = None

    @property
    def measured(self) -> Scan:
        """The scan as the maps are compared."""
        return self.prepared.measured

    def stored_voxel(self, voxel: Sequence[int]) -> Corner:
        """Return a voxel of the maps as its file has it."""
        scan, corner = self.box_of or (self.measured, (0, 0, 0))
        x, y, z = (n + first for n, first in zip(voxel, corner, strict=True))
        return scan.axes.inverse.voxel((x, y, z), scan.geometry.shape)

    @property
    def run(self) -> str:
        """How the network is run, in words."""
        plan = self.plan
        if plan.whole:
            return "whole"
        return f"{plan.count} patches of {shape_text(plan.patch_shape)}, {plan.overlap} shared"

    @property
    def where(self) -> str:
        """Subject, shape and run, in words."""
        return f"{self.subject}, {shape_text(self.measured.geometry.shape)}, {self.run}"


@dataclass(frozen=True)
class Compared:
    """What was run, the numbers, and both maps [ppm] on the grid that they are compared on."""

    case: Case
    row: Row
    engine_ppm: Volume
    reference_ppm: Volume


@dataclass(frozen=True)
class CasePlanner:
    """Plans what an engine is run on.

    Attributes
    ----------
    card
        The engine's.
    shapes
        To check at.
    patch
        ``auto`` runs volumes whole and in patches of the typical size, ``off`` whole only, a
        number in patches of that size only.
    limit_bytes
        Of memory, for one network.
    """

    card: ModelCard
    shapes: Shapes
    patch: PatchChoice
    limit_bytes: float

    def heads(self) -> list[Case]:
        """Return a head for each shape, whole, and the largest also in patches.

        Every head is another, with its truth, labels and a calcification.
        """
        _, typical, largest = self.shapes.checked
        cases = []
        for seed, shape in zip(SEEDS, self.shapes.checked, strict=True):
            head = head_phantom(self._grid(shape, tilted=shape == typical), seed=seed)
            scan = scan_from_phantom(self.card, head)
            scan = replace(scan, truth_ppm=head.chi_ppm, labels=head.labels)
            for plan in self._plans(scan, self.patch if shape == largest else "off"):
                cases.append(Case(f"head {seed}", Prepared(scan, scan), plan, True))
        return cases

    def field(self, subject: str, prepared: Prepared) -> list[Case]:
        """Return a measured volume whole, in patches, and boxes of it at the smaller shapes.

        The boxes lie around the strongest field, where errors are largest.

        Parameters
        ----------
        subject
            What to call it.
        prepared
            As maps of it are compared, and as the network takes it.

        Raises
        ------
        EngineError
            If a plan serves neither the volume nor patches of it.
        MemoryLimitError
            If neither fits the memory.
        UsageError
            If patches are asked for of a network that cannot be run in any.
        """
        cases, scan = [], prepared.scan
        smaller = self.shapes.checked[: 1 if self.card.patchable != "no" else 2]
        for shape in dict.fromkeys(smaller):
            if all(n < m for n, m in zip(shape, scan.geometry.shape, strict=True)):
                corner = _corner_around_strongest(scan, shape)
                box = scan.cut(box_at(corner, shape))
                name = f"{subject}, strongest field"
                alone = Prepared(box, box)
                plans = self._plans(box, "off")
                cases += [Case(name, alone, plan, False, (scan, corner)) for plan in plans]
        plans = self._plans(scan, self.patch)
        return cases + [Case(subject, prepared, plan, False) for plan in plans]

    def _plans(self, scan: Scan, patch: PatchChoice) -> list[PatchPlan]:
        """Return the runs of one volume that the engine serves and the memory allows."""
        patchable = self.card.patchable != "no"
        if isinstance(patch, int) and not patchable:
            raise UsageError(
                f"{self.card.network} cannot be run in patches: {self.card.why_whole}; drop --patch"
            )
        sizes: list[PatchChoice] = [patch]
        if patch == "auto":
            sizes = ["off", min(self.shapes.checked[1])] if patchable else ["off"]
        workload = in_torch(scan, self.card, evaluates=True, draws=True)
        plans: list[PatchPlan] = []
        refused: QsmDeployError | None = None
        for size in sizes:
            try:
                plan = decide(workload, PatchOptions(size), self.limit_bytes).plan
                if why := self.shapes.refusal(plan):
                    raise why
            except QsmDeployError as error:
                if isinstance(error, UsageError):
                    raise
                refused = error
                continue
            if not plans or plan.count > 1:  # a single patch is the volume again
                plans.append(plan)
        if refused is not None and not plans:
            raise refused
        return plans

    def _grid(self, shape: Shape, *, tilted: bool) -> Geometry:
        """Return a grid that the network may be used on, the tilted one if it may be any."""
        limits, counts = self.card.geometry, self.card.field_counts
        free = limits.voxel_size_mm is None and limits.b0_direction is None
        if free and tilted and counts.start == 1:
            return replace(TILTED, shape=shape)
        voxel_size = limits.voxel_size_mm or (1.0, 1.0, 1.0)
        return Geometry(shape, voxel_size, limits.b0_direction or (0.0, 0.0, 1.0))


def _corner_around_strongest(scan: Scan, shape: Shape) -> Corner:
    strength = np.where(scan.mask, np.abs(scan.measured[0]), -1)
    x, y, z = (int(n) for n in np.unravel_index(int(strength.argmax()), strength.shape))
    return corner_around((x, y, z), shape, scan.geometry.shape)
