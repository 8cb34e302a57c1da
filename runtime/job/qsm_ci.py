"""``qsm-run --qsm-ci``: the dipole stage of a QSM-CI submission, from one folder to another.

The input folder holds ``localfield.nii.gz`` [ppm], ``mask.nii.gz`` and ``params.json``, and
``config.json`` where parameters of the method were set; ``chimap.nii.gz`` [ppm] goes to the output
folder, on the grid of the mask.

References
----------
QSM-CI submission contract, github.com/QSMxT/QSM-CI, CONTRACT.md.
"""

import os
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.scan.params import load_json_object, load_params

FIELD, MASK, PARAMS, CONFIG = "localfield.nii.gz", "mask.nii.gz", "params.json", "config.json"
CHI = "chimap.nii.gz"
FOLDERS = Path("/input"), Path("/output")
# what the contract fixes
FIXED = (
    *("mask", "params", "output", "units"),
    *("echo_time", "field_strength", "b0_direction", "voxel_size"),
)
# what a caller may set, by the names in algorithm.yml; flags of the same name
PARAMETERS = (
    *("method", "alpha", "iterations", "robust", "threshold", "lam"),
    *("data_consistency", "dc_iterations", "patch", "overlap", "blend"),
)
SWITCHES = ("robust",)


def contract(source: Path, target: Path) -> dict[str, Any]:
    """Return the files and the unit that the contract fixes, by the names of flags.

    Raises
    ------
    DataError
        If a file of the contract is missing or does not keep to it.
    """
    for name in (FIELD, MASK, PARAMS):
        if not (source / name).is_file():
            there = sorted(path.name for path in source.iterdir()) if source.is_dir() else []
            raise DataError(
                f"{source / name}: missing (found {', '.join(there) or 'nothing'}); the dipole "
                f"stage of QSM-CI gives {FIELD}, {MASK} and {PARAMS}"
            )
    params = load_params(source / PARAMS)
    stated = {"B0_dir": params.b0_direction, "voxel_size": params.voxel_size_mm}
    for key, value in stated.items():
        if value is None:
            raise DataError(f"{source / PARAMS}: lacks {key}, which QSM-CI gives")
    if not target.is_dir():
        raise DataError(f"{target}: no such folder; QSM-CI makes the output folder")
    return {
        "files": [source / FIELD],
        "mask": source / MASK,
        "params": source / PARAMS,
        "output": target / CHI,
        "units": "ppm",
    }


def flags_of(config: Path) -> dict[str, str]:
    """Return what ``config.json`` sets, by flag, as a command line would have it.

    Raises
    ------
    DataError
        If it is no file, or holds no JSON object.
    UsageError
        If it sets a parameter that is not declared, or one to what is no number and no word, or
        neither true nor false.
    """
    if not os.path.lexists(config):
        return {}
    content = load_json_object(config)
    for name in content:
        if name not in PARAMETERS:
            raise UsageError(
                f"{config}: no parameter {name}; algorithm.yml declares {', '.join(PARAMETERS)}"
            )
    flags = {name: _flag(config, name, value) for name, value in content.items()}
    return {name: flag for name, flag in flags.items() if flag is not None}


def _flag(config: Path, name: str, value: Any) -> str | None:
    """Return what sets a parameter; nothing for a switch that stays off."""
    flag = f"--{name.replace('_', '-')}"
    if name in SWITCHES:
        if str(value).lower() not in ("true", "false"):
            raise UsageError(f"{config}: {name} is {value!r}, expected true or false")
        return flag if str(value).lower() == "true" else None
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UsageError(f"{config}: {name} is {value!r}, expected a number or a word")
    return f"{flag}={value}"
