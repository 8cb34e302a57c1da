"""What a step of a phase image is in radians: told, seen, or not guessed."""

import math

import numpy as np
import pytest

from qsm_deploy.kernels.errors import UnitsError
from qsm_deploy.runtime.scan.phase_scale import (
    Said,
    phase_of_echoes,
    phase_scale,
    radians_from_phase,
)
from qsm_deploy.runtime.scan.unit_names import SCALES

SHAPE = (24, 22, 20)
Z = np.linspace(-1, 1, SHAPE[2]) * np.ones(SHAPE)
BRAIN = np.linalg.norm(np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE])), axis=0) < 0.8
BRAIN = BRAIN.transpose(1, 0, 2)


def noisy_phase(seed=1):
    """Return a wrapped phase of a head in air, whose noise fills a turn [rad]."""
    rng = np.random.default_rng(seed)
    return np.where(BRAIN, np.angle(np.exp(7j * Z)), rng.uniform(-math.pi, math.pi, SHAPE))


def stripped_phase(largest_rad):
    """Return the phase of a head without air, that does not wrap [rad]."""
    return np.where(BRAIN, largest_rad * Z / Z[BRAIN].max(), 0)


def stored(phase_rad, name):
    """Return a phase as it is stored on a scale, in whole numbers but for radians."""
    scale = SCALES[name]
    values = phase_rad * scale.steps / (2 * math.pi) + scale.zero
    if not name.startswith("radians"):
        values = np.rint(values)
    if scale.low == scale.zero:
        values = values % scale.steps
    return values.clip(scale.low, scale.high).astype(np.float32)


def turns_off(phase_rad, values, scale):
    off = (radians_from_phase(values, scale) - phase_rad)[BRAIN] / (2 * math.pi)
    return np.abs(off - np.rint(off)).max()


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_is_seen_where_noise_fills_it(name):
    values = stored(noisy_phase(), name)
    scale = phase_scale(values, Said())
    assert scale is SCALES[name]
    assert turns_off(noisy_phase(), values, scale) < 2.1 / min(SCALES[name].steps, 1000) or (
        name.startswith("radians")
    )


def test_milliradians_and_tenths_of_a_degree_need_not_be_whole():
    for name, factor in (("milliradians", 1000), ("decidegrees", 1800 / math.pi)):
        assert phase_scale((factor * noisy_phase()).astype(np.float32), Said()) is SCALES[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("signed8192", Said(slope=2, intercept=-4096)),
        ("milliradians", Said(slope=1.53455, intercept=-3142)),
        ("radians", Said(slope=2 * math.pi / 4096, intercept=-math.pi)),
        ("signed1024", Said(slope=1, intercept=-512)),
        ("milliradians", Said(units="mrad")),
        ("milliradians", Said(units="milliradials")),
        ("degrees", Said(units="deg")),
        ("radians", Said(units="rad")),
        ("signed4096", Said("signed4096")),
        ("signed8192", Said("signed8192", units="arbitrary")),
    ],
)
@pytest.mark.parametrize("largest", [0.4, 1.4])
def test_what_is_stated_is_enough(name, said, largest):
    assert phase_scale(stored(stripped_phase(largest), name), said) is SCALES[name]


@pytest.mark.parametrize(
    ("name", "largest", "could_be"),
    [
        ("signed8192", 1.45, ("signed4096 (9", "signed8192 (4")),
        ("signed8192", 0.7, ("signed4096 (4", "signed8192 (2")),
        ("signed4096", 2.9, ("signed4096 (9", "signed8192 (4", "milliradians (6")),
        ("milliradians", 2.9, ("milliradians (9", "signed8192 (7")),
        ("unsigned4096", 2.9, ("unsigned4096 (9", "milliradians2pi (6")),
        ("radians", 1.0, ("radians (3",)),
        ("unsigned1024", 2.6, ("unsigned1024 (8", "unsigned4096 (2", "decidegrees2pi (2")),
    ],
)
def test_where_several_would_do_none_is_taken(name, largest, could_be):
    with pytest.raises(UnitsError, match="does not fill a turn, so it could be") as refused:
        phase_scale(stored(stripped_phase(largest), name), Said(units="arbitrary"))
    assert all(text in str(refused.value) for text in (*could_be, "pass --phase-scale NAME"))


@pytest.mark.parametrize(
    ("name", "largest", "offset"), [("unsigned4096", 2.3, 0.4), ("milliradians2pi", 1.7, 2.0)]
)
def test_a_background_of_one_value_counts_for_nothing(name, largest, offset):
    """Jumps from the head to the 0 around it are no wraps, and 0 is no end of the scale."""
    values = np.where(BRAIN, stored(stripped_phase(largest) + offset, name), 0).astype(np.float32)
    for maker in ("", "Siemens"):
        with pytest.raises(UnitsError, match="does not fill a turn, so it could be"):
            phase_scale(values, Said(units="arbitrary", manufacturer=maker))


def test_a_manufacturer_writes_one_of_them():
    values = stored(stripped_phase(2.9), "milliradians")
    assert phase_scale(values, Said(manufacturer="GE MEDICAL SYSTEMS")) is SCALES["milliradians"]
    assert phase_scale(values, Said(manufacturer="Philips")) is SCALES["milliradians"]
    with pytest.raises(UnitsError, match=r"signed4096 .* or signed8192"):  # both are Siemens'
        phase_scale(stored(stripped_phase(1.4), "signed8192"), Said(manufacturer="SIEMENS"))


