"""What a command line of ``qsm-run`` asks for, checked before any work is done."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.read import ONNX, PLAN
from qsm_deploy.runtime.console.atomic import check_writable
from qsm_deploy.runtime.reconstruction.correction import AUTO, Correction
from qsm_deploy.runtime.reconstruction.planning import PatchOptions
from qsm_deploy.runtime.run.figure import require_matplotlib
from qsm_deploy.runtime.scan.params import Params, load_params
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles

BUNDLED_MODEL = Path(__file__).parents[1] / "models" / "tkd-unet.onnx"
MODEL_SUFFIXES = (ONNX, PLAN)


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


@dataclass(frozen=True)
class Request:
    """One run: what is read, how it is understood, and what is written.

    Attributes
    ----------
    models
        The networks' files: one, or the two parts of AFTER-QSM.
    files
        The acquisition's.
    outputs
        What is written.
    reading
        How the measured volumes are to be understood.
    correction
        The data-consistency step, if one was asked for.
    options
        How patches are to be.
    flags
        All of the command line.
    labels
        What the sidecar says besides the facts of the run.
    """

    models: tuple[Path, ...]
    files: ScanFiles
    outputs: Outputs
    reading: Reading
    correction: Correction | None
    options: PatchOptions
    flags: argparse.Namespace
    labels: Mapping[str, Any] = field(default_factory=dict)


def request_from(arguments: argparse.Namespace) -> Request:
    """Return what a command line asks for.

    Raises
    ------
    UsageError
        If its flags contradict each other, or an output exists or cannot be written.
    DataError
        If the parameter file cannot be read.
    MissingDependencyError
        If a figure is asked for without matplotlib.
    """
    models, fields = models_and_fields(arguments.files)
    files = ScanFiles(fields, arguments.mask, arguments.truth, arguments.labels)
    outputs = outputs_from(arguments, fields[0])
    outputs.check([*models, *fields, *files[1:], arguments.params], force=arguments.force)
    if arguments.labels is not None and arguments.truth is None:
        raise UsageError("--labels needs --truth: regional metrics compare with a truth")
    if arguments.figure is not None:
        require_matplotlib()
    return Request(
        tuple(models),
        files,
        outputs,
        reading_from(arguments),
        correction_from(arguments),
        patch_options_from(arguments),
        arguments,
    )


def models_alone(files: list[Path]) -> list[Path]:
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
    return models or [BUNDLED_MODEL]


def models_and_fields(files: list[Path]) -> tuple[list[Path], tuple[Path, ...]]:
    """Return the models, the bundled one unless a file is one, and the field maps.

    Raises
    ------
    UsageError
        If there is no field map.
    """
    models, fields = _sorted_out(files)
    if not fields:
        raise UsageError(
            f"a field map (.nii or .nii.gz) is needed besides {', '.join(map(str, files))}"
        )
    return models or [BUNDLED_MODEL], tuple(fields)


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


def patch_options_from(arguments: argparse.Namespace) -> PatchOptions:
    """Return what the flags want of the patches."""
    return PatchOptions(arguments.patch, arguments.overlap, arguments.blend)


def outputs_from(arguments: argparse.Namespace, first: Path) -> Outputs:
    """Return where the results go: beside the field, unless told otherwise.

    Raises
    ------
    UsageError
        If the map's name does not end in .nii or .nii.gz, or the figure's not in .png.
    """
    chi = arguments.output
    if chi is None:
        chi = first.with_name(f"{_stem(first)}_chi.nii.gz")
    if not chi.name.endswith((".nii", ".nii.gz")):
        raise UsageError(f"--output {chi} must end in .nii or .nii.gz")
    if arguments.figure is not None and arguments.figure.suffix != ".png":
        raise UsageError(f"--figure {arguments.figure} must end in .png")
    return Outputs(chi, chi.with_name(f"{_stem(chi)}.json"), arguments.report, arguments.figure)


def _sorted_out(files: list[Path]) -> tuple[list[Path], list[Path]]:
    models = [path for path in files if path.suffix in MODEL_SUFFIXES]
    return models, [path for path in files if path.suffix not in MODEL_SUFFIXES]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
