"""``qsm-run --qsm-ci``: a stage of a QSM-CI submission, from one folder to another.

The input folder holds what the stage reads, ``mask.nii.gz`` and ``params.json``, and
``config.json`` where parameters of the method were set; its map [ppm] goes to the output folder, on
the grid of the mask.

References
----------
QSM-CI submission contract, github.com/QSMxT/QSM-CI, CONTRACT.md.
"""

import os
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.scan.params import load_json_object, load_params

MASK, PARAMS, CONFIG = "mask.nii.gz", "params.json", "config.json"
FOLDERS = Path("/input"), Path("/output")
DIPOLE = "dipole"
# what a stage reads and writes, by the names of flags
PHASE = {"phase": "phase.nii.gz", "magnitude": "magnitude.nii.gz"}
TOTAL, LOCAL = {"total_field": "totalfield.nii.gz"}, {"local_field": "localfield.nii.gz"}
CHI = {"output": "chimap.nii.gz"}
STAGES = {
    "field-mapping": (PHASE, TOTAL),
    "bfr": (TOTAL, LOCAL),
    DIPOLE: (LOCAL, CHI),
    "unwrap+bfr": (PHASE, LOCAL),
    "bfr+dipole": (TOTAL, CHI),
    "end-to-end": (PHASE, CHI),
}
UNTIL = {"total_field": "total-field", "local_field": "local-field", "output": "chi"}
SEVERAL = ("phase", "magnitude")  # files that those flags take
# what the contract fixes
FIXED = (
    *("mask", "params", "output", "units", "phase", "total_field", "local_field", "until"),
    *("echo_time", "echo_times", "field_strength", "b0_direction", "voxel_size"),
)
# what a caller may set, by the names in algorithm.yml; flags of the same name
PARAMETERS = (
    *("method", "alpha", "iterations", "robust", "threshold", "lam"),
    *("data_consistency", "dc_iterations", "patch", "overlap", "blend"),
)
OF_THE_FIELD = ("background_removal", "erode")  # the same, of a stage that makes a local field
SWITCHES = ("robust",)


def contract(source: Path, target: Path, stage: str) -> dict[str, Any]:
    """Return the files that the contract fixes, by the names of flags.

    Parameters
    ----------
    source, target
        The folders.
    stage
        One of :data:`STAGES`.

    Raises
    ------
    DataError
        If a file of the contract is missing or does not keep to it.
    """
    reads, writes = STAGES[stage]
    for name in (*reads.values(), MASK, PARAMS):
        if not (source / name).is_file():
            there = sorted(path.name for path in source.iterdir()) if source.is_dir() else []
            raise DataError(
                f"{source / name}: missing (found {', '.join(there) or 'nothing'}); the {stage} "
                f"stage of QSM-CI gives {', '.join(reads.values())}, {MASK} and {PARAMS}"
            )
    params = load_params(source / PARAMS)
    stated: dict[str, Any] = {"B0_dir": params.b0_direction, "voxel_size": params.voxel_size_mm}
    if reads is PHASE:
        stated |= {"TE": params.echo_times_s or None, "B0": params.field_strength_t}
    for key, value in stated.items():
        if value is None:
            raise DataError(f"{source / PARAMS}: lacks {key}, which QSM-CI gives")
    if not target.is_dir():
        raise DataError(f"{target}: no such folder; QSM-CI makes the output folder")
    files = {name: source / file for name, file in reads.items()}
    return {
        **{name: [path] if name in SEVERAL else path for name, path in files.items()},
        "mask": source / MASK,
        "params": source / PARAMS,
        "units": None if reads is PHASE else "ppm",
        **{name: target / file for name, file in writes.items()},
        "until": UNTIL[next(iter(writes))],
    }


def flags_of(config: Path, stage: str) -> dict[str, str]:
    """Return what ``config.json`` sets for a stage, by flag, as a command line would have it.

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
    reads, writes = STAGES[stage]
    known = (
        *(PARAMETERS if writes is CHI else ()),
        *(() if reads is LOCAL or writes is TOTAL else OF_THE_FIELD),
    )
    for name in content:
        if name not in known:
            raise UsageError(
                f"{config}: no parameter {name}; {stage} has {', '.join(known) or 'none'}"
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
