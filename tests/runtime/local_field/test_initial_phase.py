"""The smooth part of a phase: exact for a polynomial, to the edge of the mask, poles told apart."""

import numpy as np
import pytest

from qsm_deploy.runtime.local_field.initial_phase import followed, initial_phase
from qsm_deploy.runtime.local_field.unwrapping import wrap
from tests.runtime.local_field.acquisition import axes_of

VOXELS = [((50, 46, 42), (2.0, 2.0, 2.0)), ((61, 47, 25), (1.3, 1.8, 3.4))]


def ball(shape):
    return sum(axis**2 for axis in axes_of(shape)) < 0.85


@pytest.mark.parametrize(("shape", "voxel_size_mm"), VOXELS)
@pytest.mark.parametrize("small", [False, True])
def test_a_polynomial_that_wraps_is_found_up_to_the_edge(shape, voxel_size_mm, small):
    x, y, z = axes_of(shape)
    true = 1 + 2.2 * x - 1.6 * y + 1.2 * z + 1.5 * x * z - 1.2 * y * y + 0.6 * x**3
    mask = ball(shape) & (z < (0.1 if small else 1))
    magnitude = (1.15 - 0.5 * sum(axis**2 for axis in (x, y, z))).astype(np.float32)
    found = initial_phase(wrap(true), magnitude, mask, voxel_size_mm)
    assert np.abs(wrap(found - true))[mask].max() < 0.12
    assert np.median(np.abs(wrap(found - true))[mask]) < 0.01
    closer, _ = followed(found, wrap(true), magnitude, mask, voxel_size_mm)
    assert np.median(np.abs(wrap(closer - true))[mask]) < 0.002


@pytest.mark.parametrize(("shape", "voxel_size_mm"), VOXELS)
def test_noise_is_not_followed(shape, voxel_size_mm):
    rng = np.random.default_rng(7)
    mask, ones = ball(shape), np.ones(shape, np.float32)
    noise = (0.3 * rng.standard_normal(shape)).astype(np.float32)
    seen = noise, ones, mask, voxel_size_mm
    found, rough = followed(initial_phase(*seen), *seen)
    assert np.std(found[mask]) < 0.05
    assert not rough.any()


def test_a_pole_is_rough_and_little_far_from_it():
    shape, voxel_size_mm = VOXELS[0]
    rng = np.random.default_rng(7)
    x, y, _ = axes_of(shape)
    noise = (0.04 * rng.standard_normal(shape)).astype(np.float32)
    pole = wrap(np.arctan2(y - 0.21, x - 0.13) + noise)
    seen = pole, np.ones(shape, np.float32), ball(shape), voxel_size_mm
    _, rough = followed(initial_phase(*seen), *seen)
    far = np.broadcast_to(np.hypot(x - 0.13, y - 0.21), shape)
    assert rough[seen[2] & (far < 0.04)].all()
    assert np.mean(rough[seen[2] & (far > 0.5)]) < 0.02  # at the edge, where the phase turns still


def test_voxels_without_signal_tell_nothing():
    shape, voxel_size_mm = VOXELS[0]
    rng = np.random.default_rng(7)
    mask = ball(shape)
    void = rng.random(shape) < 0.3
    x, y, _ = axes_of(shape)
    true = np.broadcast_to(x - 0.5 * y, shape)
    phase = np.where(void, rng.uniform(-3, 3, shape), true).astype(np.float32)
    found = initial_phase(phase, (~void).astype(np.float32), mask, voxel_size_mm)
    assert np.abs(found - true)[mask].max() < 0.05
    dark = initial_phase(phase, np.zeros(shape, np.float32), mask, voxel_size_mm)
    assert np.isfinite(dark).all()


def test_one_voxel():
    mask = np.ones((1, 1, 1), dtype=bool)
    phase = np.full((1, 1, 1), 0.7, np.float32)
    seen = phase, np.ones((1, 1, 1), np.float32), mask, (1.0, 1.0, 1.0)
    found, rough = followed(initial_phase(*seen), *seen)
    assert found.item() == pytest.approx(0.7, abs=1e-3)
    assert not rough.any()
