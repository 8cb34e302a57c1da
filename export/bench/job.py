"""One run of ``qsm-bench``: the device's peak, the contenders in turns, the rows."""

import argparse
import json
from dataclasses import asdict, replace

import torch

from qsm_deploy.export.bench.contenders import CPU, TORCH, find_contenders, find_reference
from qsm_deploy.export.bench.device_peak import measure_peak
from qsm_deploy.export.bench.machine import Others, machine
from qsm_deploy.export.bench.rounds import (
    Contender,
    Measured,
    compare,
    reconstruct_in,
    row_facts,
)
from qsm_deploy.export.bench.text import bench_text
from qsm_deploy.export.check.cases import TORCH_BYTES
from qsm_deploy.export.graph.flop_count import Work, count_work
from qsm_deploy.export.measure.verification import phantom_scan
from qsm_deploy.kernels.errors import MemoryLimitError, UsageError
from qsm_deploy.kernels.geometry import Volume, shape_text
from qsm_deploy.runtime.card.card import MemoryUse
from qsm_deploy.runtime.card.read import PLAN
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.gpu.session import GpuSession
from qsm_deploy.runtime.reconstruction.memory import Workload, available_bytes
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.pipeline import input_shapes
from qsm_deploy.runtime.reconstruction.planning import Decision, PatchOptions, decide, memory_text
from qsm_deploy.runtime.run.job import rounds
from qsm_deploy.runtime.run.report import plan_facts
from qsm_deploy.runtime.scan.scan import Scan


def run_bench(arguments: argparse.Namespace) -> str:
    """Do what the command line asks for and return what to print.

    Raises
    ------
    UsageError
        If a contender is named twice, or cannot be compared.
    WeightsError
        If PyTorch is asked for without the engine's weights.
    EngineError
        If an engine cannot be loaded, or there is no such device.
    MemoryLimitError
        If the volume does not fit the memory.
    """
    log = TerminalLog(quiet=arguments.quiet)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    contenders = find_contenders(arguments)
    log.stage("drawing a head")
    x, y, z = arguments.shape
    scan = phantom_scan(contenders[0].card, (x, y, z))
    decision = _decision(contenders[0], scan, PatchOptions(arguments.patch))
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
    rows = compare(contenders, scan, plan, arguments.repeats, log.stage)
    busy = others.busy_cores()
    log.stage("running the reference")
    references = _references(arguments, rows, scan, plan, torch_fits=torch_fits)
    log.stage("")
    result = {
        "made_by": made_by(),
        "machine": machine() | {"others_busy_cores": busy},
        "peaks": {device: peak and asdict(peak) for device, peak in peaks.items()},
        "shape": [x, y, z],
        "plan": plan_facts(decision),
        "repeats": arguments.repeats,
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
    return json.dumps(result) if arguments.json else bench_text(result)


def _decision(contender: Contender, scan: Scan, options: PatchOptions) -> Decision:
    """Return how all contenders run the volume: as it fits the first one's memory."""
    if contender.device == CPU:
        workload = Workload(scan, contender.card, contender.backend, evaluates=False, draws=False)
        return decide(workload, options, available_bytes())
    session = contender.open()
    assert isinstance(session, GpuSession)
    return decide(session.workload(scan), options, session.limit_bytes())


def _work(contender: Contender, scan: Scan, plan: PatchPlan) -> Work | None:
    """Return the arithmetic of one reconstruction; the bytes of a plan do not tell it."""
    card = contender.card
    if contender.path.suffix == PLAN:
        return None
    shapes = input_shapes(card, scan, plan)
    return count_work(contender.path, shapes).times(plan.count * rounds(card))


def _references(
    arguments: argparse.Namespace,
    rows: list[Measured],
    scan: Scan,
    plan: PatchPlan,
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
        given = arguments.weights if row is rows[0] else ()
        opened = find_reference(card, given, arguments.normalisation)
        if opened is None or not torch_fits:
            found[digest] = f"{row.contender.name} in {row.library}", row.chi_ppm
        else:
            found[digest] = eager, reconstruct_in(opened(), scan, plan, Stages())
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
        memory = {
            name: replace(use, bytes_per_voxel=TORCH_BYTES * use.bytes_per_voxel)
            for name, use in contender.card.memory.items()
        }
        card = replace(contender.card, memory=memory or {"unknown": MemoryUse(0, 1)})
        workload = Workload(scan, card, TORCH, evaluates=False, draws=False)
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
