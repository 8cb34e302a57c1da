"""One run of ``qsm-check``: read, run both networks, compare, judge, report.

The engine is run in every way and closed before the reference is opened: the two are never in
memory at once, only their maps are.
"""

import argparse
import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from qsm_deploy.calibration.budgets import Failure, budgets_for, failures, unmeasured
from qsm_deploy.export.check.cases import Case, CasePlanner, Compared
from qsm_deploy.export.check.evaluations import (
    Evaluation,
    engine_evaluations,
    library_versions,
    load_valid_card,
    reference_evaluation,
)
from qsm_deploy.export.check.shapes import shapes_for
from qsm_deploy.export.measure.comparison import compare, reference_from
from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.atomic import check_writable, write_atomically
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.gpu.session import map_on_gpu
from qsm_deploy.runtime.metrics.agreement import varies
from qsm_deploy.runtime.reconstruction.memory import available_bytes
from qsm_deploy.runtime.reconstruction.pipeline import network_output, require_field_count
from qsm_deploy.runtime.run.figure import require_matplotlib
from qsm_deploy.runtime.run.job import prepared
from qsm_deploy.runtime.run.request import reading_from
from qsm_deploy.runtime.scan.geometry_limits import require_geometry
from qsm_deploy.runtime.scan.resampling import resample_map
from qsm_deploy.runtime.scan.scan import Scan, ScanFiles, load_scan
from qsm_deploy.runtime.sessions.session import Session

PHANTOM = "phantom"
SCHEMA = 1


@dataclass(frozen=True)
class Checked:
    """What a check found: a document for machines, the same as text, and what failed."""

    document: dict[str, Any]
    failures: tuple[Failure, ...]


def run_check(arguments: argparse.Namespace) -> Checked:
    """Do what the command line asks for.

    Raises
    ------
    UsageError
        If flags contradict each other, the mask is missing, or a budget cannot be judged.
    """
    log = TerminalLog(quiet=arguments.quiet)
    if arguments.html is not None:
        require_matplotlib()
        check_writable(arguments.html, force=arguments.force)
    fields = tuple(Path(name) for name in arguments.fields if name != PHANTOM)
    draws = PHANTOM in arguments.fields or not fields
    card = load_valid_card(arguments.engine)
    budgets = budgets_for(card, arguments.budget)
    # a plan is refused without its GPU only when it is opened, after all else was checked
    where = (arguments.threads, arguments.device)
    ways = engine_evaluations(arguments.engine, card, arguments.backend, *where)
    reference, reference_files = reference_evaluation(
        card, arguments.reference, arguments.normalisation, arguments.threads
    )
    limit = available_bytes() if arguments.memory_limit is None else arguments.memory_limit
    planner = CasePlanner(card, shapes_for(card, arguments.shapes), arguments.patch, limit)
    inputs: list[dict[str, Any]] = []
    cases: list[Case] = []
    if draws:
        log.stage("drawing heads")
        if not arguments.fields:
            log.warn("no FIELD was named: checking on drawn heads; name a real one too")
        cases += planner.heads()
        heads = {case.subject: _grid(case.measured) for case in cases}
        inputs.append({"name": PHANTOM, "heads": heads})
    if fields:
        log.stage("reading")
        measured, scan, about = _read(arguments, card, fields)
        for note in scan.notes:
            log.warn(note)
        inputs.append(about)
        name = " + ".join(path.name for path in fields)
        cases += planner.field(name, measured, scan)

    compared = list(_compare(cases, ways, reference, log))
    rows = [one.row for one in compared]
    missing = unmeasured(rows, budgets)
    if asked := [name for name, _ in arguments.budget if name in missing]:
        raise UsageError(
            f"--budget {asked[0]} cannot be judged on {', '.join(map(str, arguments.fields))}: "
            "pass --truth, --labels, or check on the phantom"
        )
    failed = failures(rows, budgets)
    document = {
        "schema": SCHEMA,
        "made_by": made_by(),
        "made_at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "verdict": "fail" if failed else "pass",
        "failures": [
            {"metric": f.metric, "value": f.value, "budget": f.budget, "where": f.where}
            for f in failed
        ],
        "budgets": {
            name: {"budget": budget, "measured": name not in missing}
            for name, budget in budgets.items()
        },
        "engine": _about_engine(arguments.engine, card),
        "reference": {"files": [_file(path) for path in reference_files], "how": reference.how},
        "evaluations": [{"by": way.name, "how": way.how} for way in ways],
        "inputs": inputs,
        "comparisons": rows,
        "versions": {"python": platform.python_version(), **library_versions()},
    }
    if arguments.html is not None:
        log.stage("drawing the report")
        from qsm_deploy.export.check.report import report_html

        write_atomically(
            arguments.html, report_html(document, compared).encode(), force=arguments.force
        )
    log.stage("")
    return Checked(document, tuple(failed))


