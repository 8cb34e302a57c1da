"""One run of ``qsm-check``: read, run both networks, compare, judge, report.

The engine is run in every way and closed before the reference is opened: the two are never in
memory at once, only their maps are.
"""

import hashlib
import itertools
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from qsm_deploy.calibration.budgets import Failure, budgets_for, failures, unmeasured
from qsm_deploy.export.check.cases import Case, CasePlanner, Compared, PatchChoice
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
from qsm_deploy.kernels.threads import using_threads
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.atomic import check_writable, write_atomically
from qsm_deploy.runtime.console.provenance import made_by
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.page.figure import require_matplotlib
from qsm_deploy.runtime.reconstruction.inversion import CHI, Wants, needs_of
from qsm_deploy.runtime.reconstruction.memory import available_bytes
from qsm_deploy.runtime.reconstruction.pipeline import require_field_count
from qsm_deploy.runtime.reconstruction.preparation import Prepared, prepare
from qsm_deploy.runtime.reconstructor import instead_of_gpu, reconstructor_of
from qsm_deploy.runtime.scan.agreement import varies
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles, load_scan
from qsm_deploy.runtime.sessions.session import AUTO

PHANTOM = "phantom"
SCHEMA = 1


@dataclass(frozen=True)
class Checked:
    """What a check found: a document for machines, the same as text, and what failed."""

    document: dict[str, Any]
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Subject:
    """What an engine is checked on besides drawn heads.

    Attributes
    ----------
    files
        The acquisition's; without fields there is none.
    reading
        How they are to be understood.
    wants
        What becomes of their geometry.
    draws
        Whether heads are drawn too.
    """

    files: ScanFiles
    reading: Reading
    wants: Wants
    draws: bool = True


def run_check(
    engine: Path,
    subject: Subject,
    log: TerminalLog,
    *,
    reference: Sequence[str] = (),
    normalisation: Sequence[Path] = (),
    budget: Sequence[tuple[str, float]] = (),
    shapes: str | None = None,
    patch: PatchChoice = "auto",
    backend: str = "auto",
    device: str = AUTO,
    plan_cache: str = AUTO,
    threads: int = 0,
    html: Path | None = None,
    force: bool = False,
) -> Checked:
    """Compare an engine with its reference.

    Parameters
    ----------
    engine
        An ONNX file or a plan.
    subject
        What it is checked on.
    log
        Takes notes and progress.
    reference, normalisation
        As for :func:`reference_evaluation`.
    budget
        Metrics and what they may be, in place of the defaults or besides.
    shapes, patch
        As for :class:`CasePlanner`.
    backend, device, plan_cache, threads
        As for :func:`engine_evaluations`.
    html
        Where a report goes.
    force
        Whether an existing one is replaced.

    Raises
    ------
    UsageError
        If options contradict each other, the mask is missing, or a budget cannot be judged.
    """
    if html is not None:
        require_matplotlib()
        check_writable(html, force=force)
    card, fields = load_valid_card(engine), subject.files.fields
    budgets = budgets_for(card, budget)
    ways = engine_evaluations(engine, card, backend, threads, device, plan_cache, log)
    if no_gpu := instead_of_gpu(device, [engine]):
        log.warn(f"{engine}: {no_gpu}; its graph is checked instead, on the CPU")
    expected, reference_files = reference_evaluation(card, reference, normalisation, threads)
    limit = subject.wants.memory_limit
    limit = available_bytes() if limit is None else limit
    planner = CasePlanner(card, shapes_for(card, shapes), patch, limit)
    inputs: list[dict[str, Any]] = []
    cases: list[Case] = []
    if subject.draws:
        log.stage("drawing heads")
        if not fields:
            log.warn("no FIELD was named: checking on drawn heads; name a real one too")
        cases += planner.heads()
        heads = {case.subject: _grid(case.measured) for case in cases}
        inputs.append({"name": PHANTOM, "heads": heads})
    if fields:
        log.stage("reading")
        prepared, about = _read(subject, card)
        for note in prepared.scan.notes:
            log.warn(note)
        inputs.append(about)
        cases += planner.field(" + ".join(path.name for path in fields), prepared)

    with using_threads(threads):
        compared = list(_compare(cases, ways, expected, log))
    rows = [one.row for one in compared]
    missing = unmeasured(rows, budgets)
    if asked := [name for name, _ in budget if name in missing]:
        raise UsageError(
            f"--budget {asked[0]} cannot be judged on {', '.join(map(str, fields))}: "
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
        "engine": _about_engine(engine, card),
        "reference": {"files": [_file(path) for path in reference_files], "how": expected.how},
        "evaluations": [{"by": way.name, "how": way.how} for way in ways],
        "inputs": inputs,
        "comparisons": rows,
        "versions": {"python": platform.python_version(), **library_versions()},
    }
    if html is not None:
        log.stage("drawing the report")
        from qsm_deploy.export.check.report import report_html

        write_atomically(html, report_html(document, compared).encode(), force=force)
    log.stage("")
    return Checked(document, tuple(failed))


