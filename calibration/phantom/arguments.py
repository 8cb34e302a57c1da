"""The flags of ``qsm-phantom``, and which of them make no sense together."""

import argparse
from pathlib import Path

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.command import Parser, add_version

NAME = "qsm-phantom"
AXES = ("X", "Y", "Z")
ECHO_TIME_S, FIELD_STRENGTH_T, SNR, TILT_DEG, STEEPEST_DEG = 0.02, 3.0, 40.0, 25.0, 60.0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = Parser(
        NAME,
        description="Draw a head with known susceptibility and write its local field, and what a "
        "scanner measures of it.",
        epilog="Writes field.nii.gz and chi.nii.gz [ppm], mask.nii.gz, labels.nii.gz and "
        "params.json. The same seed gives the same files.",
    )
    add = p.add_argument
    # fmt: off
    add("folder", type=Path, nargs="?",
        help="where to write; created, its parent must exist; with --bids it may be left out")
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
    add("--echo-time", type=float, metavar="S",
        help=f"of --magnitude, noted in params.json; the field is in ppm (default: {ECHO_TIME_S})")
    add("--field-strength", type=float, metavar="T", default=FIELD_STRENGTH_T,
        help="of --magnitude and --echoes, noted in params.json (default: %(default)s)")
    add("--force", action="store_true", help="overwrite existing files")
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    # fmt: on
    _add_scanner(p.add_argument_group("what scanners do"))
    add_version(p)
    return p


def _add_scanner(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    # fmt: off
    add("--background", action="store_true",
        help="skull, skin, air and its cavities; writes total_field.nii.gz [ppm], shimmed")
    add("--residual-background", type=float, metavar="PPM",
        help="root mean square of what background removal left in the field")
    add("--orientations", type=int, choices=range(2, 6), metavar="N",
        help="2 to 5 fields, for COSMOS; writes field2.nii.gz, field3.nii.gz ...")
    add("--tilt", type=float, metavar="DEG",
        help=f"of the head in all orientations but the first (default: {TILT_DEG:g})")
    add("--magnitude", action="store_true",
        help="writes magnitude.nii.gz, of a gradient echo at --echo-time")
    add("--echoes", type=float, nargs="+", metavar="S",
        help="echo times; writes phase1.nii.gz [rad, wrapped], magnitude1.nii.gz ...")
    add("--snr", type=float, metavar="RATIO",
        help="mean signal of the first echo in the brain over the noise of its real and of its "
        f"imaginary part (default: {SNR:g})")
    add("--bipolar", action="store_true", help="every second echo is read backwards, along x")
    add("--bids", type=Path, metavar="DIR",
        help="writes the echoes as a BIDS dataset, the truth as its derivative; a new folder")
    # fmt: on


def refuse_contradictions(a: argparse.Namespace) -> None:
    """Refuse numbers that cannot be, and options that make no sense together.

    Raises
    ------
    UsageError
        With the first that was found.
    """
    for name in ("echo_time", "field_strength", "snr", "residual_background"):
        value = getattr(a, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if a.tilt is not None and not 1 <= a.tilt <= STEEPEST_DEG:
        raise UsageError(f"--tilt must be 1 to {STEEPEST_DEG:g} degrees, got {a.tilt:g}")
    refused = {
        "--tilt is of --orientations; pass that too": a.tilt and not a.orientations,
        "--bids holds what a scanner measures; pass --echoes too": a.bids and not a.echoes,
        "--bids writes a new dataset; name another folder": a.bids and a.bids == a.folder,
        "--bipolar needs a second echo to be read backwards; pass --echoes with two or more": (
            a.bipolar and len(a.echoes or ()) < 2
        ),
        "--snr is of a gradient echo; pass --echoes or --magnitude, or state the noise of the "
        "field with --noise-ppm": a.snr and not (a.echoes or a.magnitude),
        "--echoes writes the magnitude of every echo; drop --magnitude": a.echoes and a.magnitude,
        "--echoes states the echo times; drop --echo-time": a.echoes and a.echo_time,
        "--echoes are measured before background removal, which leaves --residual-background; "
        "drop one": a.echoes and a.residual_background,
        "--echoes are of one orientation; drop --orientations, and run once for each "
        "--b0-direction": a.echoes and a.orientations,
        "--background is of one orientation, local fields have none; drop it or --orientations": (
            a.background and a.orientations
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise UsageError(reason)