def _read(
    arguments: argparse.Namespace, card: ModelCard, fields: tuple[Path, ...]
) -> tuple[Scan, Scan, dict[str, Any]]:
    """Return the scan as maps of it are compared, as the network takes it, and about it."""
    if card.pipeline == "after":
        raise UsageError(
            f"{card.network} is one of two networks that follow each other: check it on the phantom"
        )
    if arguments.mask is None:
        raise UsageError("maps are compared inside a mask: pass it with -m MASK")
    require_field_count(card, len(fields))
    files = ScanFiles(fields, arguments.mask, arguments.truth, arguments.labels)
    reading = replace(
        reading_from(arguments),
        quantity="phase_rad" if card.task == "phase->chi" else "local_field_ppm",
    )
    measured = load_scan(files, reading)
    for path, volume in zip(fields, measured.measured, strict=True):
        inside = volume[measured.mask]
        if not varies(inside.astype(np.float64)):
            raise DataError(
                f"{path}: constant in the mask ({inside[0]:.4g} after scaling), so there is "
                "nothing to compare; pass a measured field map"
            )
    measured, scan = prepared(card, measured, resample=arguments.resample)
    if not arguments.allow_geometry:
        require_geometry(card.geometry, scan.geometry)
    named = {"mask": arguments.mask, "truth": arguments.truth, "labels": arguments.labels}
    about = {
        "name": " + ".join(path.name for path in fields),
        "fields": [_file(path) for path in fields],
        **{name: _file(path) for name, path in named.items() if path is not None},
        "units": arguments.units or ("rad" if card.task == "phase->chi" else "ppm"),
        **_grid(measured),
        "notes": scan.notes,
    }
    return measured, scan, about


def _compare(
    cases: Sequence[Case], ways: Sequence[Evaluation], reference: Evaluation, log: TerminalLog
) -> Iterator[Compared]:
    """Yield every comparison, by case; sessions are opened one after the other."""
    engines = {way.name: _maps(cases, way, "the engine", log) for way in ways}
    expected = _maps(cases, reference, "the reference", log)
    for n, case in enumerate(cases):
        log.stage(f"comparing {case.where}")
        scan = case.measured
        takes_field = scan.quantity == "local_field_ppm" and reference.card.pipeline != "after"
        field = scan.measured[0] if takes_field else None
        known = reference_from(expected[n], scan, field)
        for by, maps in engines.items():
            about = {
                "subject": case.subject,
                "shape": list(scan.geometry.shape),
                "run": case.run,
                "by": by,
                "where": f"{case.where}, {by}",
            }
            yield Compared(case, about | compare(maps[n], known), maps[n], expected[n])


def _maps(cases: Sequence[Case], way: Evaluation, what: str, log: TerminalLog) -> list[Volume]:
    log.stage(f"opening {what}")
    session = way.open()
    found = []
    for case in cases:
        log.stage(f"{what}, {way.name}: {case.where}")
        chi = _reconstruct(session, case)
        if case.scan is not case.measured:
            chi = resample_map(chi, case.measured.mask)
        found.append(chi)
    return found


def _reconstruct(session: Session, case: Case) -> Volume:
    """Return a map, finite or not, made as ``qsm-run`` makes it: on the GPU if the engine is."""
    chi = map_on_gpu(session, case.scan, case.plan, Stages())
    return network_output(session, case.scan, case.plan) if chi is None else chi


def _about_engine(path: Path, card: ModelCard) -> dict[str, Any]:
    return {
        **_file(path),
        "network": card.network,
        "precision": card.precision,
        "options": card.options,
        "weights_sha256": card.weights_sha256,
        "licence": card.licence,
        "made_by": card.made_by,
    }


def _file(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _grid(scan: Scan) -> dict[str, Any]:
    grid = scan.geometry
    return {
        "shape": list(grid.shape),
        "voxel_size_mm": [round(v, 6) for v in grid.voxel_size_mm],
        "b0_direction": [round(b, 6) for b in grid.b0_direction],
        "mask_voxels": int(np.count_nonzero(scan.mask)),
    }
