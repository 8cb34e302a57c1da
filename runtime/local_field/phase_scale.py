"""What one step of a phase image is in radians, told from the range of its values."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import UnitsError


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


TURN = 2 * math.pi
SCALES = {
    "unsigned4096": PhaseScale("0 to 4095, 4096 per turn", 2048, 4096, 0, 4096),
    "signed4096": PhaseScale("-2048 to 2047, 4096 per turn", 0, 4096, -2048, 2048),
    "signed8192": PhaseScale("-4096 to 4095, 8192 per turn", 0, 8192, -4096, 4096),
    "radians": PhaseScale("radians from -pi to pi", 0, TURN, -math.pi, math.pi),
    "radians2pi": PhaseScale("radians from 0 to 2 pi", 0, TURN, 0, TURN),
}
ROUNDING = 1e-3  # relative: float32 pi, and slopes that were stored with few digits
LEAST_SHARE = 0.75  # of a turn that a wrapped phase with noise around it covers


def detect_phase_scale(low: float, high: float, *, whole_numbers: bool) -> PhaseScale:
    """Return the scale whose range the values fill.

    Parameters
    ----------
    low, high
        The range of all values, of all echoes.
    whole_numbers
        Whether the values are integers.

    Raises
    ------
    UnitsError
        If none or several would do.
    """
    fitting = [
        scale
        for name, scale in SCALES.items()
        if name.startswith("radians") != whole_numbers
        and low >= scale.low - ROUNDING * TURN
        and high <= scale.high * (1 + ROUNDING)
        and high - low >= LEAST_SHARE * scale.steps
    ]
    if len(fitting) != 1:
        raise UnitsError(
            f"the phase reaches from {low:.5g} to {high:.5g}, which is no scale known here; state "
            f"it by the parameter phasescale: {', '.join(SCALES)}"
        )
    return fitting[0]


def require_phase_scale(name: str, low: float, high: float) -> PhaseScale:
    """Return a scale by name.

    Raises
    ------
    UnitsError
        If the values do not fit it.
    """
    scale = SCALES[name]
    if low < scale.low - ROUNDING * TURN or high > scale.high * (1 + ROUNDING):
        raise UnitsError(
            f"the phase reaches from {low:.5g} to {high:.5g}, not {scale.name} as phasescale says"
        )
    return scale


def radians_from_phase(values: NDArray[np.float32], scale: PhaseScale) -> NDArray[np.float32]:
    """Return the phase in radians, within a turn."""
    radians = (values - np.float32(scale.zero)) * np.float32(TURN / scale.steps)
    return radians
