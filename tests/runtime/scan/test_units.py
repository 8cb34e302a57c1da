import numpy as np
import pytest

from qsm_deploy.kernels.errors import UnitsError
from qsm_deploy.runtime.scan.units import ppm_per_unit, require_ppm


def test_hertz_and_radians_are_the_same_field():
    hertz = ppm_per_unit("hz", echo_time_s=None, field_strength_t=3.0)
    assert hertz == pytest.approx(1 / 127.731, rel=1e-9)
    radians = ppm_per_unit("rad", echo_time_s=0.02, field_strength_t=3.0)
    assert 2 * np.pi * 0.02 * radians == pytest.approx(hertz, rel=1e-12)
    assert ppm_per_unit("ppm", echo_time_s=None, field_strength_t=None) == 1


@pytest.mark.parametrize(
    ("unit", "echo_time", "strength", "says"),
    [
        ("hz", None, None, "pass --field-strength in tesla"),
        ("rad", 0.02, None, "pass --field-strength in tesla"),
        ("rad", None, 3.0, "pass --echo-time in seconds"),
        ("hz", None, 0.0, "0 T cannot be right"),
        ("hz", None, 127e6, "1.27e\\+08 T cannot be right"),
        ("rad", 20.0, 3.0, "20 s cannot be right"),
        ("rad", -0.02, 3.0, "-0.02 s cannot be right"),
        ("rad", float("nan"), 3.0, "nan s cannot be right"),
    ],
)
def test_refuses_units_without_sensible_parameters(unit, echo_time, strength, says):
    with pytest.raises(UnitsError, match=says):
        ppm_per_unit(unit, echo_time_s=echo_time, field_strength_t=strength)


def test_a_field_in_hertz_is_not_taken_for_ppm(field):
    assert require_ppm(field[field != 0], "ppm") == []
    with pytest.raises(UnitsError, match="looks like Hz: pass --units hz --field-strength 3"):
        require_ppm(127.7 * field[field != 0], "ppm")
    with pytest.raises(UnitsError, match="check --units hz, field strength and echo time"):
        require_ppm(127.7 * field[field != 0], "hz")


@pytest.mark.parametrize("factor", [1e-6, 10])
def test_an_unusual_field_is_worth_a_note(field, factor):
    (note,) = require_ppm(np.float32(factor) * field[field != 0], "ppm")
    assert "usually it lies between 0.002 and 0.3" in note


def test_one_bright_voxel_in_a_thousand_may_exceed_a_ppm(field):
    samples = np.full(1000, 0.01, dtype=np.float32)
    samples[0] = 4
    assert require_ppm(samples, "ppm") == []


def test_refuses_a_field_that_is_zero():
    with pytest.raises(UnitsError, match="zero in the whole mask"):
        require_ppm(np.zeros(10, dtype=np.float32), "ppm")
