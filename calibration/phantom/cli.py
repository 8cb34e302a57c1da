"""``qsm-phantom``: a head whose susceptibility is known, as files."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsm_deploy.calibration.phantom.arguments import (
    ECHO_TIME_S,
    NAME,
    SNR,
    TILT_DEG,
    parser,
    refuse_contradictions,
)
from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.console.command import run_command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    from qsm_deploy.calibration.phantom.gradient_echo import GradientEcho
    from qsm_deploy.calibration.phantom.phantom import Phantom
    from qsm_deploy.kernels.geometry import Geometry
    from qsm_deploy.runtime.local_field.echoes import Echoes

    Volumes = dict[str, tuple[ArrayLike, Geometry, str]]  # by file name, with what they are

FIELD, MASK, CHI, LABELS = "field.nii.gz", "mask.nii.gz", "chi.nii.gz", "labels.nii.gz"
TOTAL, MAGNITUDE, PARAMS = "total_field.nii.gz", "magnitude.nii.gz", "params.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.folder is None and arguments.bids is None:
        p.error("name a folder, or --bids DIR")
    return run_command(NAME, lambda: _run(arguments))


def _run(a: argparse.Namespace) -> str:
    refuse_contradictions(a)
    if a.folder is not None:
        _check_outputs(a.folder, _names(a), force=a.force)
    if a.bids is not None:
        _check_dataset(a.bids)
    from qsm_deploy.calibration.phantom.gradient_echo import GradientEcho
    from qsm_deploy.calibration.phantom.phantom import head_phantom
    from qsm_deploy.kernels.geometry import Geometry
    from qsm_deploy.runtime.console.atomic import write_together
    from qsm_deploy.runtime.job.report import json_bytes

    geometry = Geometry(a.shape, a.voxel_size, a.b0_direction)
    times_s = tuple(a.echoes or [a.echo_time or ECHO_TIME_S])
    sequence = GradientEcho(times_s, a.field_strength, a.snr or SNR, a.bipolar)
    if not a.quiet:
        print(f"drawing a head on {geometry}, seed {a.seed}", file=sys.stderr)
    head = head_phantom(geometry, seed=a.seed, noise_ppm=a.noise_ppm, lesions=a.lesions)
    volumes, echoes = _measured(head, sequence, a)
    params = _params(head, sequence, a)
    files: dict[Path, bytes] = {}
    if a.folder is not None:
        named = _nifti(volumes) | {PARAMS: json_bytes(params)}
        files |= {a.folder / name: content for name, content in named.items()}
    if a.bids is not None and echoes is not None:
        from qsm_deploy.calibration.phantom.bids import bids_files

        dataset = bids_files(head, echoes, params)
        files |= {a.bids / name: content for name, content in dataset.items()}
    _make_folders(dict.fromkeys(path.parent for path in files), a.bids)
    write_together(files, force=a.force)
    if not a.quiet:
        for command in _reconstructions(a):
            print(f"reconstruct: {shlex.join(map(str, command))}", file=sys.stderr)
    return "\n".join(map(str, files))


def _names(a: argparse.Namespace) -> list[str]:
    """Return the files that the folder gets."""
    echoes = [name for n in range(len(a.echoes or ())) for name in _echo_names(n)]
    added = [TOTAL] * a.background + [MAGNITUDE] * a.magnitude + echoes
    return [FIELD, MASK, CHI, LABELS, *_field_names(a)[1:], *added, PARAMS]


def _field_names(a: argparse.Namespace) -> list[str]:
    return [FIELD, *(f"field{n}.nii.gz" for n in range(2, 1 + (a.orientations or 1)))]


def _echo_names(echo: int) -> tuple[str, str]:
    return f"phase{echo + 1}.nii.gz", f"magnitude{echo + 1}.nii.gz"


def _check_outputs(folder: Path, names: Iterable[str], *, force: bool) -> None:
    from qsm_deploy.runtime.console.atomic import check_writable

    if os.path.isdir(folder):  # unlike Path.is_dir it takes a name of any length
        for name in names:
            check_writable(folder / name, force=force)
    elif os.path.lexists(folder):
        raise DataError(f"{folder} is not a folder; name another")
    else:
        check_writable(folder, force=False)


def _check_dataset(folder: Path) -> None:
    _check_outputs(folder, (), force=False)
    if os.path.isdir(folder) and os.listdir(folder):  # echoes of another run would become its own
        raise UsageError(f"{folder} is not empty; --bids writes a new dataset, name a new folder")


def _make_folders(folders: Iterable[Path], dataset: Path | None) -> None:
    for folder in folders:
        try:
            folder.mkdir(exist_ok=True, parents=dataset is not None and folder != dataset)
        except OSError as error:
            raise DataError(f"cannot create {folder}: {error.strerror}") from error


def _measured(
    head: "Phantom", sequence: "GradientEcho", a: argparse.Namespace
) -> tuple["Volumes", "Echoes | None"]:
    """Return what goes to the folder, and the echoes that go to a dataset too."""
    import numpy as np

    from qsm_deploy.calibration.phantom.contrast import draw_contrast
    from qsm_deploy.calibration.phantom.gradient_echo import acquire
    from qsm_deploy.calibration.phantom.phantom import STREAMS, dipole_field
    from qsm_deploy.calibration.phantom.surroundings import background_field, draw_surroundings

    # a stream for each, so that no option changes what another draws
    residual_rng, noise_rng, contrast_rng, echo_rng = np.random.default_rng(head.seed).spawn(
        STREAMS + 4
    )[STREAMS:]
    grid, mask = head.geometry, head.mask
    fields = _local_fields(head, a, residual_rng, noise_rng)
    volumes: Volumes = {
        FIELD: fields.pop(FIELD),
        MASK: (mask.astype(np.uint8), grid, "brain mask"),
        CHI: (head.chi_ppm, grid, "susceptibility [ppm]"),
        LABELS: (head.labels, grid, "tissue labels"),
        **fields,
    }
    labels, background = head.labels, np.zeros(grid.shape, dtype=np.float32)
    if a.background:
        around = draw_surroundings(mask, grid)
        labels, background = labels | around, background_field(around, grid)
        volumes[TOTAL] = (head.local_field_ppm + mask * background, grid, "total field [ppm]")
    if not (a.echoes or a.magnitude):
        return volumes, None
    contrast = draw_contrast(labels, grid, contrast_rng)
    total = dipole_field(head.chi_ppm, grid) + background
    echoes = acquire(sequence, contrast, total, mask, grid, echo_rng)
    if a.magnitude:
        volumes[MAGNITUDE] = (echoes.magnitude[0], grid, "magnitude")
        return volumes, None
    for n, (phase, magnitude) in enumerate(zip(echoes.phase_rad, echoes.magnitude, strict=True)):
        names = _echo_names(n)
        volumes[names[0]] = (phase, grid, "wrapped phase [rad]")
        volumes[names[1]] = (magnitude, grid, "magnitude")
    return volumes, echoes


def _local_fields(
    head: "Phantom",
    a: argparse.Namespace,
    residual_rng: "np.random.Generator",
    noise_rng: "np.random.Generator",
) -> "Volumes":
    """Return the local field of every orientation, with what background removal left in it."""
    from qsm_deploy.calibration.phantom.orientation import tilted
    from qsm_deploy.calibration.phantom.phantom import local_field
    from qsm_deploy.calibration.phantom.residual_background import residual_background

    volumes: Volumes = {}
    grids = tilted(head.geometry, a.orientations or 1, a.tilt or TILT_DEG)
    for name, grid in zip(_field_names(a), grids, strict=True):
        field = head.local_field_ppm
        if grid is not head.geometry:
            field = local_field(
                head.chi_ppm, head.mask, grid, noise_ppm=head.noise_ppm, rng=noise_rng
            )
        if rms_ppm := a.residual_background:
            field = field + residual_background(head.mask, grid, rms_ppm=rms_ppm, rng=residual_rng)
        volumes[name] = (field, grid, "local field [ppm]")
    return volumes


def _nifti(volumes: "Volumes") -> dict[str, bytes]:
    """Return the NIfTI files: float32, mask and labels uint8."""
    from qsm_deploy.calibration.phantom.orientation import affine_from_geometry
    from qsm_deploy.runtime.scan.nifti import nifti_bytes

    return {
        name: nifti_bytes(
            data, affine_from_geometry(grid), description=f"qsm-deploy phantom: {what}"
        )
        for name, (data, grid, what) in volumes.items()
    }


def _params(head: "Phantom", sequence: "GradientEcho", a: argparse.Namespace) -> dict[str, Any]:
    from qsm_deploy.runtime.console.provenance import made_by

    acquired = {"snr": sequence.snr} if a.echoes or a.magnitude else {}
    options = ("background", "residual_background", "orientations", "bipolar")
    return {
        "echo_time_s": a.echoes or sequence.echo_times_s[0],
        "field_strength_t": a.field_strength,
        "b0_direction": head.geometry.b0_direction,
        "voxel_size_mm": head.geometry.voxel_size_mm,
        "seed": head.seed,
        "noise_ppm": head.noise_ppm,
        "lesions": a.lesions,
        **acquired,
        **{name: value for name in options if (value := getattr(a, name))},
        "made_by": made_by(),
    }


def _reconstructions(a: argparse.Namespace) -> list[list[str | Path]]:
    """Return the commands that reconstruct what needs more than the field."""
    commands: list[list[str | Path]] = []
    if a.orientations:
        fields = [a.folder / name for name in _field_names(a)]
        commands.append(["qsm-run", "--method", "cosmos", *fields, "-m", a.folder / MASK])
    if a.bids:
        commands.append(["qsm-run", "--bids", a.bids])
    return commands


if __name__ == "__main__":
    sys.exit(main())
