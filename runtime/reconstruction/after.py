"""AFTER-QSM: two networks, the first on a grid turned along B0, the second on the field's own.

The first network reconstructs for any direction of B0 and any voxel size, because the field is
turned and resampled for it and its map is turned back. The second one takes away what that
blurred. The authors run the second one in slabs that overlap by 8 voxels with reflected borders;
it sees 16 to each side, and the patches here share twice that, so that they equal the whole volume.

Xiong et al., arXiv 2211.13942 (2022), doi 10.48550/arXiv.2211.13942.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.inversion import (
    Done,
    Made,
    Task,
    Wants,
    grid_facts,
    require_finite,
)
from qsm_deploy.runtime.reconstruction.network import Network
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.turned_grid import grid_centred_on

VOXEL_SIZE_MM = 0.6  # of the first network's training, each way
PARTS = ("recon", "refine")


def in_order(cards: Sequence[ModelCard]) -> list[int]:
    """Return the order in which the models of one run follow each other, by index.

    Raises
    ------
    UsageError
        If they are neither one model for itself nor the two parts of AFTER-QSM.
    """
    if len(cards) == 1 and cards[0].pipeline != "after":
        return [0]
    parts = [card.options.get("part") if card.pipeline == "after" else None for card in cards]
    if sorted(map(str, parts)) == sorted(PARTS):
        return [parts.index(part) for part in PARTS]
    given = " and ".join(
        f"{card.network}{f', part {part}' if part else ''}"
        for card, part in zip(cards, parts, strict=True)
    )
    raise UsageError(
        "one model runs alone, or the two parts of after-qsm, recon and refine, together; got "
        f"{given}; pass both files, made by qsm-export --model after-qsm --part recon|refine"
    )


class TwoNetworks:
    """Both networks, one after the other, as one inversion: the second one's, by its needs.

    Parameters
    ----------
    first, last
        The two, on one device.
    """

    def __init__(self, first: Network[Any], last: Network[Any]) -> None:
        self.first, self.last = first, last
        self.name, self.needs, self.facts = last.name, last.needs, last.facts
        self.require_fields, self.limit_bytes = last.require_fields, last.limit_bytes

    def task(self, scan: Scan, measured: Scan, wants: Wants, limit_bytes: float) -> Task:
        """Return how both would run a scan."""
        grid = grid_centred_on(scan.geometry, scan.mask, VOXEL_SIZE_MM)
        unmade = np.broadcast_to(np.float32(0), (1, *grid.geometry.shape))
        turned = grid.scan_with(scan, unmade)
        before = self.first.task(turned, scan, Wants(wants.patches), limit_bytes)
        task = self.last.task(scan, measured, wants, limit_bytes)
        facts = {
            "model": self.first.facts()["model"],
            "geometry": grid_facts(grid.geometry),
            "plan": before.decision.facts(),
        }
        return replace(
            task,
            runs=before.runs + task.runs,
            notes=before.notes + task.notes,
            facts={"first_part": facts},
            before=(grid, before),
        )

    def make(self, task: Task, stages: Stages, done: Done) -> Made:
        """Return the second network's map of the first one's, which takes the field's place.

        Beyond the mask the first map would depend on which patches were left out.
        """
        grid, before = task.before
        scan = task.scan
        with stages("prepare"):
            turned = grid.scan_with(scan, grid.turn(scan.measured[0])[None])
        rough = self.first.make(replace(before, scan=turned), stages, done).map_ppm
        require_finite(rough)
        with stages("prepare"):
            rough = grid.turn_back(rough, scan.mask.shape) * scan.mask
        return self.last.make(replace(task, scan=replace(scan, measured=rough[None])), stages, done)
