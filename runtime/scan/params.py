"""Acquisition parameters from a JSON file, in the dialects that accompany field maps."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.console.inputs import require_files
from qsm_deploy.runtime.scan.unit_names import field_strength

# Our own name, then those of the in-vivo folders (BIDS-like) and of QSM-CI.
ECHO_TIME = ("echo_time_s", "EchoTime_s", "EchoTime", "TE")
FIELD_STRENGTH = ("field_strength_t", "MagneticFieldStrength_T", "MagneticFieldStrength", "B0")
FREQUENCY = ("ImagingFrequency",)  # of the proton [MHz]: exact, where the strength is nominal
B0_DIRECTION = ("b0_direction", "B0_direction", "B0_dir")
VOXEL_SIZE = ("voxel_size_mm", "voxel_size")

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Params:
    """What a parameter file says, ``None`` where it says nothing."""

    echo_times_s: tuple[float, ...] = ()
    field_strength_t: float | None = None
    b0_direction: Vector | None = None
    voxel_size_mm: Vector | None = None

    @property
    def echo_time_s(self) -> float | None:
        """The echo time, if there is one; several do not tell which one a phase belongs to."""
        return self.echo_times_s[0] if len(self.echo_times_s) == 1 else None


def load_params(path: Path) -> Params:
    """Read echo times, field strength, B0 direction and voxel size.

    Raises
    ------
    DataError
        If the file is missing or not JSON, holds none of the known names, holds two that
        disagree, or a value that is not a number (or three of them).
    """
    content = load_json_object(path)
    known = (*ECHO_TIME, *FIELD_STRENGTH, *FREQUENCY, *B0_DIRECTION, *VOXEL_SIZE)
    if not content.keys() & set(known):
        seen = ", ".join(list(content)[:4]) or "nothing"
        raise DataError(
            f"{path}: no known parameter (found {seen}); expected {ECHO_TIME[0]}, "
            f"{FIELD_STRENGTH[0]}, {B0_DIRECTION[0]} or {VOXEL_SIZE[0]}"
        )
    return params_from(path, content)


def load_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises
    ------
    DataError
        If it is missing, was not downloaded, is not JSON, or holds something else.
    """
    if os.path.lexists(path):
        require_files([path])
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; pass a JSON file of parameters") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def params_from(path: Path, content: dict[str, Any]) -> Params:
    """Return the parameters among the fields of a JSON object that was read from ``path``.

    Raises
    ------
    DataError
        If two names of one parameter disagree, field strength and frequency do, or a value is not
        a number (or three of them).
    """
    strength = _numbers(path, content, FIELD_STRENGTH, expected=1)
    frequency = _numbers(path, content, FREQUENCY, expected=1)
    direction = _numbers(path, content, B0_DIRECTION, expected=3)
    voxel_size = _numbers(path, content, VOXEL_SIZE, expected=3)
    return Params(
        _numbers(path, content, ECHO_TIME),
        _strength(path, *(found[0] if found else None for found in (strength, frequency))),
        (direction[0], direction[1], direction[2]) if direction else None,
        (voxel_size[0], voxel_size[1], voxel_size[2]) if voxel_size else None,
    )


def _numbers(
    path: Path, content: dict[str, Any], names: tuple[str, ...], expected: int | None = None
) -> tuple[float, ...]:
    """Return the number or numbers under the one of ``names`` that is there, else nothing."""
    found: dict[str, tuple[float, ...]] = {}
    for name in names:
        value = content.get(name)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if expected not in (None, len(values)) or not all(map(is_number, values)):
            what = {1: "one number", 3: "three numbers", None: "a number or a list of them"}
            raise DataError(f"{path}: {name} is {repr(value)[:80]}, expected {what[expected]}")
        found[name] = tuple(map(float, values))
    if len(set(found.values())) > 1:
        seen = " and ".join(f"{name} = {content[name]}" for name in found)
        raise DataError(f"{path}: {seen} disagree; keep one")
    return next(iter(found.values()), ())


def _strength(path: Path, stated_t: float | None, frequency_mhz: float | None) -> float | None:
    """Return the strength of B0 [T]."""
    try:
        return field_strength(stated_t, frequency_mhz)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
