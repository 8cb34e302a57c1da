"""Echoes of a head: phase, decay, noise and a bipolar readout as they are stated."""

import math

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.calibration.phantom.contrast import TISSUES, draw_contrast
from qsm_deploy.calibration.phantom.gradient_echo import GradientEcho, acquire, excitation_phase
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.errors import UnitsError, UsageError
from qsm_deploy.kernels.geometry import Geometry

GRID = Geometry((45, 52, 40), (1.0, 0.9, 2.0), (0.3, -0.4, 0.8))
TIMES_S = (0.004, 0.011, 0.018, 0.025)
NOISE_FREE = 1e9


@pytest.fixture(scope="module")
def head():
    return head_phantom(GRID, seed=5, noise_ppm=0)


@pytest.fixture(scope="module")
def contrast(head):
    return draw_contrast(head.labels, GRID, np.random.default_rng(1))


@pytest.fixture(scope="module")
def measure(head, contrast):
    """Return a function that measures the head, with noise from a seed."""

    def measured(seed=0, times=TIMES_S, **options):
        rng = np.random.default_rng(seed)
        sequence = GradientEcho(times, **options)
        return acquire(sequence, contrast, head.local_field_ppm, head.mask, GRID, rng)

    return measured


def wrapped(angle):
    return np.angle(np.exp(1j * angle))


@pytest.mark.parametrize("tesla", [3.0, 7.0])
def test_the_phase_is_that_of_the_field_and_of_excitation(head, measure, tesla):
    echoes = measure(snr=NOISE_FREE, field_strength_t=tesla)
    assert echoes.phase_rad.dtype == echoes.magnitude.dtype == np.float32
    assert np.abs(echoes.phase_rad).max() <= np.float32(math.pi)
    for phase, seconds in zip(echoes.phase_rad, TIMES_S, strict=True):
        expected = 2 * math.pi * 42.577 * tesla * seconds * head.local_field_ppm
        error = wrapped(phase - expected - excitation_phase(GRID))[head.mask]
        assert np.abs(error).max() < 1e-4


def test_every_second_echo_is_off_by_a_plane_of_the_other_sign(head, measure):
    plain, bipolar = (measure(snr=NOISE_FREE, bipolar=b).phase_rad for b in (False, True))
    off = wrapped(bipolar - plain)
    along = np.linspace(-0.5, 0.5, GRID.shape[0])[:, None, None]
    for echo, sign in enumerate((1, -1, 1, -1)):
        expected = np.broadcast_to(sign * (0.15 + 0.35 * along), GRID.shape)
        np.testing.assert_allclose(off[echo][head.mask], expected[head.mask], atol=1e-4)


@pytest.mark.parametrize("snr", [20.0, 80.0])
def test_the_noise_is_as_stated_in_every_echo(head, measure, snr):
    clean = measure(snr=NOISE_FREE)
    noisy = measure(snr=snr)
    signals = [e.magnitude * np.exp(1j * e.phase_rad) for e in (clean, noisy)]
    expected = clean.magnitude[0][head.mask].mean() / snr
    for noise in signals[1] - signals[0]:
        assert noise.real.std() == pytest.approx(expected, rel=0.02)
        assert noise.imag.std() == pytest.approx(expected, rel=0.02)
        assert abs(np.mean(noise.real * noise.imag)) < 0.02 * expected**2


def test_noise_alone_fills_the_turn_in_air(head, measure):
    phase = measure(snr=40.0).phase_rad[0]
    air = phase[:4, :4, :4]
    assert np.ptp(air) > 5


@pytest.mark.parametrize("tesla", [1.5, 3.0, 7.0])
def test_signal_decays_with_r2_star(head, contrast, measure, tesla):
    first, *_, last = measure(snr=NOISE_FREE, field_strength_t=tesla).magnitude
    rate = np.log(first / np.maximum(last, 1e-12))[head.mask] / (TIMES_S[-1] - TIMES_S[0])
    expected = contrast.r2_star_3t[head.mask] * (tesla / 3) ** 0.9
    np.testing.assert_allclose(rate, expected, rtol=2e-3, atol=0.02)


def test_the_same_stream_measures_the_same(measure):
    first, again, other = (measure(seed).phase_rad.tobytes() for seed in (0, 0, 1))
    assert first == again != other


def test_tissues_have_their_contrast(head, contrast):
    assert contrast.m0.min() >= 0
    assert not contrast.m0[:3, :3, :3].any()
    labels = head.labels
    rates = {label: np.median(contrast.r2_star_3t[labels == label]) for label in np.unique(labels)}
    assert rates[Label.CSF] < rates[Label.GREY_MATTER] < rates[Label.VEIN]
    assert rates[Label.WHITE_MATTER] == pytest.approx(TISSUES[Label.WHITE_MATTER][1], rel=0.05)
    assert set(Label) == set(TISSUES)


def test_the_coil_is_less_sensitive_outwards_and_texture_is_5_percent():
    grid = Geometry((80, 96, 80), (2.0, 2.0, 2.0))
    labels = np.full(grid.shape, Label.WHITE_MATTER, dtype=np.uint8)
    m0 = draw_contrast(labels, grid, np.random.default_rng(0)).m0 / TISSUES[Label.WHITE_MATTER][0]
    centre, side, corner = m0[35:45, 43:53, 35:45], m0[:5, 43:53, 35:45], m0[:3, :3, :3]
    assert centre.mean() == pytest.approx(1.15, rel=0.02)
    assert centre.std() / centre.mean() == pytest.approx(0.05, rel=0.25)
    assert side.mean() == pytest.approx(1.15 - 0.5 * 0.76**2, rel=0.04)
    assert 0.05 < corner.mean() < 0.2


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"echo_times_s": ()}, UsageError, "echo times must rise"),
        ({"echo_times_s": (0.01, 0.01)}, UsageError, "echo times must rise"),
        ({"echo_times_s": (4, 10)}, UnitsError, "is it in ms"),
        ({"echo_times_s": (0.01,), "snr": 0}, UsageError, "signal-to-noise ratio must be positive"),
        ({"echo_times_s": (0.01,), "snr": math.nan}, UsageError, "signal-to-noise"),
        ({"echo_times_s": (0.01,), "field_strength_t": 300}, UnitsError, "field strength"),
    ],
)
def test_what_no_scanner_does_is_refused(options, error, says):
    with pytest.raises(error, match=says):
        GradientEcho(**options)
