"""What one step of a phase image is in radians, told from what is said of it and from its values.

Nothing is guessed. A scale is *stated* by the user, by the unit in a sidecar, or by a slope and an
intercept that spread the whole numbers of a converter over a turn. It is *seen* where the values
reach both ends of a turn, or nearly and jump from one to the other between neighbours, as wrapped
phase and noise do. What is stated must not contradict what is seen. Else one scale alone must be
possible. A background of one value, as masks leave it, counts for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import UnitsError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.scan.unit_names import SCALES, TURN, PhaseScale
from qsm_deploy.runtime.scan.wraps import FEWEST_JUMPS, JUMPING_SHARE, count_jumps

# what sidecars call a unit (BIDS: rad and arbitrary), and the scales that it may be
RADIANS, MILLIRADIANS = ("radians", "radians2pi"), ("milliradians", "milliradians2pi")
DEGREES = ("degrees", "degrees2pi")
UNITS = (
    dict.fromkeys(("rad", "radian", "radians"), RADIANS)
    | dict.fromkeys(("mrad", "milliradian", "milliradians", "milliradials"), MILLIRADIANS)
    | dict.fromkeys(("deg", "degree", "degrees"), DEGREES)
    | dict.fromkeys(("", "arbitrary", "a.u.", "us", "normalized", "unspecified", "1"), ())
)
# what the consoles of a manufacturer write, by how its name begins; anybody may convert to radians
MAKERS = {
    "siemens": ("unsigned4096", "signed4096", "signed8192", *RADIANS),
    "ge": (*MILLIRADIANS, *RADIANS),
    "philips": (*MILLIRADIANS, *RADIANS, "unsigned4096"),
}
STORED_BITS = (10, 12, 16)  # of the whole numbers that a slope spreads over a turn
ROUNDING = 1e-3  # relative: float32 pi, and slopes that were stored with few digits
FULL, WRAPPED_SHARE, LEAST_SHARE, CONCEIVABLE = 0.95, 0.9, 0.75, 0.2  # of a turn
WHOLE_RANGE = 0.9  # of the range of the values: what neighbours differ by where they wrap
BACKGROUND = 0.05  # of the volume: with less, the value of a corner is no background
SMALLEST_RAD = 0.05  # stated radians that stay within it were scaled once too often


@dataclass(frozen=True)
class Said:
    """What is said of a phase.

    Attributes
    ----------
    scale
        Its name in ``SCALES``, by the user.
    units
        Of a sidecar: BIDS ``Units``, DICOM ``RescaleType``.
    slope, intercept
        That the header applied to the stored numbers.
    manufacturer
        Of the scanner.
    """

    scale: str | None = None
    units: str | None = None
    slope: float = 1.0
    intercept: float = 0.0
    manufacturer: str = ""


class _SeveralError(UnitsError):
    """Several scales are possible, and nothing says which."""


class _Values:
    """The values of a phase but for a constant background, and how they lie on a scale."""

    def __init__(self, phase: Volume) -> None:
        self.volume = phase
        around = phase[0, 0, 0]  # what a mask that was multiplied with leaves, if anything
        self.inside: Mask = phase != around
        if np.count_nonzero(~self.inside) < BACKGROUND * phase.size or not self.inside.any():
            self.inside = np.ones(phase.shape, dtype=bool)
        inside = phase[self.inside]
        self.low, self.high = float(inside.min()), float(inside.max())
        self.whole = bool(np.array_equal(phase, np.rint(phase)))

    @property
    def step(self) -> int:
        """What all whole numbers are multiples of."""
        return int(np.gcd.reduce(self.volume.astype(np.int64), axis=None)) if self.whole else 0

    def fit(self, scale: PhaseScale) -> bool:
        slack = ROUNDING * scale.steps
        radians = scale.steps == TURN
        return (
            self.low >= scale.low - slack
            and self.high <= scale.high + slack
            and not (radians and self.whole)
        )

    def share(self, scale: PhaseScale) -> float:
        return (self.high - self.low) / scale.steps

    def fill(self, scale: PhaseScale) -> bool:
        """Whether they reach both ends, or nearly and neighbours jump by about a turn."""
        if not self.fit(scale) or self.share(scale) < FULL:
            return False
        ends = max(self.low - scale.low, scale.high - self.high)
        return ends <= ROUNDING * scale.steps or self.wrapped

    @cached_property
    def wrapped(self) -> bool:
        """Whether neighbours jump by the whole range: a turn is no more than that."""
        jumps = count_jumps(self.volume, WHOLE_RANGE * (self.high - self.low), self.inside)
        return jumps >= max(FEWEST_JUMPS, JUMPING_SHARE * np.count_nonzero(self.inside))

    def possible(self) -> dict[str, PhaseScale]:
        """Return the scales that they may be on, by name."""
        least = WRAPPED_SHARE if self.wrapped else CONCEIVABLE
        return {n: s for n, s in SCALES.items() if self.fit(s) and self.share(s) >= least}


def phase_scale(phase: Volume, said: Said, *, option: str = "--phase-scale") -> PhaseScale:
    """Return the scale of a phase.

    Parameters
    ----------
    phase
        (x, y, z) values after the header's slope and intercept, finite.
    said
        What is said of it.
    option
        What states a scale, for messages.

    Raises
    ------
    UnitsError
        If none or several scales are possible, or what is said contradicts the values.
    """
    values = _Values(phase)
    reach = f"the phase reaches from {values.low:.5g} to {values.high:.5g}{_whole(values)}"
    if said.scale is not None:
        stored = _without_slope(SCALES[said.scale], said)
        if values.fill(stored) and not values.fill(SCALES[said.scale]):
            return stored
    told, by = _told(said, values, reach, option)
    seen = next((scale for scale in SCALES.values() if values.fill(scale)), None)
    if told is None:
        return seen or _only(values, said, reach, option)
    if seen and told.steps != seen.steps:
        raise UnitsError(
            f"{reach}, which is all of {seen.name}, but {by} says {told.name}: correct it, or pass "
            f"{option}"
        )
    if values.wrapped and values.share(told) < WRAPPED_SHARE:
        raise UnitsError(
            f"{reach} and jumps by all of that between neighbours, so that a turn is no more, but "
            f"{by} says {told.name}: is the scaling (scl_slope) in the header stale?"
        )
    return told


def phase_of_echoes(
    echoes: Sequence[Volume],
    said: Sequence[Said],
    names: Sequence[str],
    *,
    option: str = "--phase-scale",
) -> tuple[NDArray[np.float32], list[str]]:
    """Return the phase of all echoes in radians, and notes on the scales that they came in.

    Every echo is judged by itself. One that leaves several scales open has that of the others, if
    it is among these and the echo was stored in the same steps and with the same slope.

    Parameters
    ----------
    echoes
        (x, y, z) values of each echo.
    said
        What is said of each.
    names
        Of the echoes, for messages.
    option
        What states a scale, for messages.

    Returns
    -------
    (n, x, y, z) float32 array, list of str
        Phase [rad]; one note, or one for each scale if there are several.

    Raises
    ------
    UnitsError
        If the scale of an echo cannot be told; the message says of which.
    """
    scales: list[PhaseScale | None] = []
    doubts: dict[int, _SeveralError] = {}
    for n, (phase, about) in enumerate(zip(echoes, said, strict=True)):
        try:
            scales.append(phase_scale(phase, about, option=option))
        except _SeveralError as error:
            scales.append(None)
            doubts[n] = error
        except UnitsError as error:
            raise UnitsError(f"{names[n]}: {error}") from None
    for n, doubt in doubts.items():
        stored = _Values(echoes[n])
        alike = {
            scale
            for phase, about, scale in zip(echoes, said, scales, strict=True)
            if scale is not None and about == said[n] and _Values(phase).step == stored.step
        }
        if len(alike) != 1 or not alike <= set(stored.possible().values()):
            raise UnitsError(f"{names[n]}: {doubt}")
        scales[n] = alike.pop()
    found = [scale for scale in scales if scale is not None]
    radians = [radians_from_phase(phase, scale) for phase, scale in zip(echoes, found, strict=True)]
    if len(set(found)) == 1:
        return np.stack(radians), [f"phase in {found[0].name}"]
    notes = [f"{name}: phase in {scale.name}" for name, scale in zip(names, found, strict=True)]
    return np.stack(radians), notes


def is_vague(units: str) -> bool:
    """Return whether a unit says nothing of the scale, as BIDS's ``arbitrary``."""
    return UNITS.get(units.strip().lower()) == ()


