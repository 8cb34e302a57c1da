"""One run of ``qsm-run``: read, plan, reconstruct, judge, write."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime import plan_file, report
from qsm_deploy.runtime.after import in_order, plan_first_part, rough_scan
from qsm_deploy.runtime.atomic import check_writable, write_atomically
from qsm_deploy.runtime.card import ModelCard
from qsm_deploy.runtime.correction import AUTO, Correction
from qsm_deploy.runtime.erosion import erode_mask
from qsm_deploy.runtime.figure import figure_png, require_matplotlib
from qsm_deploy.runtime.geometry_limits import deviations, require_geometry
from qsm_deploy.runtime.memory import Workload, available_bytes
from qsm_deploy.runtime.metrics import all_metrics, field_residual
from qsm_deploy.runtime.nifti import nifti_bytes
from qsm_deploy.runtime.params import Params, load_params
from qsm_deploy.runtime.pipeline import Volume, reconstruct, require_field_count
from qsm_deploy.runtime.planning import PatchOptions, decide
from qsm_deploy.runtime.precision_check import precision_error
from qsm_deploy.runtime.resampling import resample_map, resample_scan
from qsm_deploy.runtime.scan import Quantity, Reading, Scan, ScanFiles, load_scan
from qsm_deploy.runtime.session import Session, choose_backend, open_session, require_backend
from qsm_deploy.runtime.stages import Stages
from qsm_deploy.runtime.terminal import TerminalLog

BUNDLED_MODEL = Path(__file__).with_name("tkd-unet.onnx")
MODEL_SUFFIXES = (".onnx", plan_file.SUFFIX)
PPB_PER_PPM = 1000


@dataclass(frozen=True)
class Outputs:
    """The files that a run writes."""

    chi: Path
    sidecar: Path
    report: Path | None
    figure: Path | None

    def check(self, inputs: Iterable[Path | None], *, force: bool) -> None:
        """Refuse outputs that collide or cannot be written, before any work is done."""
        read = {path.resolve() for path in inputs if path is not None}
        written: set[Path] = set()
        for path in (self.chi, self.sidecar, self.report, self.figure):
            if path is None:
                continue
            if path.resolve() in read:
                raise UsageError(f"{path} is an input of this run; choose another output")
            if path.resolve() in written:
                raise UsageError(f"two outputs would go to {path}; choose another name for one")
            written.add(path.resolve())
            check_writable(path, force=force)


def run_job(arguments: argparse.Namespace) -> str:
    """Do what the command line asks for and return what to print."""
    models, fields = models_and_fields(arguments.files)
    files = ScanFiles(fields, arguments.mask, arguments.truth, arguments.labels)
    outputs = outputs_from(arguments, fields[0])
    outputs.check([*models, *fields, *files[1:], arguments.params], force=arguments.force)
    if arguments.labels is not None and arguments.truth is None:
        raise UsageError("--labels needs --truth: regional metrics compare with a truth")
    if arguments.figure is not None:
        require_matplotlib()
    reading, correction = reading_from(arguments), correction_from(arguments)

    backend, why = choose_backend(arguments.backend, arguments.precision)
    require_backend(backend)
    log = TerminalLog(quiet=arguments.quiet)
    stages = Stages(log.stage)
    with stages("load"):
        sessions = [
            open_session(m, backend, precision=arguments.precision, threads=arguments.threads)
            for m in models
        ]
        order = in_order([session.card for session in sessions])
        model, session = models[order[-1]], sessions[order[-1]]
        require_field_count(session.card, len(fields))
        wants_phase = session.card.task == "phase->chi"
        quantity: Quantity = "phase_rad" if wants_phase else "local_field_ppm"
        measured = load_scan(files, replace(reading, quantity=quantity))
        if correction is not None:
            correction.require(measured)
        measured, scan = prepared(session.card, measured, resample=arguments.resample)
    for note in scan.notes:
        log.warn(note)
    departures = deviations(session.card.geometry, scan.geometry)
    if not arguments.allow_geometry:
        require_geometry(session.card.geometry, scan.geometry)
    for departure in departures:
        log.warn(f"outside the training: {departure}")

    evaluates = arguments.report is not None or (arguments.json and not arguments.dry_run)
    workload = Workload(
        scan,
        session.card,
        backend,
        evaluates=evaluates,
        corrects=correction is not None,
        draws=arguments.figure is not None,
        compares_precision=session.precision != "fp32",
        held_bytes=0 if scan is measured else measured.nbytes,
    )
    limit = available_bytes() if arguments.memory_limit is None else arguments.memory_limit
    options = PatchOptions(arguments.patch, arguments.overlap, arguments.blend)
    first = None
    if len(order) > 1:
        if session.precision != "fp32":
            raise UsageError("the two parts of after-qsm run in fp32 only; drop --precision")
        recon = order[0]
        first = plan_first_part(models[recon], sessions[recon], backend, scan, options, limit)
    del sessions  # or the first network would stay when it is done
    decision = decide(workload, options, limit)
    run = report.describe_run(arguments, model, files, session, why, scan, decision, departures)
    if first is not None:
        run["first_part"] = report.describe_first_part(first)
    if arguments.dry_run:
        text = report.dry_run_text(run, limit, outputs.chi)
        return report.json_line(run) if arguments.json else text
    total = decision.plan.count * rounds(session.card)
    if first is not None:
        total += first.decision.plan.count
        if not first.decision.exact:
            log.warn(report.patches_text(first.session.card, first.decision.plan))
    if not decision.exact:
        log.warn(report.patches_text(session.card, decision.plan))
    with log.progress(total) as bar:
        entering = scan if first is None else rough_scan(first, scan, stages, bar.update)
        del first
        chi = reconstruct(session, entering, decision.plan, stages, bar.update)
        del entering
    if scan is not measured:
        chi = resample_map(chi, measured.mask)
    if session.precision != "fp32":
        run["precision_error"] = _precision_error(arguments, model, session, scan, stages)
        log.warn(report.precision_text(session.precision, run["precision_error"]))
    del session  # its memory is not needed any more
    if correction is not None:
        chi, run["data_consistency"] = correction.apply(chi, measured, stages)
    _write(arguments, outputs, run, chi, measured, stages)  # first: what follows may fail
    known = run.get("data_consistency", {}).get("field_residual_after")
    findings = _judge(chi, measured, stages, evaluates=evaluates, residual=known)
    if outputs.figure is not None:
        _draw(outputs.figure, report.title(run), chi, measured, stages, force=arguments.force)
    full = run | findings | report.resources(stages, decision)
    if outputs.report is not None:
        write_atomically(outputs.report, report.json_bytes(full), force=arguments.force)
    log.stage("")
    return report.json_line(full) if arguments.json else report.result_text(full, outputs.chi)


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


def models_and_fields(files: list[Path]) -> tuple[list[Path], tuple[Path, ...]]:
    """Return the models, the bundled one unless a file is one, and the field maps.

    Raises
    ------
    UsageError
        If there is no field map.
    """
    models = [path for path in files if path.suffix in MODEL_SUFFIXES]
    fields = tuple(path for path in files if path.suffix not in MODEL_SUFFIXES)
    if not fields:
        raise UsageError(
            f"a field map (.nii or .nii.gz) is needed besides {', '.join(map(str, files))}"
        )
    return models or [BUNDLED_MODEL], fields


def reading_from(arguments: argparse.Namespace) -> Reading:
    """Return how the flags and the parameter file say the fields are to be understood."""
    directions = [tuple(b) for b in arguments.b0_direction or ()]
    flags = Params(
        arguments.echo_time,
        arguments.field_strength,
        directions[0] if directions else None,
        arguments.voxel_size,
    )
    return Reading(
        units=arguments.units,
        flags=flags,
        from_file=Params() if arguments.params is None else load_params(arguments.params),
        more_b0_directions=tuple(directions[1:]),
        negate=arguments.negate,
    )


def correction_from(arguments: argparse.Namespace) -> Correction | None:
    """Return the data-consistency step that was asked for.

    Raises
    ------
    UsageError
        If there are iterations without a weight.
    """
    lam, iterations = arguments.data_consistency, arguments.dc_iterations
    if lam is None:
        if iterations is not None:
            raise UsageError("--dc-iterations needs --data-consistency LAMBDA")
        return None
    if lam == "auto":
        return AUTO if iterations is None else replace(AUTO, iterations=iterations)
    return Correction(lam, iterations)


def rounds(card: ModelCard) -> int:
    """Return how often the network runs in one reconstruction."""
    return int(card.constants["iterations"]) if card.patchable == "split" else 1


def outputs_from(arguments: argparse.Namespace, field: Path) -> Outputs:
    """Return where the results go: beside the field, unless told otherwise.

    Raises
    ------
    UsageError
        If the map's name does not end in .nii or .nii.gz, or the figure's not in .png.
    """
    chi = arguments.output
    if chi is None:
        chi = field.with_name(f"{_stem(field)}_chi.nii.gz")
    if not chi.name.endswith((".nii", ".nii.gz")):
        raise UsageError(f"--output {chi} must end in .nii or .nii.gz")
    if arguments.figure is not None and arguments.figure.suffix != ".png":
        raise UsageError(f"--figure {arguments.figure} must end in .png")
    return Outputs(chi, chi.with_name(f"{_stem(chi)}.json"), arguments.report, arguments.figure)


def _precision_error(
    arguments: argparse.Namespace, model: Path, session: Session, scan: Scan, stages: Stages
) -> dict[str, float]:
    with stages("precision check"):
        reference = open_session(model, session.backend, threads=arguments.threads)
        return precision_error(session, reference, scan)


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


def _write(
    arguments: argparse.Namespace,
    outputs: Outputs,
    run: dict[str, Any],
    chi: Volume,
    scan: Scan,
    stages: Stages,
) -> None:
    """Write the sidecar, then the map: where there is a map, there is its sidecar."""
    with stages("write"):
        volume = chi * np.float32(PPB_PER_PPM) if arguments.out_units == "ppb" else chi
        nifti = nifti_bytes(
            volume,
            scan.affine,
            description=f"chi [{arguments.out_units}] {report.title(run)}",
            like=scan.header,
            compress=outputs.chi.name.endswith(".gz"),
        )
        write_atomically(outputs.sidecar, report.json_bytes(run), force=arguments.force)
        write_atomically(outputs.chi, nifti, force=arguments.force)


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


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
