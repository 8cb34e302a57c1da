"""``qsm-phantom``: a head whose susceptibility is known, as files."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.console.command import add_version, run_command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from qsm_deploy.calibration.phantom.phantom import Phantom
    from qsm_deploy.kernels.geometry import Geometry

NAME = "qsm-phantom"
FIELD, MASK, CHI, LABELS = "field.nii.gz", "mask.nii.gz", "chi.nii.gz", "labels.nii.gz"
PARAMS = "params.json"
AXES = ("X", "Y", "Z")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command(NAME, lambda: _run(arguments))


def affine_from_geometry(geometry: "Geometry") -> "NDArray[np.float64]":
    """Return an affine that puts the grid's centre at the scanner's origin.

    Of the rotations that turn B0 into the scanner's z it takes the smallest, so that
    :meth:`Geometry.from_affine` reads the same geometry back.

    Parameters
    ----------
    geometry
        The grid.

    Returns
    -------
    (4, 4) float64 array
        Voxel-to-scanner (RAS mm) matrix.
    """
    import numpy as np

    down = geometry.b0_direction[2] < 0
    x, y, z = -np.array(geometry.b0_direction) if down else geometry.b0_direction
    # Rodrigues' rotation of the upward (x, y, z) to the z axis: 1 + z is never small
    rotation = np.array(
        [
            [1 - x * x / (1 + z), -x * y / (1 + z), -x],
            [-x * y / (1 + z), 1 - y * y / (1 + z), -y],
            [x, y, z],
        ]
    )
    if down:  # half a turn about the scanner's x
        rotation[1:] *= -1
    affine = np.eye(4)
    affine[:3, :3] = rotation * geometry.voxel_size_mm
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(geometry.shape) - 1) / 2)
    return affine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        NAME,
        description="Draw a head with known susceptibility and write its local field.",
        epilog=f"Writes {FIELD} and {CHI} [ppm], {MASK}, {LABELS} and {PARAMS}. "
        "The same seed gives the same files.",
    )
    add = parser.add_argument
    # fmt: off
    add("folder", type=Path, help="where to write; created, its parent must exist")
    add("--shape", nargs=3, type=int, metavar=AXES, default=(160, 192, 160),
        help="voxels along each axis (default: 160 192 160)")
    add("--voxel-size", nargs=3, type=float, metavar=AXES, default=(1.0, 1.0, 1.0),
        help="in mm (default: 1 1 1)")
    add("--b0-direction", nargs=3, type=float, metavar=AXES, default=(0.0, 0.0, 1.0),
        help="of any length, in voxel axes (default: 0 0 1)")
    add("--seed", type=int, default=0, help="decides everything random (default: 0)")
    add("--noise-ppm", type=float, metavar="PPM", default=0.0025,
        help="standard deviation of the noise in the field (default: %(default)s)")
    add("--no-lesions", dest="lesions", action="store_false",
        help="no calcification, microbleeds and haemorrhage")
    add("--echo-time", type=float, metavar="S", default=0.02,
        help=f"noted in {PARAMS}; the field is in ppm (default: %(default)s)")
    add("--field-strength", type=float, metavar="T", default=3.0,
        help=f"noted in {PARAMS} (default: %(default)s)")
    add("--force", action="store_true", help="overwrite existing files")
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    # fmt: on
    add_version(parser)
    return parser


def _run(arguments: argparse.Namespace) -> str:
    for name in ("echo_time", "field_strength"):
        value = getattr(arguments, name)
        if not 0 < value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {value}")
    folder: Path = arguments.folder
    _check_outputs(folder, force=arguments.force)

    from qsm_deploy.calibration.phantom.phantom import head_phantom
    from qsm_deploy.kernels.geometry import Geometry
    from qsm_deploy.runtime.console.atomic import write_together

    geometry = Geometry(arguments.shape, arguments.voxel_size, arguments.b0_direction)
    if not arguments.quiet:
        print(f"drawing a head on {geometry}, seed {arguments.seed}", file=sys.stderr)
    phantom = head_phantom(
        geometry, seed=arguments.seed, noise_ppm=arguments.noise_ppm, lesions=arguments.lesions
    )
    files = _volumes(phantom) | {PARAMS: _params(phantom, arguments)}
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {folder}: {error.strerror}") from error
    write_together({folder / name: c for name, c in files.items()}, force=arguments.force)
    return "\n".join(str(folder / name) for name in files)


def _check_outputs(folder: Path, *, force: bool) -> None:
    from qsm_deploy.runtime.console.atomic import check_writable

    if os.path.isdir(folder):  # unlike Path.is_dir it takes a name of any length
        for name in (FIELD, MASK, CHI, LABELS, PARAMS):
            check_writable(folder / name, force=force)
    elif os.path.lexists(folder):
        raise DataError(f"{folder} is not a folder; name another")
    else:
        check_writable(folder, force=False)


def _volumes(phantom: "Phantom") -> dict[str, bytes]:
    """Return the NIfTI files: maps float32 in ppm, mask and labels uint8."""
    import numpy as np

    from qsm_deploy.runtime.scan.nifti import nifti_bytes

    affine = affine_from_geometry(phantom.geometry)
    volumes: dict[str, tuple[ArrayLike, str]] = {
        FIELD: (phantom.local_field_ppm, "local field [ppm]"),
        MASK: (phantom.mask.astype(np.uint8), "brain mask"),
        CHI: (phantom.chi_ppm, "susceptibility [ppm]"),
        LABELS: (phantom.labels, "tissue labels"),
    }
    return {
        name: nifti_bytes(data, affine, description=f"qsm-deploy phantom: {what}")
        for name, (data, what) in volumes.items()
    }


def _params(phantom: "Phantom", arguments: argparse.Namespace) -> bytes:
    from qsm_deploy.runtime.console.provenance import made_by

    content = {
        "echo_time_s": arguments.echo_time,
        "field_strength_t": arguments.field_strength,
        "b0_direction": phantom.geometry.b0_direction,
        "voxel_size_mm": phantom.geometry.voxel_size_mm,
        "seed": phantom.seed,
        "noise_ppm": phantom.noise_ppm,
        "lesions": arguments.lesions,
        "made_by": made_by(),
    }
    return (json.dumps(content, indent=2) + "\n").encode()


if __name__ == "__main__":
    sys.exit(main())