@pytest.mark.parametrize(
    ("values", "said", "says"),
    [
        (0.0037 / math.pi * noisy_phase(), Said(), "no scale known here: is the scaling"),
        (0.0037 / math.pi * noisy_phase(), Said(units="rad"), r"scl_slope\) in the header stale"),
        (stored(noisy_phase(), "signed8192"), Said(units="rad"), "no wrapped phase in rad"),
        (np.rint(noisy_phase()), Said(units="rad"), "in whole numbers, which is no wrapped"),
        (30 * Z, Said(units="rad"), "no wrapped phase in rad"),
        (noisy_phase(), Said(units="Hz"), "Units are 'Hz', the phase reaches from"),
        (stored(noisy_phase(), "signed4096"), Said(slope=2, intercept=-4096), "all of -2048"),
        (noisy_phase(), Said("signed8192", units="rad"), "but --phase-scale says -4096"),
        (stored(noisy_phase(), "unsigned4096"), Said("signed8192"), "all of 0 to 4095"),
        (noisy_phase() / 2, Said(units="rad"), "a turn is no more, but Units says radians"),
        (noisy_phase() / math.pi, Said(), "jumps by all of that .* no scale known here"),
        (noisy_phase() / math.pi, Said("radians"), "a turn is no more, but --phase-scale says"),
        (stored(noisy_phase(), "signed8192"), Said("radians"), "not radians from -pi to pi"),
        (1e6 * Z, Said(), "no scale known here"),
    ],
)
def test_what_contradicts_itself_is_refused(values, said, says):
    values = values.astype(np.float32)
    with pytest.raises(UnitsError, match=says):
        phase_scale(values, said)


class TestEchoes:
    NAMES = ("e1", "e2", "e3")

    def test_each_is_read_on_its_own_scale(self):
        scales = ("signed8192", "unsigned4096", "signed8192")
        values = [stored(noisy_phase(n), name) for n, name in enumerate(scales)]
        radians, notes = phase_of_echoes(values, [Said()] * 3, self.NAMES)
        assert notes == [
            f"{n}: phase in {SCALES[s].name}" for n, s in zip(self.NAMES, scales, strict=True)
        ]
        for n in range(3):
            apart = np.exp(1j * radians[n]) - np.exp(1j * noisy_phase(n))
            assert np.abs(apart[BRAIN]).max() < 2e-3

    def test_one_that_leaves_it_open_has_that_of_its_siblings(self):
        early = 2 * stored(stripped_phase(0.9), "signed4096")
        others = [2 * stored(noisy_phase(n), "signed4096") for n in range(2)]
        said = [Said(slope=2, intercept=0)] * 3
        radians, notes = phase_of_echoes([early, *others], said, self.NAMES)
        assert notes == ["phase in -4096 to 4095, 8192 per turn"]
        np.testing.assert_allclose(radians[0], stripped_phase(0.9), atol=1e-3)

    def test_nor_if_it_contradicts_what_is_said(self):
        said = [Said(slope=2, intercept=-4096)] * 2
        values = [stored(noisy_phase(n), s) for n, s in enumerate(("signed8192", "signed4096"))]
        with pytest.raises(UnitsError, match=r"^e2: .* all of -2048 to 2047"):
            phase_of_echoes(values, said, self.NAMES[:2])

    @pytest.mark.parametrize(
        ("mine", "its", "largest"),
        [
            ("radians", "milliradians", 0.9),
            ("milliradians", "signed65536", 2.0),
            ("signed1024", "signed4096", 1.8),
        ],
    )
    def test_nor_if_its_siblings_scale_is_none_of_the_possible(self, mine, its, largest):
        values = [stored(stripped_phase(largest), mine), stored(noisy_phase(), its)]
        if mine == "radians":
            values[1] += np.float32(0.25) * (values[1] != 0)
        with pytest.raises(UnitsError, match=r"^e1: .* does not fill a turn"):
            phase_of_echoes(values, [Said()] * 2, self.NAMES[:2])

    @pytest.mark.parametrize("kind", ["other slope", "other step", "too large"])
    def test_but_not_if_it_was_stored_otherwise(self, kind):
        early = 2 * stored(stripped_phase(0.6), "signed4096")
        others = [2 * stored(noisy_phase(n), "signed4096") for n in range(2)]
        said = [Said()] * 3
        if kind == "other slope":
            said[0] = Said(slope=0.7, intercept=3)
        if kind == "other step":
            early = stored(stripped_phase(0.6), "signed4096")
        if kind == "too large":
            early = 7 * early
        with pytest.raises(UnitsError, match=r"^e1: the phase reaches"):
            phase_of_echoes([early, *others], said, self.NAMES)


@pytest.mark.parametrize("name", ["radians", "signed4096", "unsigned4096"])
def test_a_stale_slope_is_ignored_where_the_scale_is_stated(name):
    values = stored(noisy_phase(), name)
    stale = (0.00117 * values + 0.5).astype(np.float32)
    slope = {"slope": 0.00117, "intercept": 0.5}
    with pytest.raises(UnitsError, match=rf"stale\?.*pass --phase-scale {name} if the stored"):
        phase_scale(stale, Said(**slope))
    scale = phase_scale(stale, Said(name, **slope))
    assert "without the slope of the header, which is stale" in scale.name
    assert turns_off(noisy_phase(), stale, scale) < 1e-3
    right = phase_scale(values, Said(name, **slope))  # a slope that was applied already
    assert right is SCALES[name]
