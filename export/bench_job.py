"""One run of ``qsm-bench``: the device's peak, the contenders in turns, the rows."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch

from qsm_deploy.export.bench_text import bench_text
from qsm_deploy.export.check_sessions import load_card, reference_evaluation
from qsm_deploy.export.device_peak import measure_peak
from qsm_deploy.export.engine_benchmark import (
    Contender,
    Measured,
    compare,
    reconstruct_in,
    row_facts,
)
from qsm_deploy.export.flop_count import Work, count_work
from qsm_deploy.export.machine import Others, machine
from qsm_deploy.export.verification import phantom_scan
from qsm_deploy.kernels.errors import UsageError, WeightsError
from qsm_deploy.runtime.card import ModelCard
from qsm_deploy.runtime.gpu_session import GpuSession
from qsm_deploy.runtime.job import rounds
from qsm_deploy.runtime.memory import Workload, available_bytes
from qsm_deploy.runtime.open_gpu import gpu_number, open_gpu_sessions
from qsm_deploy.runtime.patches import PatchPlan
from qsm_deploy.runtime.pipeline import Volume
from qsm_deploy.runtime.plan_file import SUFFIX as PLAN
from qsm_deploy.runtime.planning import Decision, PatchOptions, decide
from qsm_deploy.runtime.provenance import made_by
from qsm_deploy.runtime.report import plan_facts
from qsm_deploy.runtime.scan import Scan
from qsm_deploy.runtime.session import Backend, Precision, Session, choose_backend, open_session
from qsm_deploy.runtime.stages import Stages
from qsm_deploy.runtime.terminal import TerminalLog

TORCH, CPU = "torch", "cpu"
BACKENDS = get_args(Backend)


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
    card = load_card(arguments.engine)
    reference = _reference(arguments, card)
    log.stage("drawing a head")
    x, y, z = arguments.shape
    scan = phantom_scan(card, (x, y, z))
    first = _engine(arguments, arguments.engine, card, arguments.precision)
    decision = _decision(first, scan, PatchOptions(arguments.patch))
    plan = decision.plan
    contenders = [first, *_others(arguments, card, reference)]
    _require_different(contenders)
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
    name, chi = _reference_map(rows, reference, scan, plan)
    log.stage("")
    result = {
        "made_by": made_by(),
        "machine": machine() | {"others_busy_cores": busy},
        "peaks": {device: peak and asdict(peak) for device, peak in peaks.items()},
        "shape": [x, y, z],
        "plan": plan_facts(decision),
        "repeats": arguments.repeats,
        "rows": [
            row_facts(row, rows[0], peaks[row.contender.device], scan.mask, (name, chi))
            for row in rows
        ],
    }
    return json.dumps(result) if arguments.json else bench_text(result)


def _reference(arguments: argparse.Namespace, card: ModelCard) -> Callable[[], Session] | None:
    """Return what opens the PyTorch network, if the engine's weights are at hand."""
    given = [str(path) for path in arguments.weights]
    try:
        return reference_evaluation(card, given, arguments.normalisation)[0].open
    except (UsageError, WeightsError):
        if given or TORCH in arguments.against:
            raise
        return None


def _engine(
    arguments: argparse.Namespace, path: Path, card: ModelCard, precision: Precision
) -> Contender:
    """Return a file on the device and in the library that the flags choose."""
    number = gpu_number(arguments.device, [path])
    if number is not None:
        return Contender(
            path.name,
            "the GPU's engine",
            card.precision,
            f"cuda:{number}",
            card,
            lambda: open_gpu_sessions([path], number)[0],
            path,
        )
    backend, _ = choose_backend(arguments.backend, precision)
    return _on_cpu(arguments, path, card, backend, precision)


def _on_cpu(
    arguments: argparse.Namespace,
    path: Path,
    card: ModelCard,
    backend: Backend,
    precision: Precision = "fp32",
) -> Contender:
    return Contender(
        path.name,
        backend,
        precision,
        CPU,
        card,
        lambda: open_session(path, backend, precision=precision, threads=arguments.threads),
        path,
    )


def _others(
    arguments: argparse.Namespace, card: ModelCard, reference: Callable[[], Session] | None
) -> Iterator[Contender]:
    """Yield what the engine is compared with."""
    engine = arguments.engine
    for other in arguments.against:
        if other == TORCH:
            assert reference is not None  # or it was refused
            yield Contender("the weights", TORCH, "fp32", CPU, card, reference, engine)
        elif other in BACKENDS:
            yield _on_cpu(arguments, engine, card, other)
        else:
            path = Path(other)
            second = load_card(path)
            _require_same_inputs(card, second, path)
            yield _engine(arguments, path, second, "fp32")


def _require_different(contenders: list[Contender]) -> None:
    seen = set()
    for contender in contenders:
        what = (contender.path, contender.backend, contender.precision, contender.device)
        if what in seen:
            raise UsageError(
                f"{contender.name} in {contender.backend} {contender.precision} would be compared "
                "with itself; name another library, precision or engine"
            )
        seen.add(what)


def _decision(contender: Contender, scan: Scan, options: PatchOptions) -> Decision:
    """Return how all contenders run the volume: as it fits the first one's memory."""
    if contender.device == CPU:
        workload = Workload(scan, contender.card, contender.backend, evaluates=False, draws=False)
        return decide(workload, options, available_bytes())
    session = contender.open()
    assert isinstance(session, GpuSession)
    return decide(session.workload(scan), options, session.limit_bytes())


def _require_same_inputs(card: ModelCard, other: ModelCard, path: Path) -> None:
    ours, theirs = ([t.name for t in c.inputs] + [c.task] for c in (card, other))
    counts = (card.field_counts.start, other.field_counts.start)
    if card.task != other.task or counts[0] != counts[1]:
        raise UsageError(f"{path} takes {', '.join(theirs)}, the engine {', '.join(ours)}")


def _work(contender: Contender, scan: Scan, plan: PatchPlan) -> Work | None:
    """Return the arithmetic of one reconstruction; the bytes of a plan do not tell it."""
    card = contender.card
    if contender.path.suffix == PLAN:
        return None
    volume = dict(zip("nxyz", (1, *plan.patch_shape), strict=True))
    numbers = {"voxel_size_mm": (3,), "b0_direction": (len(scan.measured), 3)}
    shapes = {
        tensor.name: tuple(volume[n] if isinstance(n, str) else n for n in tensor.shape)
        if tensor.is_volume
        else numbers.get(tensor.name, (1,))
        for tensor in card.inputs
    }
    return count_work(contender.path, shapes).times(plan.count * rounds(card))


def _reference_map(
    rows: list[Measured],
    reference: Callable[[], Session] | None,
    scan: Scan,
    plan: PatchPlan,
) -> tuple[str, Volume]:
    """Return what the maps are compared with: PyTorch's, or the first contender's."""
    eager = f"pytorch {torch.__version__}, eager, fp32"
    for row in rows:
        if row.contender.backend == TORCH:
            return eager, row.chi_ppm
    if reference is None:
        first = rows[0]
        return f"{first.contender.name} in {first.library}", first.chi_ppm
    return eager, reconstruct_in(reference(), scan, plan, Stages())
