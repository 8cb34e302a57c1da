"""Phases that jump where no field does, and slices that are half a turn off."""

import math

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.errors import UnitsError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.wraps import count_jumps, require_unwrapped, undo_half_turns

TURN = 2 * math.pi
RAD_PER_PPM = TURN * 127.731 * 0.02


@pytest.fixture(scope="module")
def head():
    return head_phantom(Geometry((48, 52, 44), (3.0, 3.0, 3.0)), seed=3, noise_ppm=0.0)


@pytest.fixture(scope="module")
def total_rad(head):
    """Return the phase of a local field in a background of several turns."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in head.mask.shape], indexing="ij")
    background = 5 * z + 3 * x * y + 2 * y
    return (RAD_PER_PPM * head.local_field_ppm + background).astype(np.float32)


@pytest.mark.parametrize("per_rad", [1.0, 1000.0, 1 / RAD_PER_PPM, 8192 / TURN])
def test_a_wrapped_phase_is_no_field_in_any_unit(head, total_rad, per_rad):
    wrapped = per_rad * np.angle(np.exp(1j * total_rad)).astype(np.float32)
    with pytest.raises(UnitsError, match=r"a wrapped phase, not a local field.*qsm-run --phase"):
        require_unwrapped(wrapped, head.mask, None)
    with pytest.raises(UnitsError, match="a wrapped phase"):
        require_unwrapped(wrapped, head.mask, TURN * per_rad)


def test_a_phase_that_wraps_in_one_place_is_none_either(head):
    z = np.linspace(-1, 1, head.mask.shape[2]) * np.ones(head.mask.shape)
    wrapped = np.angle(np.exp(1j * (3.9 * z))).astype(np.float32)
    with pytest.raises(UnitsError, match="a wrapped phase"):
        require_unwrapped(wrapped, head.mask, TURN)


def test_fields_pass(head, total_rad):
    for field in (head.local_field_ppm, RAD_PER_PPM * head.local_field_ppm, total_rad):
        for turn in (None, TURN):
            require_unwrapped(field.astype(np.float32), head.mask, turn)


def test_a_field_of_a_sphere_passes(head):
    axes = np.ogrid[-20:20, -18:18, -16:16]
    r2 = sum(a**2 for a in axes).astype(np.float32)
    field = np.where(r2 > 25, 125 * (3 * axes[2] ** 2 - r2) / np.maximum(r2, 1) ** 2.5, 0)
    require_unwrapped(field.astype(np.float32), r2 < 15**2, None)


def test_a_lesion_with_sharp_edges_passes_where_a_unit_is_stated(head):
    field = head.local_field_ppm.copy()
    field[20:24, 20:24, 20:24:2], field[20:24, 20:24, 21:24:2] = 1.0, -0.6
    assert head.mask[20:24, 20:24, 20:24].all()
    with pytest.raises(UnitsError, match="if it is a field, state its unit with --units"):
        require_unwrapped(field, head.mask, None)
    require_unwrapped(field, head.mask, None, stated=True)


def test_jumps_are_counted_within_the_mask():
    volume = np.zeros((4, 4, 4), dtype=np.float32)
    volume[2:] = 1
    mask = np.ones_like(volume, dtype=bool)
    assert count_jumps(volume, 0.9, mask) == 16
    mask[2, :2] = False
    assert count_jumps(volume, 0.9, mask) == 8


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 1])
def test_half_turns_between_slices_are_undone(head, total_rad, axis, first):
    phase = np.stack([np.angle(np.exp(1j * total_rad * n)) for n in (1, 2)]).astype(np.float32)
    flipped = phase.copy()
    np.moveaxis(flipped, axis + 1, 0)[first::2] += math.pi
    (note,) = undo_half_turns(flipped, head.mask)
    assert f"along voxel axis {axis + 1} was half a turn off" in note
    step = np.exp(1j * (flipped - phase))  # one constant, which no field depends on
    np.testing.assert_allclose(step, step[0, 0, 0, 0], atol=1e-5)
    assert undo_half_turns(flipped, head.mask) == []


def test_noise_is_no_phase(head):
    rng = np.random.default_rng(5)
    noise = rng.uniform(-math.pi, math.pi, (1, *head.mask.shape)).astype(np.float32)
    with pytest.raises(UnitsError, match=r"unrelated phase .mean cosine"):
        undo_half_turns(noise, head.mask)
