"""What one run of ``qsm-run`` is asked for, checked before any work is done."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import TASKS
from qsm_deploy.runtime.card.read import ONNX, PLAN, load_card
from qsm_deploy.runtime.console.inputs import refuse_weights, require_files
from qsm_deploy.runtime.job.beginning import Beginning, Until, beginning_of
from qsm_deploy.runtime.job.outputs import (
    MAP_NAMES,
    OutDtype,
    Outputs,
    OutUnits,
    output_files,
    require_dtype,
)
from qsm_deploy.runtime.methods.method import DEFAULT, Method
from qsm_deploy.runtime.reconstruction.inversion import CHI, Wants
from qsm_deploy.runtime.reconstruction.patches import Blend
from qsm_deploy.runtime.reconstruction.planning import PatchOptions, PatchSize
from qsm_deploy.runtime.reconstructor import Maker, models_of
from qsm_deploy.runtime.scan.params import Params, Vector, load_params
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles
from qsm_deploy.runtime.scan.unit_names import SCALES, UNITS, FieldUnit, unit_named
from qsm_deploy.runtime.sessions.bundled import BUNDLED

if TYPE_CHECKING:
    from qsm_deploy.runtime.dicom.output import DicomOut

MODEL_SUFFIXES = (ONNX, PLAN)
SUFFIXES = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Request:
    """One run: what is read, how it is understood, what is done, and what is written.

    Attributes
    ----------
    files
        The acquisition's.
    reading
        How the measured volumes are to be understood.
    wants
        What is asked of the reconstruction.
    outputs
        What is written.
    params
        The parameter file, whose content is in the reading.
    labels
        What the sidecar says besides the facts of the run.
    dry_run
        Whether to stop before anything is computed.
    begins
        Where it begins, if not with a field for the inversion.
    """

    files: ScanFiles
    reading: Reading
    wants: Wants = field(default_factory=Wants)
    outputs: Outputs = field(default_factory=Outputs)
    params: Path | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    begins: Beginning = field(default_factory=Beginning)


def make_request(
    fields: Sequence[PathLike] = (),
    *,
    phase: PathLike | Sequence[PathLike] | None = None,
    real: PathLike | Sequence[PathLike] | None = None,
    imag: PathLike | Sequence[PathLike] | None = None,
    total_field: PathLike | None = None,
    local_field: PathLike | None = None,
    quality: PathLike | None = None,
    r2star: PathLike | None = None,
    brain_mask: PathLike | None = None,
    background_removal: str | None = None,
    erode: float | None = None,
    until: Until = "chi",
    mask: PathLike | None = None,
    truth: PathLike | None = None,
    labels: PathLike | None = None,
    magnitude: PathLike | Sequence[PathLike] | None = None,
    noise_map: PathLike | None = None,
    chi: PathLike | None = None,
    r2prime: PathLike | None = None,
    params: PathLike | None = None,
    output: PathLike | None = None,
    report: PathLike | None = None,
    figure: PathLike | None = None,
    dicom_out: "DicomOut | None" = None,
    html: PathLike | None = None,
    html_names: bool = False,
    slices: Sequence[float] | None = None,
    window: Sequence[float] | None = None,
    out_units: OutUnits = "ppm",
    out_dtype: OutDtype = "float32",
    force: bool = False,
    units: FieldUnit | None = None,
    echo_time: float | None = None,
    echo_times: Sequence[float] | None = None,
    field_strength: float | None = None,
    b0_direction: Sequence[Sequence[float]] | None = None,
    voxel_size: Sequence[float] | None = None,
    negate: bool = False,
    phase_scale: str | None = None,
    inputs: Sequence[Path] = (),
    gives: Sequence[str] = (CHI,),
    evaluates: bool = False,
    dry_run: bool = False,
    **wanted: Any,
) -> Request:
    """Return what is asked for, by the names of the command line's flags.

    Parameters
    ----------
    fields
        Field maps, one for each orientation, or a wrapped phase.
    phase, real, imag, total_field, local_field, quality, r2star, brain_mask
    background_removal, erode, until
        Where it begins, how the local field is made, and what is kept; see
        :func:`beginning_of`.
    mask, truth, labels, magnitude, noise_map, params
        Files that are read besides: a magnitude or one of each echo, a noise map in ppm.
    chi, r2prime
        Susceptibility [ppm] and R2' [Hz], for networks that take them.
    output, report, figure, html
        Files that are written; without ``output`` no map is.
    dicom_out
        The DICOM images that the map is written as.
    html_names
        Whether the page names the files that were read.
    slices, window
        Where the planes of figure and page lie, as their titles say it, and the lowest and the
        highest susceptibility that they show, in ``out_units``.
    out_units, out_dtype
        Of the map, as it is stored.
    force
        Whether existing outputs are overwritten.
    units, echo_time, echo_times, field_strength, b0_direction, voxel_size, negate, phase_scale
        How the fields are to be understood; see :func:`reading_from`.
    inputs
        What else is read, and must not be written over.
    gives
        What is made, by the names in cards; see :func:`gives_of`.
    evaluates
        Whether the field residual is computed though no report is written.
    dry_run
        Whether to stop before anything is computed.
    **wanted
        As for :func:`wants_from`.

    Raises
    ------
    UsageError
        If options contradict each other, or an output exists or cannot be written.
    DataError
        If an input is missing, or the parameter file cannot be read.
    MissingDependencyError
        If a figure is asked for without matplotlib.
    """
    signal, phases, reals, imags = (
        () if p is None else paths_of(p) for p in (magnitude, phase, real, imag)
    )
    if reals or imags:
        if phases or signal or not (reals and imags):
            raise UsageError("--real and --imag go together, in place of --phase and --magnitude")
        phases, signal = reals, imags
    mask_path, truth_path, labels_path, params_path, chi_path, r2prime_path = paths = [
        _path(p) for p in (mask, truth, labels, params, chi, r2prime)
    ]
    require_files(inputs, "model file")
    require_files([*map(Path, fields), *phases, *signal, *paths])
    require_dtype(out_dtype, gives if until == "chi" else (until,))
    begins = beginning_of(
        tuple(map(Path, fields)),
        phase=phases,
        magnitude=signal,
        are_parts=bool(reals),
        total_field=_path(total_field),
        local_field=_path(local_field),
        noise_map=_path(noise_map),
        quality=_path(quality),
        r2star=_path(r2star),
        brain_mask=_path(brain_mask),
        background_removal=background_removal,
        erode=erode,
        until=until,
        of_a_map={
            "output": output,
            "figure": figure,
            "html": html,
            "truth": truth,
            "labels": labels,
            "dicom-out": dicom_out,
        },
    )
    if not begins.fields:
        raise UsageError(
            "a field map (.nii or .nii.gz), or --phase and --magnitude, are needed besides "
            f"{', '.join(map(str, inputs))}"
        )
    require_files(begins.reads)
    files = ScanFiles(
        begins.fields,
        mask_path,
        truth_path,
        labels_path,
        () if reals else signal,
        begins.noise_map,
        begins.quality,
        chi_path,
        r2prime_path,
    )
    if phases:
        _require_phase(units, echo_time)
        units = "rad"
    reading = reading_from(
        units=units,
        echo_time=echo_time,
        echo_times=echo_times,
        field_strength=field_strength,
        b0_direction=b0_direction,
        voxel_size=voxel_size,
        params=params_path,
        negate=negate,
        phase_scale=phase_scale,
    )
    out_path = _path(output)
    given = {} if out_path is None else output_files(out_path, gives)
    outputs = Outputs(
        given.pop(gives[0], None),
        further=given,
        dicom=dicom_out,
        maps=begins.keeps,
        report=_path(report),
        figure=_path(figure),
        html=_path(html),
        html_names=html_names,
        slices=slices,
        window=window,
        units=out_units,
        dtype=out_dtype,
        force=force,
    )
    if truth is not None and tuple(gives) != (CHI,):
        raise UsageError(f"--truth is a susceptibility, {' and '.join(gives)} is made; drop it")
    if dicom_out is not None:
        dicom_out.check(gives, force=force)
    outputs.check([*inputs, *begins.reads, *signal, *paths])
    if labels is not None and truth is None:
        raise UsageError("--labels needs --truth: regional metrics compare with a truth")
    draws = figure is not None or html is not None
    evaluates = evaluates or report is not None or html is not None
    wants = replace(wants_from(**wanted), draws=draws, evaluates=evaluates)
    return Request(files, reading, wants, outputs, params_path, dry_run=dry_run, begins=begins)


def maker_from(
    models: Sequence[Path],
    *,
    method: str | None = None,
    alpha: float | None = None,
    iterations: int | None = None,
    robust: bool = False,
    threshold: float | None = None,
    lam: float | None = None,
) -> Maker:
    """Return what makes the map: models, a method or bundled network by name, or the default.

    Parameters
    ----------
    models
        The files that were named.
    method
        The name.
    alpha, iterations, robust, threshold, lam
        What is said to it; see :class:`Method`.

    Raises
    ------
    UsageError
        If a method is named besides models of a map, there is none of that name, or it does not
        take what is said to it.
    """
    options: dict[str, Any] = {
        "alpha": alpha,
        "iterations": iterations,
        "robust": robust,
        "threshold": threshold,
        "lam": lam,
    }
    after: list[Path | Method] = [*models]
    if models and method is not None and gives_of(models) == (CHI,):
        raise UsageError(f"{models[0]} is a model, and --method {method} needs none; drop one")
    if (not models or method is not None) and method not in BUNDLED:
        made_by = Method(method or DEFAULT, **options)
        return [*after, made_by] if after else made_by
    for name, value in options.items():
        if value not in (None, False):
            raise UsageError(f"--{name} is for methods, not for networks; drop it or the network")
    return tuple(models) if method is None else (*models, BUNDLED[method])


def models_alone(files: Iterable[Path]) -> list[Path]:
    """Return the models of a run whose fields are found by their names.

    Raises
    ------
    UsageError
        If a file is no model.
    """
    models, fields = _sorted_out(files)
    if fields:
        raise UsageError(
            f"{fields[0]} is no model (.onnx or .plan); which fields are read follows from their "
            "names in the folder"
        )
    return models


def models_and_fields(files: Iterable[Path]) -> tuple[list[Path], tuple[Path, ...]]:
    """Return the models, and the field maps, if files are some."""
    models, fields = _sorted_out(files)
    return models, tuple(fields)


def reading_from(
    *,
    units: FieldUnit | None = None,
    echo_time: float | None = None,
    echo_times: Sequence[float] | None = None,
    field_strength: float | None = None,
    b0_direction: Sequence[Sequence[float]] | None = None,
    voxel_size: Sequence[float] | None = None,
    params: Path | None = None,
    negate: bool = False,
    phase_scale: str | None = None,
) -> Reading:
    """Return how fields are to be understood.

    Parameters
    ----------
    units
        What they hold; ``None`` is what the network takes.
    echo_time, echo_times, field_strength
        [s], of one echo or of several, and [T], for phases and frequencies.
    b0_direction
        In voxel axes, one for each field.
    voxel_size
        Along (x, y, z) [mm].
    params
        A parameter file; what is stated beside it wins.
    negate
        Whether the fields have the opposite sign.
    phase_scale
        What the values of a wrapped phase mean.

    Raises
    ------
    UsageError
        If there is no unit or phase scale of that name.
    """
    unit = None if units is None else unit_named(units)
    if units is not None and unit is None:
        raise UsageError(f"units are {units!r}, expected one of {', '.join(UNITS)}")
    if phase_scale not in (None, *SCALES):
        raise UsageError(f"phase_scale is {phase_scale!r}, expected one of {', '.join(SCALES)}")
    directions = [_vector(b) for b in b0_direction or ()]
    stated = Params(
        tuple(echo_times or (() if echo_time is None else (echo_time,))),
        field_strength,
        directions[0] if directions else None,
        None if voxel_size is None else _vector(voxel_size),
    )
    return Reading(
        units=unit,
        flags=stated,
        from_file=Params() if params is None else load_params(params),
        more_b0_directions=tuple(directions[1:]),
        negate=negate,
        phase_scale=phase_scale,
    )


def wants_from(
    *,
    patch: PatchSize = "auto",
    overlap: int | None = None,
    blend: Blend | None = None,
    data_consistency: float | Literal["auto"] | None = None,
    dc_iterations: int | None = None,
    allow_geometry: bool = False,
    memory_limit: int | str | None = None,
) -> Wants:
    """Return what is asked of a reconstruction.

    Parameters
    ----------
    patch, overlap, blend
        How patches are to be.
    data_consistency, dc_iterations
        Weight and steps of the data-consistency step, if there is to be one.
    allow_geometry
        Whether to run on the native grid outside the training's geometry.
    memory_limit
        Bytes, or such as ``6G``.

    Raises
    ------
    UsageError
        If there are iterations without a weight, or the limit is no size.
    """
    correction = None
    if data_consistency is not None:
        from qsm_deploy.runtime.reconstruction.correction import AUTO, Correction
    if data_consistency == "auto":
        correction = AUTO if dc_iterations is None else Correction(AUTO.lam, dc_iterations)
    elif data_consistency is not None:
        correction = Correction(data_consistency, dc_iterations)
    elif dc_iterations is not None:
        raise UsageError("--dc-iterations needs --data-consistency LAMBDA")
    return Wants(
        PatchOptions(patch, overlap, blend),
        correction=correction,
        allow_geometry=allow_geometry,
        memory_limit=memory_bytes(memory_limit) if isinstance(memory_limit, str) else memory_limit,
    )


def memory_bytes(text: str) -> int:
    """Return the bytes that ``6G``, ``1500M`` or ``2000000`` mean (binary multiples).

    Raises
    ------
    UsageError
        If it is no size, or a bare number below a megabyte, which is taken for a slip.
    """
    number, factor = text.strip().lower().removesuffix("b").removesuffix("i"), 1
    if number[-1:] in SUFFIXES:
        number, factor = number[:-1], SUFFIXES[number[-1]]
    try:
        size = float(number) * factor
    except ValueError:
        size = 0
    if not 0 < size < 2**63:
        raise UsageError(f"{text!r} is not a size; write 6G, 1500M or bytes")
    if factor == 1 and size < SUFFIXES["m"]:
        raise UsageError(f"{number} bytes? pass {number}G")
    return int(size)


def paths_of(given: PathLike | Sequence[PathLike]) -> tuple[Path, ...]:
    """Return one path or several as several."""
    if isinstance(given, str | os.PathLike):
        return (Path(given),)
    return tuple(Path(path) for path in given)


def gives_of(maker: Maker) -> tuple[str, ...]:
    """Return what is given in the end, by the names in cards.

    Raises
    ------
    QsmDeployError
        As :func:`load_card`.
    """
    models = models_of(maker)
    given = [TASKS[load_card(path).task][2] for path in models]
    if isinstance(maker, Method) or len(models) < len(maker):
        given.append((CHI,))
    return max(given, key=lambda names: [*MAP_NAMES].index(names[0]), default=(CHI,))


def begins_with(maker: Maker) -> str:
    """Return what a run begins with, by the cards of its models."""
    taken = {TASKS[load_card(path).task][0] for path in models_of(maker)}
    return next((q for q in ("phase_rad", "total_field_ppm") if q in taken), "local_field_ppm")


def _require_phase(units: FieldUnit | None, echo_time: float | None) -> None:
    """Refuse what is said of a field where the phase of echoes is given."""
    if units not in (None, "rad"):
        raise UsageError(f"--units {units} is of a field; say --phase-scale of a phase")
    if echo_time is not None:
        raise UsageError("--echo-time is of one phase as a field; pass --echo-times with --phase")


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _vector(numbers: Sequence[float]) -> Vector:
    x, y, z = map(float, numbers)
    return x, y, z


def _sorted_out(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    given = list(files)
    for path in given:
        refuse_weights(path)
    models = [path for path in given if path.suffix in MODEL_SUFFIXES]
    return models, [path for path in given if path.suffix not in MODEL_SUFFIXES]