def _read(subject: Subject, card: ModelCard) -> tuple[Prepared, dict[str, Any]]:
    """Return the scan as maps of it are compared and as the network takes it, and about it."""
    files = subject.files
    if card.pipeline == "after":
        raise UsageError(
            f"{card.network} is one of two networks that follow each other: check it on the phantom"
        )
    if files.mask is None:
        raise UsageError("maps are compared inside a mask: pass it with -m MASK")
    require_field_count(card, len(files.fields))
    needs = needs_of(card)
    if needs.maps:
        raise UsageError(
            f"{card.network} takes {' and '.join(needs.maps)} besides the field, which is not read "
            "here: check it on the phantom, without files"
        )
    reading = replace(subject.reading, quantity=needs.quantity, keeps_outside=needs.unmasked)
    measured = load_scan(files, reading)
    for path, volume in zip(files.fields, measured.measured, strict=True):
        inside = volume[measured.mask]
        if not varies(inside.astype(np.float64)):
            raise DataError(
                f"{path}: constant in the mask ({inside[0]:.4g} after scaling), so there is "
                "nothing to compare; pass a measured field map"
            )
    prepared = prepare(needs, measured, subject.wants)
    named = {"mask": files.mask, "truth": files.truth, "labels": files.labels}
    about = {
        "name": " + ".join(path.name for path in files.fields),
        "fields": [_file(path) for path in files.fields],
        **{name: _file(path) for name, path in named.items() if path is not None},
        "units": subject.reading.units or ("rad" if needs.quantity == "phase_rad" else "ppm"),
        **_grid(prepared.measured),
        "notes": prepared.scan.notes,
    }
    return prepared, about


def _compare(
    cases: Sequence[Case], ways: Sequence[Evaluation], reference: Evaluation, log: TerminalLog
) -> Iterator[Compared]:
    """Yield every comparison, by case and output; sessions are opened one after the other."""
    engines = {way.name: _maps(cases, way, "the engine", log) for way in ways}
    expected = _maps(cases, reference, "the reference", log)
    gives = needs_of(reference.card).gives
    for (n, case), output in itertools.product(enumerate(cases), gives):
        log.stage(f"comparing {case.where}")
        scan = case.measured
        if output != CHI:  # which alone the truth and the field are of
            scan = replace(scan, truth_ppm=None)
        takes_field = scan.quantity == "local_field_ppm" and reference.card.pipeline != "after"
        field = scan.measured[0] if takes_field and output == CHI else None
        known = reference_from(expected[n][output], scan, field)
        for by, maps in engines.items():
            about = {
                "subject": case.subject,
                "shape": list(scan.geometry.shape),
                "run": case.run,
                "output": output,
                "by": by,
                "where": ", ".join((case.where, *([output] if len(gives) > 1 else []), by)),
            }
            row: dict[str, Any] = about | compare(maps[n][output], known)
            if "worst_voxel" in row:
                row["worst_voxel"] = list(case.stored_voxel(row["worst_voxel"]))
            yield Compared(case, row, maps[n][output], expected[n][output])


def _maps(
    cases: Sequence[Case], way: Evaluation, what: str, log: TerminalLog
) -> list[dict[str, Volume]]:
    """Return all that is made of each case, by the names in cards."""
    log.stage(f"opening {what}")
    reconstructor = reconstructor_of(way.open(), Path(way.card.network))
    found = []
    for case in cases:
        log.stage(f"{what}, {way.name}: {case.where}")
        wants = Wants(layout=case.plan, any_values=True)
        planned = reconstructor.planned(case.prepared, wants)
        made = reconstructor.run(planned, Stages())
        found.append({reconstructor.inversion.needs.gives[0]: made.map_ppm, **made.further})
    return found


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
