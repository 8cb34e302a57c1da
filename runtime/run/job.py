"""One run of ``qsm-run``: read, plan, reconstruct, judge, write."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.atomic import write_atomically
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.gpu.layout import DeviceWorkload
from qsm_deploy.runtime.gpu.session import GpuSession
from qsm_deploy.runtime.metrics.metrics import all_metrics, field_residual
from qsm_deploy.runtime.networks import Networks, open_networks
from qsm_deploy.runtime.reconstruction.after import FirstPart, plan_first_part, rough_scan
from qsm_deploy.runtime.reconstruction.memory import Workload, available_bytes
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.reconstruction.planning import Decision, Demand, decide
from qsm_deploy.runtime.reconstruction.precision_check import precision_error
from qsm_deploy.runtime.run import report
from qsm_deploy.runtime.run.figure import figure_png
from qsm_deploy.runtime.run.request import Request, request_from
from qsm_deploy.runtime.scan.erosion import erode_mask
from qsm_deploy.runtime.scan.geometry_limits import deviations, require_geometry
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from qsm_deploy.runtime.scan.resampling import resample_map, resample_scan
from qsm_deploy.runtime.scan.scan import Quantity, Scan, load_scan
from qsm_deploy.runtime.sessions.session import Session, open_session

PPB_PER_PPM = 1000


@dataclass
class Loaded:
    """What a run has in memory.

    Attributes
    ----------
    measured, scan
        The acquisition that the map is for, and as the network takes it.
    model, session
        The network; whoever uses the session last deletes it here.
    first
        The network before it and its file, where there are two.
    why_backend
        Why this backend runs them.
    """

    measured: Scan
    scan: Scan
    model: Path
    session: Session
    first: tuple[Path, Session] | None
    why_backend: str


def run_job(arguments: argparse.Namespace) -> str:
    """Do what the command line asks for and return what to print."""
    request = request_from(arguments)
    log = TerminalLog(quiet=arguments.quiet)
    stages = Stages(log.stage)
    limit = memory_limit(arguments)
    with stages("load"):
        networks = open_networks(request.models, arguments, len(request.files.fields))
        measured = read_scan(request, networks)
    run = run_scan(request, networks, measured, limit, log, stages)
    if arguments.json:
        return report.json_line(run)
    if arguments.dry_run:
        return report.dry_run_text(run, limit, request.outputs.chi)
    return report.result_text(run, request.outputs.chi)


def memory_limit(arguments: argparse.Namespace) -> int:
    """Return what a run may take [bytes]: what was asked for, else most of what is free."""
    stated: int | None = arguments.memory_limit
    return available_bytes() if stated is None else stated


def read_scan(request: Request, networks: Networks) -> Scan:
    """Return the acquisition as it was measured, in the quantity that the network takes."""
    wants_phase = networks.card.task == "phase->chi"
    quantity: Quantity = "phase_rad" if wants_phase else "local_field_ppm"
    return load_scan(request.files, replace(request.reading, quantity=quantity))


def run_scan(
    request: Request,
    networks: Networks,
    measured: Scan,
    limit: float,
    log: TerminalLog,
    stages: Stages,
) -> dict[str, Any]:
    """Reconstruct one acquisition, write what was asked for, and return the report.

    Parameters
    ----------
    request
        What is done with it.
    networks
        What does it.
    measured
        The acquisition.
    limit
        The memory that the run may take [bytes].
    log, stages
        Take notes and progress, times and memory.
    """
    flags = request.flags
    with stages("load"):
        if request.correction is not None:
            request.correction.require(measured)
        loaded = _loaded(networks, *prepared(networks.card, measured, resample=flags.resample))
    departures = _announce(loaded, log, allowed=flags.allow_geometry)
    first, workload, decision = _plan(request, loaded, limit, stay=networks.stay)
    run = _describe(request, loaded, first, decision, departures)
    if flags.dry_run:
        return run
    chi, found = _reconstruct(loaded, first, workload, decision, log, stages)
    run |= found
    if loaded.session.precision != "fp32":
        run["precision_error"] = _precision_error(request, loaded, stages)
        log.warn(report.precision_text(loaded.session.precision, run["precision_error"]))
    del loaded.session  # its memory is not needed any more
    if request.correction is not None and "data_consistency" not in run:
        chi, run["data_consistency"] = request.correction.apply(chi, loaded.measured, stages)
    _write(request, run, chi, loaded.measured, stages)  # before what may still fail
    return _report(request, run, chi, loaded.measured, decision, log, stages)


def _loaded(networks: Networks, measured: Scan, scan: Scan) -> Loaded:
    """Return all that a run needs; only it holds networks that do not stay."""
    *before, (model, session) = zip(networks.models, networks.sessions, strict=True)
    if not networks.stay:
        networks.sessions.clear()
    first = before[0] if before else None
    return Loaded(measured, scan, model, session, first, networks.why_backend)


def _announce(loaded: Loaded, log: TerminalLog, *, allowed: bool) -> list[str]:
    """Return how the acquisition departs from the network's training, if that is allowed."""
    for note in loaded.scan.notes:
        log.warn(note)
    trained, grid = loaded.session.card.geometry, loaded.scan.geometry
    departures = deviations(trained, grid)
    if not allowed:
        require_geometry(trained, grid)
    for departure in departures:
        log.warn(f"outside the training: {departure}")
    return departures


