"""One scan from its files to its map, judged, drawn and written."""

from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.atomic import write_together
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.job import report
from qsm_deploy.runtime.job.beginning import Beginning
from qsm_deploy.runtime.job.memory_limit import (
    memory_errors,
    require_memory_to_load,
    within_process,
)
from qsm_deploy.runtime.job.outputs import MAP_NAMES
from qsm_deploy.runtime.job.request import Request
from qsm_deploy.runtime.metrics.doubts import doubt_of_sign
from qsm_deploy.runtime.reconstruction.inversion import CHI, CPU, Made
from qsm_deploy.runtime.reconstruction.memory import available_bytes
from qsm_deploy.runtime.reconstructor import (
    Host,
    Maker,
    Planned,
    Reconstructor,
    open_reconstructor,
)
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from qsm_deploy.runtime.scan.scan import Scan, ScanFiles, load_scan
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

LOCAL: Final = "local_field_ppm"
NEEDS_MASK = (
    "needs the mask of the brain; pass it with -m, or have it beside the images in a dataset"
)


@dataclass(frozen=True)
class Finished:
    """What a run made.

    Attributes
    ----------
    report
        Everything that decided the result, and what was found.
    planned
        What was to be done.
    maps
        What is given, by the names in cards; nothing if only its plan was asked for.
    scan
        What it was made of, unless nothing was.
    """

    report: dict[str, Any]
    planned: Planned
    maps: dict[str, Volume] = field(default_factory=dict)
    scan: Scan | None = None


def read_scan(request: Request, reconstructor: Reconstructor) -> Scan:
    """Return the acquisition as it was measured, in the quantity that is needed.

    Raises
    ------
    MemoryLimitError
        If its headers announce more than the memory that it may take.
    QsmDeployError
        If a file cannot be read, or is not what it should be.
    """
    needs = reconstructor.needs
    _parts(reconstructor)[0].inversion.require_fields(len(request.files.fields))
    if (needs.quantity, needs.gives) == ("phase_rad", (LOCAL,)) and request.files.mask is None:
        raise UsageError(f"{needs.network} {NEEDS_MASK}")
    _require_maps(reconstructor, request.files)
    limit = request.wants.memory_limit
    if reconstructor.inversion.facts()["backend"]["device"] != CPU:
        limit = None  # that of the GPU
    require_memory_to_load(_read_of(request), limit)
    reading = replace(request.reading, quantity=needs.quantity, keeps_outside=needs.unmasked)
    return load_scan(request.files, reading)


def _read_of(request: Request) -> tuple[Path | None, ...]:
    """Return every file of voxels that a request names, the fields first."""
    fields, *others, images = *request.files, request.begins.images
    echoes = () if images is None else (*images.phase, *images.magnitude)
    several = (each if isinstance(each, tuple) else (each,) for each in others)
    paths = (*fields, *chain.from_iterable(several), *(echo.path for echo in echoes))
    return tuple(dict.fromkeys(paths))


def _parts(reconstructor: Reconstructor) -> tuple[Reconstructor, ...]:
    """Return the parts of a chain, the first one first."""
    before = () if reconstructor.before is None else _parts(reconstructor.before)
    return (*before, reconstructor)


def _require_maps(reconstructor: Reconstructor, files: ScanFiles) -> None:
    """Refuse maps that are missing, or that nothing takes.

    Raises
    ------
    UsageError
        If there is one.
    """
    wanted = reconstructor.needs.maps
    takers = {name: p.inversion.needs.network for p in _parts(reconstructor) for name in wanted}
    for name, path in ((CHI, files.chi), ("r2prime_hz", files.r2prime)):
        flag = f"--{name.rpartition('_')[0]}"
        if name in wanted and path is None:
            raise UsageError(f"{takers[name]} takes {name} besides the field; pass {flag} FILE")
        if name not in wanted and path is not None:
            given = " and ".join(p.inversion.needs.network for p in _parts(reconstructor))
            raise UsageError(f"{flag} is for networks that take it, {given} does not")


