"""What a step of a phase image is in radians, told from its range or not at all."""

import math

import numpy as np
import pytest

from qsm_deploy.kernels.errors import UnitsError
from qsm_deploy.runtime.local_field.phase_scale import (
    SCALES,
    detect_phase_scale,
    radians_from_phase,
    require_phase_scale,
)

TRUE = np.linspace(-math.pi, math.pi, 401, dtype=np.float64)[:-1]
STORED = {
    "unsigned4096": np.rint(2048 + TRUE * 2048 / math.pi).astype(np.uint16),
    "signed4096": np.rint(TRUE * 2048 / math.pi).astype(np.int16),
    "signed8192": np.rint(TRUE * 4096 / math.pi).astype(np.int16),
    "radians": TRUE.astype(np.float32),
    "radians2pi": (TRUE % (2 * math.pi)).astype(np.float32),
}


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_is_told_from_its_range(name):
    stored = STORED[name]
    whole = stored.dtype.kind in "iu"
    scale = detect_phase_scale(float(stored.min()), float(stored.max()), whole_numbers=whole)
    assert scale is SCALES[name]
    radians = radians_from_phase(stored.astype(np.float32), scale)
    turns = (radians - TRUE) / (2 * math.pi)
    assert np.abs(turns - np.rint(turns)).max() < 2e-4


@pytest.mark.parametrize(
    ("low", "high", "whole"),
    [
        (0, 65535, True),  # what scale that is nobody knows
        (0, 1000, True),  # too little to tell
        (-3000, 3000, True),  # more than 4096, less than most of 8192
        (-0.0037, 0.0037, False),  # a stale slope
        (-100, 100, False),  # an unwrapped phase, or a field in Hz
        (0, 4095, False),  # whole numbers stored as floats are not told from anything else
    ],
)
def test_everything_else_is_an_error(low, high, whole):
    with pytest.raises(UnitsError, match="no scale known here; state it by the parameter"):
        detect_phase_scale(low, high, whole_numbers=whole)


def test_a_stated_scale_must_fit():
    assert require_phase_scale("radians", -1, 1) is SCALES["radians"]
    with pytest.raises(UnitsError, match="from 0 to 4095, not radians from -pi to pi"):
        require_phase_scale("radians", 0, 4095)