def _plan(
    request: Request, loaded: Loaded, limit: float, *, stay: bool
) -> tuple[FirstPart | None, Demand, Decision]:
    scan, session = loaded.scan, loaded.session
    if isinstance(session, GpuSession):
        stated = request.flags.memory_limit
        limit = session.limit_bytes() if stated is None else stated
    first = None
    if loaded.first is not None:
        recon, first_session = loaded.first
        first = plan_first_part(recon, first_session, scan, request.options, limit)
        loaded.first = None
    workload = _workload(request, loaded, first, stay=stay)
    return first, workload, decide(workload, request.options, limit)


def _workload(request: Request, loaded: Loaded, first: FirstPart | None, *, stay: bool) -> Demand:
    flags, scan, session = request.flags, loaded.scan, loaded.session
    evaluates = flags.report is not None or (flags.json and not flags.dry_run)
    if isinstance(session, GpuSession):
        if first is not None or scan is not loaded.measured or scan.quantity == "phase_rad":
            return session.workload(scan)  # the map is compared on another grid, or not at all
        return session.workload(scan, request.correction, evaluates=evaluates)
    return Workload(
        scan,
        session.card,
        session.backend,
        evaluates=evaluates,
        corrects=request.correction is not None,
        draws=flags.figure is not None,
        compares_precision=session.precision != "fp32",
        keeps_session=stay,
        held_bytes=0 if scan is loaded.measured else loaded.measured.nbytes,
    )


def _describe(
    request: Request,
    loaded: Loaded,
    first: FirstPart | None,
    decision: Decision,
    departures: list[str],
) -> dict[str, Any]:
    run = report.describe_run(
        request.flags,
        loaded.model,
        request.files,
        loaded.session,
        loaded.why_backend,
        loaded.scan,
        decision,
        departures,
    )
    if first is not None:
        run["first_part"] = report.describe_first_part(first)
    return run


def _reconstruct(
    loaded: Loaded,
    first: FirstPart | None,
    workload: Demand,
    decision: Decision,
    log: TerminalLog,
    stages: Stages,
) -> tuple[Volume, dict[str, Any]]:
    """Return the map on the grid of what was measured, and what a GPU found out besides."""
    session, scan = loaded.session, loaded.scan
    total = decision.plan.count * rounds(session.card)
    if first is not None:
        total += first.decision.plan.count
        if not first.decision.exact:
            log.warn(report.patches_text(first.session.card, first.decision.plan))
    if not decision.exact:
        log.warn(report.patches_text(session.card, decision.plan))
    with log.progress(total) as bar:
        if first is not None:
            scan = rough_scan(first, scan, stages, bar.update)
            del first.session  # its memory is the next one's
        if isinstance(session, GpuSession) and isinstance(workload, DeviceWorkload):
            chi, found = session.reconstruct(workload, decision.plan, stages, bar.update)
        else:
            chi = reconstruct(session, scan, decision.plan, stages, bar.update)
            found = {}
    if loaded.scan is not loaded.measured:
        chi = resample_map(chi, loaded.measured.mask)
    return chi, found


