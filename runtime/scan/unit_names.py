"""What fields and phases are stored in, by the names that users, sidecars and hosts state."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from qsm_deploy.kernels.errors import DataError

FieldUnit = Literal["ppm", "ppb", "hz", "rad/s", "tesla", "rad"]
UNITS: tuple[FieldUnit, ...] = get_args(FieldUnit)
ALIASES: dict[str, FieldUnit] = {"t": "tesla"}
GYROMAGNETIC_MHZ_PER_T = 42.577  # of the proton, over 2 pi
NOMINAL = 0.05  # what a nominal field strength is off at most: scanners of "3 T" have 2.89
SAME_STRENGTH = 1.001  # relative: what frequencies of one acquisition differ by
TURN = 2 * math.pi


def field_strength(nominal_t: float | None, frequency_mhz: float | None) -> float | None:
    """Return the strength of B0 [T]: by the frequency where it is known, which is exact.

    Raises
    ------
    DataError
        If the two are of different scanners.
    """
    if frequency_mhz is None:
        return nominal_t
    exact = frequency_mhz / GYROMAGNETIC_MHZ_PER_T
    if nominal_t is not None and abs(exact - nominal_t) > NOMINAL * nominal_t:
        raise DataError(
            f"the field strength is {nominal_t:g} T, the frequency {frequency_mhz:g} MHz, which is "
            f"that of {exact:.3g} T; correct one"
        )
    return exact


def unit_named(name: str) -> FieldUnit | None:
    """Return a unit of a field by its name in any case of letters, if there is one."""
    name = name.strip().lower()
    return next((unit for unit in UNITS if unit == name), ALIASES.get(name))


@dataclass(frozen=True)
class PhaseScale:
    """A linear scale of phase: ``radians = (value - zero) * 2 pi / steps``.

    ``low`` and ``high`` bound the values that it can have.
    """

    name: str
    zero: float
    steps: float
    low: float
    high: float


def _signed(steps: float, name: str) -> PhaseScale:
    return PhaseScale(name, 0, steps, -steps / 2, steps / 2)


def _unsigned(steps: float, name: str, zero: float = 0) -> PhaseScale:
    return PhaseScale(name, zero, steps, 0, steps)


SCALES = {
    "unsigned1024": _unsigned(1024, "0 to 1023, 1024 per turn", 512),
    "signed1024": _signed(1024, "-512 to 511, 1024 per turn"),
    "unsigned4096": _unsigned(4096, "0 to 4095, 4096 per turn", 2048),
    "signed4096": _signed(4096, "-2048 to 2047, 4096 per turn"),
    "signed8192": _signed(8192, "-4096 to 4095, 8192 per turn"),
    "unsigned65536": _unsigned(65536, "0 to 65535, 65536 per turn", 32768),
    "signed65536": _signed(65536, "-32768 to 32767, 65536 per turn"),
    "radians": _signed(TURN, "radians from -pi to pi"),
    "radians2pi": _unsigned(TURN, "radians from 0 to 2 pi"),
    "milliradians": _signed(1000 * TURN, "milliradians from -3142 to 3142"),
    "milliradians2pi": _unsigned(1000 * TURN, "milliradians from 0 to 6283"),
    "degrees": _signed(360, "degrees from -180 to 180"),
    "degrees2pi": _unsigned(360, "degrees from 0 to 360"),
    "decidegrees": _signed(3600, "tenths of a degree from -1800 to 1800"),
    "decidegrees2pi": _unsigned(3600, "tenths of a degree from 0 to 3600"),
}