def measured_scan(
    request: Request, reconstructor: Reconstructor, log: TerminalLog, stages: Stages
) -> tuple[Scan, dict[Path, bytes]]:
    """Return the acquisition in the quantity that is needed, and the maps that are kept.

    Raises
    ------
    UsageError
        If a field is made and the network takes none.
    QsmDeployError
        As :func:`read_scan`, or if a step on the way to the field fails.
    """
    needs, begins = reconstructor.needs, request.begins
    before = _parts(reconstructor)[:-1]
    if begins.steps is None:
        with stages("load"):
            return read_scan(request, reconstructor), {}
    on_cpu = reconstructor.inversion.facts()["backend"]["device"] == CPU
    limit_bytes = (on_cpu and request.wants.memory_limit) or available_bytes()
    _require_maps(reconstructor, request.files)
    if needs.quantity != LOCAL:
        _require_default_steps(needs.network, begins)
        if "local_field" in begins.keeps and not any(p.needs.gives == (LOCAL,) for p in before):
            raise UsageError(
                f"{reconstructor.inversion.name} is handed no local field that --local-field could "
                "keep; name what is given with -o"
            )
    if needs.unmasked and begins.images is not None:
        raise UsageError(
            f"{needs.network} takes the field of the whole head, and of echoes that of the brain "
            "is made; pass it with --total-field"
        )
    if needs.quantity == "phase_rad":
        return _phase_scan(request, reconstructor, stages, limit_bytes), {}
    _parts(reconstructor)[0].inversion.require_fields(1)
    if needs.quantity == "total_field_ppm":
        keeps = {name: path for name, path in begins.keeps.items() if name != "local_field"}
        reading = replace(request.reading, keeps_outside=needs.unmasked)
        begins = replace(begins, until="total-field", keeps=keeps)
        request = replace(request, begins=begins, reading=reading)
    else:
        request = replace(request, begins=_beside(begins, reconstructor))
    scan, kept = field_scan(
        request, log, stages, limit_bytes=limit_bytes, keeps_magnitude=needs.magnitude
    )
    return scan if needs.takes_noise else replace(scan, noise_ppm=None), kept


def _require_default_steps(network: str, begins: Beginning) -> None:
    """Refuse steps to a local field where a network takes none."""
    from qsm_deploy.runtime.local_field.from_echoes import STEPS

    if begins.steps != STEPS:
        raise UsageError(
            f"--background-removal and --erode are for a local field, {network} takes none; drop "
            "them"
        )


def _phase_scan(
    request: Request, reconstructor: Reconstructor, stages: Stages, limit_bytes: float
) -> Scan:
    """Return the wrapped phase of all echoes, for a network that takes it."""
    from qsm_deploy.runtime.local_field.scans import phase_scan, with_maps

    begins, needs = request.begins, reconstructor.needs
    if begins.images is None:
        raise UsageError(f"{needs.network} takes the wrapped phase; pass it with --phase")
    if unmade := begins.keeps.keys() - {"local_field"}:
        name = min(unmade).replace("_", "-")
        raise UsageError(f"{needs.network} makes no {name} on its way; drop --{name}")
    if request.files.mask is None:
        raise UsageError(f"{needs.network} {NEEDS_MASK}")
    require_memory_to_load(_read_of(request), limit_bytes)
    with stages("load"):
        scan = phase_scan(begins.images, request.files, request.reading, limit_bytes)
        scan = with_maps(scan, request.files)
    _parts(reconstructor)[0].inversion.require_fields(len(scan.measured))
    return scan


def _beside(begins: Beginning, reconstructor: Reconstructor) -> Beginning:
    """Return where a run begins, its background removal on the GPU that the inversion is on."""
    place = getattr(reconstructor.inversion, "place", None)
    if place is None or begins.steps is None:
        return begins
    from qsm_deploy.runtime.gpu.two_prior import TwoPriorOnGpu
    from qsm_deploy.runtime.local_field.background.two_prior import TwoPrior

    remove = begins.steps.remove
    if not isinstance(remove, TwoPrior):
        return begins
    return replace(begins, steps=replace(begins.steps, remove=TwoPriorOnGpu(place, remove)))


