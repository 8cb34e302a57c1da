"""Spatial unwrapping: exact where neighbours differ by less than half a turn."""

import math

import numpy as np
import pytest

from qsm_deploy.runtime.local_field.unwrapping import unwrap, wrap

TURN = 2 * math.pi
SHAPE = (34, 30, 26)


@pytest.fixture
def ball():
    x, y, z = np.ogrid[-1:1:34j, -1:1:30j, -1:1:26j]
    return x * x + y * y + z * z < 0.9


@pytest.fixture
def true_phase():
    """Return a phase of several turns, with a steep bump."""
    x, y, z = np.ogrid[-1:1:34j, -1:1:30j, -1:1:26j]
    smooth = 14 * x * y + 9 * z + 12 * np.exp(-8 * ((x - 0.3) ** 2 + y * y + z * z))
    return smooth.astype(np.float32)


def turns_off(result, truth, mask):
    """Return by how many turns each voxel is off, but for one number of turns for all."""
    off = (result - truth)[mask] / TURN
    return off - np.rint(np.median(off))


def test_wrapping_keeps_to_half_a_turn():
    phase = np.linspace(-20, 20, 999, dtype=np.float32)
    assert np.abs(wrap(phase)).max() <= math.pi + 1e-6
    np.testing.assert_allclose(np.exp(1j * wrap(phase)), np.exp(1j * phase), atol=1e-5)


def test_a_phase_of_many_turns(true_phase, ball):
    result = unwrap(wrap(true_phase), ball, np.ones(SHAPE, np.float32))
    assert np.ptp(true_phase[ball]) > 3 * TURN
    assert np.abs(turns_off(result, true_phase, ball)).max() < 1e-5
    assert not result[~ball].any()
    assert abs(np.median(result[ball])) <= math.pi


def test_noise_is_kept_and_adds_only_whole_turns(true_phase, ball):
    rng = np.random.default_rng(2)
    noisy = wrap(true_phase + 0.4 * rng.standard_normal(SHAPE).astype(np.float32))
    result = unwrap(noisy, ball, np.ones(SHAPE, np.float32))
    turns = (result - noisy)[ball] / TURN
    np.testing.assert_allclose(turns, np.rint(turns), atol=1e-5)
    assert np.mean(np.abs(turns_off(result, true_phase, ball)) > 0.5) < 1e-3


def test_voxels_without_signal_do_not_lead_astray(true_phase, ball):
    rng = np.random.default_rng(3)
    hole = np.zeros(SHAPE, dtype=bool)
    hole[10:20, 8:18, 9:17] = True
    phase = np.where(hole, rng.uniform(-3, 3, SHAPE), wrap(true_phase)).astype(np.float32)
    magnitude = np.where(hole, 0.01, 1).astype(np.float32)
    good = ball & ~hole
    result = unwrap(phase, ball, magnitude)
    assert np.abs(turns_off(result, true_phase, good)).max() < 1e-5


def test_an_echo_that_agrees_tells_reliable_steps(true_phase, ball):
    rng = np.random.default_rng(4)
    bad = rng.random((2, *SHAPE)) < 0.2
    noise = (1.5 * rng.standard_normal((2, *SHAPE)) * bad).astype(np.float32)
    first, second = wrap(true_phase + noise)
    ones = np.ones(SHAPE, np.float32)
    wrong = [
        np.mean(np.abs(turns_off(unwrap(second, ball, ones, o), true_phase, ball & ~bad[1])) > 0.5)
        for o in (None, first)
    ]
    assert wrong[1] < wrong[0] / 2 < 0.005


def test_each_part_is_near_zero(true_phase):
    mask = np.zeros(SHAPE, dtype=bool)
    mask[:10], mask[20:30, :5], mask[33, 29, 25] = True, True, True
    result = unwrap(wrap(true_phase), mask, np.ones(SHAPE, np.float32))
    for part in (np.s_[:10], np.s_[20:30, :5], np.s_[33:, 29:, 25:]):
        inside = np.zeros(SHAPE, dtype=bool)
        inside[part] = mask[part]
        assert np.abs(turns_off(result, true_phase, inside)).max() < 1e-5
        assert abs(np.median(result[inside])) <= math.pi + 1e-5


def test_one_voxel(true_phase):
    mask = np.zeros(SHAPE, dtype=bool)
    mask[5, 5, 5] = True
    result = unwrap(true_phase, mask, np.ones(SHAPE, np.float32))
    assert result[5, 5, 5] == pytest.approx(float(wrap(true_phase[5, 5, 5])), abs=1e-5)
