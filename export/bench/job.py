"""One run of ``qsm-bench``: the device's peak, the contenders in turns, the rows."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qsm_deploy.export.bench.contenders import TORCH, find_reference
from qsm_deploy.export.bench.device_peak import measure_peak
from qsm_deploy.export.bench.machine import Others, machine
from qsm_deploy.export.bench.rounds import Contender, Measured, compare, reconstruct_in, row_facts
from qsm_deploy.export.graph.flop_count import Work, count_work
from qsm_deploy.export.measure.torch_memory import in_torch
from qsm_deploy.export.measure.verification import phantom_scan
from qsm_deploy.kernels.errors import MemoryLimitError, UsageError
from qsm_deploy.kernels.geometry import Shape, Volume, shape_text
from qsm_deploy.kernels.threads import using_threads
from qsm_deploy.runtime.card.plan_file import read_plan
from qsm_deploy.runtime.card.read import PLAN
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstruction.memory import available_bytes
from qsm_deploy.runtime.reconstruction.network import rounds
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.pipeline import input_shapes
from qsm_deploy.runtime.reconstruction.planning import Decision, PatchOptions, PatchSize
from qsm_deploy.runtime.reconstructor import reconstructor_of
from qsm_deploy.runtime.scan.scan import Scan


def run_bench(
    contenders: list[Contender],
    shape: Shape,
    log: TerminalLog,
    *,
    weights: Sequence[Path] = (),
    normalisation: Sequence[Path] = (),
    repeats: int = 5,
    patch: PatchSize = "auto",
    threads: int = 0,
) -> dict[str, Any]:
    """Run contenders in turns, and return what they took and how far they are apart.

    Parameters
    ----------
    contenders
        As :func:`find_contenders` found them.
    shape
        Of the head (x, y, z), 1 mm each.
    log
        Takes notes and progress.
    weights, normalisation
        What the first one was made of.
    repeats
        Timed reconstructions of each.
    patch
        As for a run; every contender runs the same patches.
    threads
        Of the CPU for PyTorch and prior maps, 0 for all.

    Raises
    ------
    EngineError
        If an engine cannot be loaded, or there is no such device.
    MemoryLimitError
        If the volume does not fit the memory.
    UsageError
        If one takes no such patches.
    """
    if threads:
        torch.set_num_threads(threads)
    log.stage("drawing a head")
    scan = phantom_scan(contenders[0].card, shape)
    decision = _decision(contenders[0], scan, PatchOptions(patch))
    plan = decision.plan
    _require_same_patches(contenders, plan)
    torch_fits = _torch_fits(contenders, scan, plan)
    if not torch_fits:
        log.warn("PyTorch does not fit the memory at this shape: no errors against it")
    log.stage("measuring the device")
    peaks = {
        device: measure_peak(device, {c.precision for c in contenders if c.device == device})
        for device in dict.fromkeys(contender.device for contender in contenders)
    }
    others = Others()
    contenders = [replace(c, work=_work(c, scan, plan)) for c in contenders]
    with using_threads(threads):
        rows = compare(contenders, scan, plan, repeats, log.stage)
    busy = others.busy_cores()
    log.stage("running the reference")
    references = _references(rows, scan, plan, weights, normalisation, torch_fits=torch_fits)
    log.stage("")
    return {
        "made_by": made_by(),
        "machine": machine() | {"others_busy_cores": busy},
        "peaks": {device: peak and asdict(peak) for device, peak in peaks.items()},
        "shape": list(shape),
        "plan": decision.facts(),
        "repeats": repeats,
        "rows": [
            row_facts(
                row,
                rows[0],
                peaks[row.contender.device],
                scan.mask,
                references[row.contender.card.weights_sha256],
            )
            for row in rows
        ],
    }


def _decision(contender: Contender, scan: Scan, options: PatchOptions) -> Decision:
    """Return how all contenders run the volume: as it fits the first one's memory."""
    reconstructor = reconstructor_of(contender.open(), contender.path)
    wants = Wants(options, allow_geometry=True)
    return reconstructor.plan(scan, wants).task.decision


def _work(contender: Contender, scan: Scan, plan: PatchPlan) -> Work | None:
    """Return the arithmetic of one reconstruction; the bytes of an engine do not tell it."""
    card = contender.card
    if contender.path.suffix == PLAN and read_plan(contender.path).graph is None:
        return None
    shapes = input_shapes(card, scan, plan)
    return count_work(contender.path, shapes).times(plan.count * rounds(card))


def _references(
    rows: list[Measured],
    scan: Scan,
    plan: PatchPlan,
    weights: Sequence[Path],
    normalisation: Sequence[Path],
    *,
    torch_fits: bool,
) -> dict[str, tuple[str, Volume]]:
    """Return what the maps are compared with, by the digest of the weights.

    That is PyTorch's map where the weights are at hand and the memory suffices, else that of the
    first contender.
    """
    found: dict[str, tuple[str, Volume]] = {}
    eager = f"pytorch {torch.__version__}, eager, fp32"
    for row in sorted(rows, key=lambda row: row.contender.backend != TORCH):
        card, digest = row.contender.card, row.contender.card.weights_sha256
        if digest in found:
            continue
        if row.contender.backend == TORCH:
            found[digest] = eager, row.chi_ppm
            continue
        given = weights if row is rows[0] else ()
        opened = find_reference(card, given, normalisation)
        if opened is None or not torch_fits:
            found[digest] = f"{row.contender.name} in {row.library}", row.chi_ppm
        else:
            found[digest] = eager, reconstruct_in(opened(), scan, plan)
    return found


def _torch_fits(contenders: list[Contender], scan: Scan, plan: PatchPlan) -> bool:
    """Return whether PyTorch has the memory to run each network.

    Raises
    ------
    MemoryLimitError
        If not, and it is a contender.
    """
    limit = available_bytes()
    for contender in contenders:
        workload = in_torch(scan, contender.card)
        needed = max(workload.peak_bytes(plan).values())
        if needed <= limit:
            continue
        if any(other.backend == TORCH for other in contenders):
            raise MemoryLimitError(
                f"PyTorch would need about {memory_text(needed)} for patches of "
                f"{shape_text(plan.patch_shape)}, {memory_text(limit)} are left; choose a smaller "
                "--shape or --patch, or leave torch out"
            )
        return False
    return True


def _require_same_patches(contenders: list[Contender], plan: PatchPlan) -> None:
    for contender in contenders:
        card = contender.card
        if any(n % card.divisor for n in plan.patch_shape):
            raise UsageError(
                f"{contender.name} takes multiples of {card.divisor}, not "
                f"{shape_text(plan.patch_shape)}; choose --shape or --patch so"
            )
        if not plan.whole and card.patchable == "no":
            raise UsageError(
                f"{contender.name} cannot be run in patches: {card.why_whole}; pass --patch off"
            )