def _told(said: Said, values: _Values, reach: str, option: str) -> tuple[PhaseScale | None, str]:
    """Return the scale that unit or header state, if one does, and which of them."""
    if said.scale is not None:
        if not values.fit(SCALES[said.scale]):
            raise UnitsError(f"{reach}, not {SCALES[said.scale].name} as {option} says")
        return SCALES[said.scale], option
    units = (said.units or "").strip().lower()
    if units not in UNITS:
        raise UnitsError(
            f"Units are {said.units!r}, {reach}; BIDS knows rad and arbitrary: correct the "
            f"sidecar, or pass {option}"
        )
    if names := UNITS[units]:
        fitting = [SCALES[name] for name in names if values.fit(SCALES[name])]
        largest = max(abs(values.low), abs(values.high)) * TURN / SCALES[names[0]].steps
        if not fitting or largest < SMALLEST_RAD:
            raise UnitsError(
                f"{reach}, which is no wrapped phase in {units}: is the scaling "
                f"(scl_slope) in the header stale? Correct it or the unit, or pass {option}"
            )
        return fitting[0], "Units"
    if (said.slope, said.intercept) != (1.0, 0.0):
        for scale in SCALES.values():
            slack = ROUNDING * scale.steps
            spreads = any(abs(said.slope * 2**b - scale.steps) < slack for b in STORED_BITS)
            if spreads and abs(said.intercept - scale.low) < slack and values.fit(scale):
                return scale, "the header's slope"
    return None, ""


