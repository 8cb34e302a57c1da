import numpy as np
import pytest

from qsm_deploy.kernels.errors import UnitsError
from qsm_deploy.runtime.scan.unit_names import UNITS, unit_named
from qsm_deploy.runtime.scan.units import ppm_per_unit, require_ppm


@pytest.mark.parametrize("name", [*UNITS, "PPM", "Hz", "RAD/S", "T", " ppb "])
def test_a_unit_by_its_name_in_any_case(name):
    unit = unit_named(name)
    assert unit in UNITS
    assert name.strip().lower()[0] == unit[0]


def test_no_unit_by_another_name():
    assert [unit_named(name) for name in ("", "gauss", "pp", "rad/ms")] == [None] * 4


def test_every_unit_is_the_same_field():
    one_ppm = {
        "ppm": 1,
        "ppb": 1000,
        "tesla": 3e-6,
        "hz": 127.731,
        "rad/s": 2 * np.pi * 127.731,
        "rad": 2 * np.pi * 127.731 * 0.02,
    }
    for unit, size in one_ppm.items():
        factor = ppm_per_unit(unit, echo_time_s=0.02, field_strength_t=3.0)
        assert size * factor == pytest.approx(1, rel=1e-5), unit


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


@pytest.mark.parametrize(
    ("unit", "hints"),
    [
        ("ppb", ["ppb", "rad/s"]),
        ("hz", ["hz"]),
        ("rad/s", ["ppb", "rad/s"]),
        ("rad", ["rad"]),
        ("tesla", ["tesla"]),
    ],
)
def test_a_field_in_another_unit_is_told_by_its_size(unit, hints):
    rng = np.random.default_rng(2)
    ppm = 0.017 * rng.standard_normal(4000).astype(np.float32)  # 99 % within 0.044
    assert require_ppm(ppm, "ppm", stated=False) == []
    factor = ppm_per_unit(unit, echo_time_s=0.02, field_strength_t=3.0)
    with pytest.raises(UnitsError, match="pass --units with the unit that") as refused:
        require_ppm(ppm / np.float32(factor), "ppm", stated=False)
    assert all(f"if it is in {hint}" in str(refused.value) for hint in hints)


def test_no_unit_fits_two_that_differ_much():
    """Who follows a hint must not get a map that is many times too large."""
    field = np.full(100, 0.044, np.float32)
    for unit in UNITS:
        stored = field / np.float32(ppm_per_unit(unit, echo_time_s=0.02, field_strength_t=3.0))
        for other in UNITS:
            factor = ppm_per_unit(other, echo_time_s=0.02, field_strength_t=3.0)
            try:
                require_ppm(stored * np.float32(factor), other, stated=other != "ppm")
            except UnitsError:
                continue
            assert stored[0] * factor / field[0] < 7, (unit, other)


def test_a_field_that_is_said_to_be_in_ppm_may_be_large_or_small(field):
    for factor in (10, 1e-3):
        (note,) = require_ppm(np.float32(factor) * field[field != 0], "ppm")
        assert "usually it lies between 0.005 and 0.1" in note
    with pytest.raises(UnitsError, match="too much for tissue"):
        require_ppm(10 * field[field != 0], "ppm", stated=False)
    with pytest.raises(UnitsError, match=r"check the unit \(hz\), field strength and echo time"):
        require_ppm(10 * field[field != 0], "hz")


def test_one_bright_voxel_in_a_thousand_may_exceed_a_ppm(field):
    samples = np.full(1000, 0.01, dtype=np.float32)
    samples[0] = 4
    assert require_ppm(samples, "ppm") == []


def test_refuses_a_field_that_is_zero():
    with pytest.raises(UnitsError, match="zero in the whole mask"):
        require_ppm(np.zeros(10, dtype=np.float32), "ppm")


@pytest.mark.parametrize("offset", [0.0, 0.1, -0.6, 0.9])
def test_an_offset_is_told(field, offset):
    values = field[field != 0] - np.float32(np.median(field[field != 0]))
    notes = require_ppm(values + np.float32(offset) * values.std(), "ppm")
    assert ["subtract it" in note for note in notes] == [True] * (abs(offset) > 0.2)


def test_single_voxels_that_no_tissue_makes_are_refused(field):
    values = field[field != 0]
    values[5] = -1e4
    with pytest.raises(UnitsError, match=r"1 voxels inside the mask hold up to 1e\+04 ppm"):
        require_ppm(values, "ppm")