def prepared(card: ModelCard, measured: Scan, *, resample: bool) -> tuple[Scan, Scan]:
    """Return the scan that the map is for, and the one that the network takes.

    Raises
    ------
    UsageError
        If it is to be resampled for a network that takes any voxel size.
    DataError
        If nothing of the mask is left.
    """
    if radius := card.constants.get("mask_erosion_voxels"):
        measured = erode_mask(measured, radius)
    if not resample:
        return measured, measured
    if card.geometry.voxel_size_mm is None:
        raise UsageError(f"{card.network} takes any voxel size; drop --resample")
    return measured, resample_scan(measured, card.geometry.voxel_size_mm)


def rounds(card: ModelCard) -> int:
    """Return how often the network runs in one reconstruction."""
    return int(card.constants["iterations"]) if card.patchable == "split" else 1


def _precision_error(request: Request, loaded: Loaded, stages: Stages) -> dict[str, float]:
    with stages("precision check"):
        reference = open_session(loaded.model, "openvino", threads=request.flags.threads)
        return precision_error(loaded.session, reference, loaded.scan)


def _report(
    request: Request,
    run: dict[str, Any],
    chi: Volume,
    scan: Scan,
    decision: Decision,
    log: TerminalLog,
    stages: Stages,
) -> dict[str, Any]:
    """Judge the map, draw it, write the report, and return it."""
    flags, outputs = request.flags, request.outputs
    known = run.get("data_consistency", {}).get("field_residual_after", run.get("field_residual"))
    evaluates = flags.report is not None or flags.json
    findings = _judge(chi, scan, stages, evaluates=evaluates, residual=known)
    if outputs.figure is not None:
        _draw(outputs.figure, report.title(run), chi, scan, stages, force=flags.force)
    full = run | findings | report.resources(stages, decision)
    if outputs.report is not None:
        write_atomically(outputs.report, report.json_bytes(full), force=flags.force)
    log.stage("")
    return full


def _judge(
    chi: Volume, scan: Scan, stages: Stages, *, evaluates: bool, residual: float | None
) -> dict[str, Any]:
    """Return the field residual, unless it is known already, and, with a truth, the metrics."""
    findings: dict[str, Any] = {}
    if residual is not None:
        findings["field_residual"] = residual
    elif evaluates and scan.quantity == "local_field_ppm":
        with stages("field residual"):
            findings["field_residual"] = field_residual(
                chi, scan.measured[0], scan.mask, scan.geometry
            )
    if scan.truth_ppm is not None:
        with stages("metrics"):
            findings["metrics"] = all_metrics(chi, scan.truth_ppm, scan.mask, scan.labels)
    return findings


def _write(request: Request, run: dict[str, Any], chi: Volume, scan: Scan, stages: Stages) -> None:
    """Write the sidecar, then the map: where there is a map, there is its sidecar."""
    units, force, outputs = request.flags.out_units, request.flags.force, request.outputs
    with stages("write"):
        volume = chi * np.float32(PPB_PER_PPM) if units == "ppb" else chi
        nifti = nifti_bytes(
            volume,
            scan.affine,
            description=f"chi [{units}] {report.title(run)}",
            like=scan.header,
            compress=outputs.chi.name.endswith(".gz"),
        )
        sidecar = report.json_bytes({**request.labels, **run})
        write_atomically(outputs.sidecar, sidecar, force=force)
        write_atomically(outputs.chi, nifti, force=force)


def _draw(path: Path, title: str, chi: Volume, scan: Scan, stages: Stages, *, force: bool) -> None:
    with stages("figure"):
        png = figure_png(
            scan.measured[0],
            chi,
            scan.mask,
            scan.geometry,
            truth_ppm=scan.truth_ppm,
            title=title,
            is_phase=scan.quantity == "phase_rad",
        )
        write_atomically(path, png, force=force)
