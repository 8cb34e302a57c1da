"""``qsm-run --qsm-ci``: the dipole stage of a QSM-CI submission, from one folder to another.

The input folder holds ``localfield.nii.gz`` [ppm], ``mask.nii.gz`` and ``params.json``, and
``config.json`` where parameters of the method were set; ``chimap.nii.gz`` [ppm] goes to the output
folder, on the grid of the mask.

References
----------
QSM-CI submission contract, github.com/QSMxT/QSM-CI, CONTRACT.md.
"""

import argparse
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.run.cli import parser
from qsm_deploy.runtime.run.job import run_job
from qsm_deploy.runtime.run.request import models_alone
from qsm_deploy.runtime.scan.params import load_json_object, load_params

FIELD, MASK, PARAMS, CONFIG = "localfield.nii.gz", "mask.nii.gz", "params.json", "config.json"
CHI = "chimap.nii.gz"
# what the contract fixes
FIXED = (
    *("mask", "params", "output", "units"),
    *("echo_time", "field_strength", "b0_direction", "voxel_size"),
)
# what a caller may set, by the names in algorithm.yml; flags of the same name
PARAMETERS = ("data_consistency", "dc_iterations", "patch", "overlap", "blend")


def run_qsm_ci(arguments: argparse.Namespace) -> str:
    """Do what the contract asks for and return what to print.

    Raises
    ------
    UsageError
        If a flag says what the contract fixes, ``config.json`` sets a parameter that is not
        declared, or the output exists.
    DataError
        If a file of the contract is missing or does not keep to it.
    """
    source, target = arguments.qsm_ci_folders or (Path("/input"), Path("/output"))
    for name in FIXED:
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: --qsm-ci fixes it; drop the flag")
    models = models_alone(arguments.files)
    _require_files(source)
    if not target.is_dir():
        raise DataError(f"{target}: no such folder; QSM-CI makes the output folder")
    fixed = {
        "files": [*models, source / FIELD],
        "mask": source / MASK,
        "params": source / PARAMS,
        "output": target / CHI,
        "units": "ppm",
    }
    return run_job(argparse.Namespace(**vars(arguments) | _settings(source / CONFIG) | fixed))


def _require_files(folder: Path) -> None:
    for name in (FIELD, MASK, PARAMS):
        if not (folder / name).is_file():
            there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            raise DataError(
                f"{folder / name}: missing (found {', '.join(there) or 'nothing'}); the dipole "
                f"stage of QSM-CI gives {FIELD}, {MASK} and {PARAMS}"
            )
    params = load_params(folder / PARAMS)
    stated = {"B0_dir": params.b0_direction, "voxel_size": params.voxel_size_mm}
    for key, value in stated.items():
        if value is None:
            raise DataError(f"{folder / PARAMS}: lacks {key}, which QSM-CI gives")


def _settings(config: Path) -> dict[str, Any]:
    """Return what ``config.json`` sets, checked as the flags of the command line are."""
    content = load_json_object(config) if config.exists() else {}
    flags = []
    for name, value in content.items():
        if name not in PARAMETERS:
            raise UsageError(
                f"{config}: no parameter {name}; algorithm.yml declares {', '.join(PARAMETERS)}"
            )
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UsageError(f"{config}: {name} is {value!r}, expected a number or a word")
        flags.append(f"--{name.replace('_', '-')}={value}")
    parsed = vars(parser().parse_args(flags))
    return {name: parsed[name] for name in content}
