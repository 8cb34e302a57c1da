"""AFTER-QSM: two networks, the first on a grid turned along B0, the second on the field's own.

The first network reconstructs for any direction of B0 and any voxel size, because the field is
turned and resampled for it and its map is turned back. The second one takes away what that
blurred. The authors run the second one in slabs that overlap by 8 voxels with reflected borders;
it sees 16 to each side, and the patches here share twice that, so that they equal the whole volume.

Xiong et al., arXiv 2211.13942 (2022), doi 10.48550/arXiv.2211.13942.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.session import GpuSession
from qsm_deploy.runtime.reconstruction.memory import Workload
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.reconstruction.planning import Decision, Demand, PatchOptions, decide
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.turned_grid import TurnedGrid, turned_grid
from qsm_deploy.runtime.sessions.session import Session

VOXEL_SIZE_MM = 0.6  # of the first network's training, each way
PARTS = ("recon", "refine")


@dataclass
class FirstPart:
    """The network that runs on the turned grid, and how it does.

    Whoever uses the session last deletes it here, and its memory is free.
    """

    model: Path
    session: Session
    grid: TurnedGrid
    decision: Decision


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


def plan_first_part(
    model: Path,
    session: Session,
    scan: Scan,
    options: PatchOptions,
    limit_bytes: float,
) -> FirstPart:
    """Return how the first network will run for a scan.

    Raises
    ------
    MemoryLimitError
        If it does not fit, not even in patches.
    UsageError
        If the patch options contradict each other or the network.
    """
    grid = turned_grid(scan.geometry, scan.mask, VOXEL_SIZE_MM)
    unmade = np.broadcast_to(np.float32(0), (1, *grid.geometry.shape))
    turned = _on_turned_grid(scan, grid, unmade)
    workload: Demand
    if isinstance(session, GpuSession):
        workload = session.workload(turned)
    else:
        workload = Workload(
            turned,
            session.card,
            session.backend,
            evaluates=False,
            draws=False,
            held_bytes=scan.nbytes,
        )
    return FirstPart(model, session, grid, decide(workload, options, limit_bytes))


def rough_scan(
    first: FirstPart, scan: Scan, stages: Stages, done: Callable[[], object] = lambda: None
) -> Scan:
    """Return a scan with the map of the first network [ppm] in place of the local field.

    Parameters
    ----------
    first
        As planned for the scan.
    scan
        One local field.
    stages
        Takes the time and memory of the stages ``prepare`` and ``inference``.
    done
        Called after each patch.

    Raises
    ------
    EngineError
        If the backend fails, or the result is not finite.
    """
    with stages("prepare"):
        field = first.grid.turn(scan.measured[0])[None]
        turned = _on_turned_grid(scan, first.grid, field)
    chi = reconstruct(first.session, turned, first.decision.plan, stages, done)
    with stages("prepare"):
        rough = first.grid.turn_back(chi, scan.mask.shape)
        rough *= scan.mask  # beyond the mask it would depend on which patches were left out
    return replace(scan, measured=rough[None])


def _on_turned_grid(scan: Scan, grid: TurnedGrid, measured: np.ndarray) -> Scan:
    return replace(
        scan,
        measured=measured,
        mask=grid.mask,
        geometry=grid.geometry,
        truth_ppm=None,
        labels=None,
    )
