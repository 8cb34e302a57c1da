"""Engines beside each other: time of every stage, memory, arithmetic and accuracy.

All of them reconstruct the same head phantom in one process, taking turns, so that whatever else
keeps the machine busy hits them alike.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.export.bench.device_peak import DevicePeak
from qsm_deploy.export.graph.flop_count import Work
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.peak_memory import return_freed_memory
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.metrics.difference import difference_ppb, distribution_ppb
from qsm_deploy.runtime.reconstruction.inversion import CPU, Wants
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstructor import Planned, Reconstructor, reconstructor_of
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import Session

INFERENCE, TOTAL = "inference", "total"
NO_FILE = Path("the weights")
GIGA = 1e9


@dataclass(frozen=True)
class Contender:
    """One way to run a network.

    Attributes
    ----------
    name
        Of the file, or of what else it is made from.
    backend
        The library that runs it.
    precision
        What it computes in.
    device
        ``cpu`` or ``cuda:N``.
    card
        Of the network.
    open
        Loads it.
    path
        The model file, or the one that was made of the same weights.
    work
        The arithmetic of one reconstruction, if it was counted.
    """

    name: str
    backend: str
    precision: str
    device: str
    card: ModelCard
    open: Callable[[], Session]
    path: Path
    work: Work | None = None


@dataclass
class Measured:
    """What one contender took.

    Attributes
    ----------
    contender
        Which one.
    library
        What ran it, and its version.
    chi_ppm
        Its map.
    peak_bytes
        Peak resident memory of loading it and of the first reconstruction, above that before.
    gpu_bytes
        What that takes of a GPU's memory, as planned.
    load_seconds
        Time until it was loaded.
    seconds
        Of every stage of every timed reconstruction, and their sum as ``total`` [s].
    """

    contender: Contender
    library: str
    chi_ppm: Volume
    peak_bytes: int
    gpu_bytes: float | None
    load_seconds: float
    seconds: dict[str, list[float]] = field(default_factory=dict)


def compare(
    contenders: Sequence[Contender],
    scan: Scan,
    plan: PatchPlan,
    repeats: int,
    say: Callable[[str], None] = lambda text: None,
) -> list[Measured]:
    """Run every contender once to warm up, then all of them in turns.

    Parameters
    ----------
    contenders
        At least one.
    scan
        What all of them reconstruct.
    plan
        Whole, or in patches.
    repeats
        Timed reconstructions of each.
    say
        Called with what is done next.

    Raises
    ------
    EngineError
        If one cannot be loaded or run.
    """
    opened, rows = [], []
    for contender in contenders:
        say(f"warming up {contender.name} in {contender.backend}")
        ready, row = _warmed_up(contender, scan, plan)
        opened.append(ready)
        rows.append(row)
    for n in range(repeats):
        say(f"round {n + 1} of {repeats}")
        for (reconstructor, planned), row in zip(opened, rows, strict=True):
            stages = Stages()
            reconstructor.run(planned, stages)
            for name, seconds in (stages.seconds | {TOTAL: sum(stages.seconds.values())}).items():
                row.seconds.setdefault(name, []).append(seconds)
    return rows


def reconstruct_in(session: Session, scan: Scan, plan: PatchPlan) -> Volume:
    """Return the map that a session makes."""
    reconstructor = reconstructor_of(session, NO_FILE)
    planned = reconstructor.plan(scan, Wants(layout=plan, allow_geometry=True))
    return reconstructor.run(planned, Stages()).map_ppm


def _warmed_up(
    contender: Contender, scan: Scan, plan: PatchPlan
) -> tuple[tuple[Reconstructor, Planned], Measured]:
    gc.collect()
    return_freed_memory()
    stages = Stages()
    with stages("load"):
        session = contender.open()
    reconstructor = reconstructor_of(session, contender.path)
    planned = reconstructor.plan(scan, Wants(layout=plan, allow_geometry=True))
    chi = reconstructor.run(planned, stages).map_ppm
    on_gpu = contender.device != CPU
    return (reconstructor, planned), Measured(
        contender,
        f"{contender.backend} {session.version}",
        chi,
        max(stages.peak_bytes.values()),
        planned.task.decision.peak_bytes if on_gpu else None,
        stages.seconds["load"],
    )


def row_facts(
    row: Measured,
    first: Measured,
    peak: DevicePeak | None,
    mask: NDArray[np.bool_],
    reference: tuple[str, Volume],
) -> dict[str, Any]:
    """Return a row of the result: how fast, how much, how far from the reference.

    Parameters
    ----------
    row, first
        A contender, and the one that it is compared with.
    peak
        Of the contender's device, if it could be measured.
    mask
        Where the accuracy counts.
    reference
        What the maps are compared with: its name, and its map.
    """
    total = statistics.median(row.seconds[TOTAL])
    inference = statistics.median(row.seconds[INFERENCE])
    contender, work = row.contender, row.contender.work
    is_torch = contender.backend == "torch"
    errors = {"reference": reference[0]} | difference(row.chi_ppm, reference[1], mask)
    gpu = {} if row.gpu_bytes is None else {"gpu_bytes": round(row.gpu_bytes)}
    return {
        "name": contender.name,
        "network": contender.card.network,
        "library": row.library,
        "precision": contender.precision,
        "graph_precision": contender.card.precision,
        "device": contender.device,
        "seconds": {name: spread(values) for name, values in row.seconds.items()},
        "load_seconds": round(row.load_seconds, 4),
        "speed": _significant(statistics.median(first.seconds[TOTAL]) / total),
        "peak_bytes": row.peak_bytes,
        **gpu,
        "voxels_per_second": round(mask.size / total),
        **({} if work is None else _arithmetic(work, inference, peak, contender.precision)),
        "accuracy": None if reference[1] is row.chi_ppm and not is_torch else errors,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most of times [s]."""
    facts = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 5) for name, value in facts.items()}


def difference(chi: Volume, reference: Volume, mask: NDArray[np.bool_]) -> dict[str, float]:
    """Return how far two maps are apart in the mask [ppb]."""
    found = distribution_ppb(difference_ppb(chi, reference, mask))
    return {name: _significant(found[name]) for name in ("p999_ppb", "max_ppb")}


def _arithmetic(
    work: Work, seconds: float, peak: DevicePeak | None, precision: str
) -> dict[str, Any]:
    rate, traffic = work.flop / seconds, work.traffic_bytes / seconds
    facts = {
        "gflop": _significant(work.flop / GIGA),
        "gflop_per_second": _significant(rate / GIGA),
        "gigabyte_per_second": _significant(traffic / GIGA),
    }
    if peak is None:
        return facts
    if precision in peak.flop_per_second:
        facts["share_of_peak_product"] = _significant(rate / peak.flop_per_second[precision])
    return facts | {"share_of_peak_copy": _significant(traffic / peak.bytes_per_second)}


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