def _without_slope(scale: PhaseScale, said: Said) -> PhaseScale:
    """Return what a scale is after a slope and an intercept that should not have been applied."""
    zero, low, high = (said.slope * n + said.intercept for n in (scale.zero, scale.low, scale.high))
    name = f"{scale.name}, without the slope of the header, which is stale"
    return PhaseScale(name, zero, said.slope * scale.steps, low, high)


def _only(values: _Values, said: Said, reach: str, option: str) -> PhaseScale:
    """Return the one scale that is possible, of the manufacturer's if it is known."""
    possible = values.possible()
    if not possible:
        jumps = " and jumps by all of that between neighbours" if values.wrapped else ""
        stored = [n for n, s in SCALES.items() if values.fill(_without_slope(s, said))]
        say = " or ".join(stored) + " if the stored values are that"
        say = say if stored else f"with one of {', '.join(SCALES)}"
        raise UnitsError(
            f"{reach}{jumps}, which is no scale known here: is the scaling (scl_slope) in the "
            f"header stale? Correct it, or pass {option} {say}"
        )
    fullest = max(possible, key=lambda name: values.share(possible[name]))
    makers = [
        names for maker, names in MAKERS.items() if said.manufacturer.lower().startswith(maker)
    ]
    written = [name for name in possible if not makers or name in makers[0]]
    if written == [fullest] and values.share(possible[fullest]) >= LEAST_SHARE:
        return possible[fullest]
    shares = " or ".join(
        f"{name} ({100 * values.share(scale):.0f} % of a turn)" for name, scale in possible.items()
    )
    raise _SeveralError(
        f"{reach} and does not fill a turn, so it could be {shares}; pass {option} NAME with what "
        "the scanner wrote"
    )


def _whole(values: _Values) -> str:
    return " in whole numbers" if values.whole else ""


def radians_from_phase(values: Volume, scale: PhaseScale) -> Volume:
    """Return the phase in radians, within a turn of zero."""
    radians: Volume = (values - np.float32(scale.zero)) * np.float32(TURN / scale.steps)
    return radians