def field_scan(
    request: Request,
    log: TerminalLog,
    stages: Stages,
    *,
    limit_bytes: float,
    keeps_magnitude: bool = False,
) -> tuple[Scan, dict[Path, bytes]]:
    """Return the last field that is wanted, and the maps that are kept, as files.

    Raises
    ------
    QsmDeployError
        If a file cannot be read, or a step fails.
    """
    from qsm_deploy.runtime.local_field import scans

    begins, files, keeps = request.begins, request.files, request.begins.keeps
    assert begins.steps is not None
    steps = scans.DRY if request.dry_run else begins.steps
    maps: dict[str, Volume] = {}
    require_memory_to_load(_read_of(request), limit_bytes)
    if begins.images is not None:
        scan, maps = scans.total_field_scan(
            begins.images,
            files,
            request.reading,
            steps,
            limit_bytes=limit_bytes,
            stages=stages,
            keeps_magnitude=keeps_magnitude,
            wants_r2_star=scans.R2_STAR in keeps and not request.dry_run,
        )
        made = scan.facts
        log.tell(f"{len(made['echo_times_s'])} echoes, {'; '.join(made['phase_scales'])}")
    else:
        with stages("load"):
            scan = load_scan(files, replace(request.reading, quantity="total_field_ppm"))
    if files.chi is not None or files.r2prime is not None:
        scan = scans.with_maps(scan, files)
    if request.dry_run:
        return scan if begins.until == "total-field" else replace(scan, quantity=LOCAL), {}
    if begins.until != "total-field":
        with log.progress(steps.remove.steps) as bar:
            scan = scans.local_field_scan(
                scan, steps, limit_bytes=limit_bytes, stages=stages, done=bar.update
            )
        maps[scans.LOCAL] = scan.measured[0]
    scans.require_maps(set(keeps), maps)
    with stages("write"):
        return scan, {
            path: nifti_bytes(
                scan.axes.turn_back(maps[name]),
                None,
                description=f"{name.replace('_', ' ')} [{scans.UNITS[name]}]",
                like=scan.header,
                compress=path.name.endswith(".gz"),
            )
            for name, path in keeps.items()
        }


def run_scan(
    request: Request,
    reconstructor: Reconstructor,
    measured: Scan,
    log: TerminalLog,
    stages: Stages,
    kept: dict[Path, bytes] | None = None,
) -> Finished:
    """Reconstruct one acquisition, and write what was asked for.

    Parameters
    ----------
    request
        What is done with it.
    reconstructor
        What does it.
    measured
        The acquisition.
    log, stages
        Take notes and progress, times and memory.
    kept
        Files that are written with the map.

    Raises
    ------
    QsmDeployError
        As :meth:`Reconstructor.plan` and :meth:`Reconstructor.run` do, or if an output cannot be
        written.
    """
    with stages("load"):
        planned = reconstructor.plan(measured, request.wants)
    measured = planned.prepared.measured
    if request.outputs.slices is not None:
        from qsm_deploy.runtime.page.planes import voxel_at

        voxel_at(request.outputs.slices, measured)  # or it is refused, before anything is computed
    for note in planned.notes:
        log.warn(note)
    log.tell(f"{reconstructor.inversion.name}: {reconstructor.why_backend}")
    run = report.describe_run(request, reconstructor, planned)
    if request.dry_run:
        return Finished(run, planned)
    for note in planned.task.notes:
        log.warn(note)
    with log.progress(planned.task.runs) as bar, memory_errors():
        made = reconstructor.run(planned, stages, bar.update)
    measured = made.scan or measured
    gives = reconstructor.needs.gives
    maps = dict(zip(gives, made.volumes, strict=True))
    notes = made.findings.pop("notes", [])
    if measured.quantity == "local_field_ppm" and gives == (CHI,):
        notes += doubt_of_sign(made.map_ppm, measured.mask, measured.geometry)
    outputs = request.outputs
    if outputs.dtype == "int16" and outputs.given:
        from qsm_deploy.runtime.job.whole_ppb import step_note, step_ppb

        run["step_ppb"] = step_ppb(made.volumes)
        notes += [step_note(run["step_ppb"])] * (run["step_ppb"] > 1)
    for note in notes:
        log.warn(note)
    run["input"]["notes"] += notes
    run |= made.findings
    if "precision_error" in made.findings:
        log.warn(report.precision_text(run["model"]["precision"], run["precision_error"]))
    files = _map_files(request, run, made, gives, stages) | (kept or {})
    files |= _between_files(request, made, stages)
    try:
        if (images := outputs.dicom) is not None and measured.affine is not None:
            with stages("DICOM"):
                files |= images.files(maps, measured.affine, run)
        evaluates = request.wants.evaluates and gives == (CHI,)
        run |= _judge(made, measured, stages, evaluates=evaluates)
        if outputs.figure is not None:
            from qsm_deploy.runtime.job.looks import drawing

            with stages("figure"):
                files[outputs.figure] = drawing(run, measured, maps, outputs)
        run |= report.resources(stages, measured, planned.task.decision)
        if outputs.report is not None:
            files[outputs.report] = report.json_bytes(run)
        if outputs.html is not None:
            from qsm_deploy.runtime.job.looks import run_page

            files[outputs.html] = run_page(run, measured, maps, outputs, request.files)
    finally:  # the map outlives what fails after it
        write_together(files, force=outputs.force)
    log.stage("")
    return Finished(run, planned, maps, measured)


def _judge(made: Made, scan: Scan, stages: Stages, *, evaluates: bool) -> dict[str, Any]:
    """Return the field residual, unless it is known already, and, with a truth, the metrics."""
    findings: dict[str, Any] = {}
    step = made.findings.get("data_consistency", {})
    known = step.get("field_residual_after", made.findings.get("field_residual"))
    if known is not None:
        findings["field_residual"] = known
    elif evaluates and scan.quantity == "local_field_ppm":
        from qsm_deploy.runtime.metrics.metrics import field_residual

        with stages("field residual"):
            findings["field_residual"] = field_residual(
                made.map_ppm, scan.measured[0], scan.mask, scan.geometry
            )
    if scan.truth_ppm is not None:
        from qsm_deploy.runtime.metrics.metrics import all_metrics

        with stages("metrics"):
            findings["metrics"] = all_metrics(made.map_ppm, scan.truth_ppm, scan.mask, scan.labels)
    return findings


def _map_files(
    request: Request, run: dict[str, Any], made: Made, gives: tuple[str, ...], stages: Stages
) -> dict[Path, bytes]:
    """Return the sidecars and the maps, if they are to be written."""
    outputs, files = request.outputs, dict[Path, bytes]()
    if not outputs.given:
        return {}
    with stages("write"):
        for path, sidecar, name, volume in zip(
            outputs.given, outputs.sidecars, gives, made.volumes, strict=True
        ):
            files[sidecar] = report.json_bytes({**request.labels, **run})
            said = f"{MAP_NAMES[name]} [{outputs.units}] {run['title']}"
            stored, slope = _stored(volume, outputs.units, run.get("step_ppb"))
            files[path] = _nifti(stored, made, said, path, slope)
    return files


def _between_files(request: Request, made: Made, stages: Stages) -> dict[Path, bytes]:
    """Return the local field that a part of a chain gave, if it is to be kept."""
    path = request.outputs.maps.get("local_field")
    if path is None or LOCAL not in made.between:
        return {}
    with stages("write"):
        return {path: _nifti(made.between[LOCAL], made, "local field [ppm]", path)}


def _stored(volume_ppm: Volume, unit: str, step: int | None) -> tuple[NDArray[Any], float]:
    """Return a map as it is stored, whole or in steps [ppb], and what it is multiplied by."""
    per_ppm = PPB_PER_PPM if unit == "ppb" else 1.0
    if step is not None:
        from qsm_deploy.runtime.job.whole_ppb import in_steps

        return in_steps(volume_ppm, step), step * per_ppm / PPB_PER_PPM
    return (volume_ppm * np.float32(per_ppm) if unit == "ppb" else volume_ppm), 1.0


def _nifti(
    volume: NDArray[Any], made: Made, description: str, path: Path, slope: float = 1.0
) -> bytes:
    scan = made.scan
    assert scan is not None  # it was made of one
    return nifti_bytes(
        scan.axes.turn_back(volume),
        None,
        description=description,
        like=scan.header,
        slope=slope,
        compress=path.name.endswith(".gz"),
    )


def run_request(request: Request, maker: Maker, host: Host, log: TerminalLog) -> Finished:
    """Open the models or the method, read the acquisition, and reconstruct it.

    Raises
    ------
    QsmDeployError
        If anything is wrong with models, files or options, or what runs the network fails.
    """
    stages = Stages(log.stage)
    request = replace(request, wants=within_process(request.wants, host.device, maker))
    limit = request.wants.memory_limit
    with stages("load"), memory_errors():
        reconstructor = open_reconstructor(maker, host, log, stays=False, memory_limit=limit)
    measured, kept = measured_scan(request, reconstructor, log, stages)
    return run_scan(request, reconstructor, measured, log, stages, kept)


def run_field(request: Request, log: TerminalLog) -> tuple[dict[str, Any], Scan]:
    """Make a field and write what is kept of it; return a report, and its scan.

    Raises
    ------
    QsmDeployError
        If anything is wrong with files or options, or a step fails.
    """
    stages = Stages(log.stage)
    limit = request.wants.memory_limit or available_bytes()
    scan, files = field_scan(request, log, stages, limit_bytes=limit)
    for note in scan.notes:
        log.warn(note)
    run = report.describe_field(request, scan) | report.resources(stages, scan)
    outputs = request.outputs
    if outputs.report is not None:
        files[outputs.report] = report.json_bytes(run)
    if not request.dry_run:
        write_together(files, force=outputs.force)
    log.stage("")
    return run, scan
