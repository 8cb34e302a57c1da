"""Canonical axes: one for all 48 storages, exact ways there and back, and what decides."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.axes import (
    STORED,
    Axes,
    axes_named,
    axes_of,
    canonical_axes,
    directions_named,
    from_corner,
)

SHAPE = (4, 5, 6)
VOLUME = np.arange(120.0).reshape(SHAPE)
STORAGES = [
    Axes(order, flipped)
    for order in itertools.permutations(range(3))
    for flipped in itertools.product((False, True), repeat=3)
]
angles = st.floats(-180, 180)


def rotation(about_x: float, about_y: float, about_z: float = 0.0) -> np.ndarray:
    turned = np.eye(3)
    for axis, degrees in enumerate((about_x, about_y, about_z)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        one = np.eye(3)
        one[i, i] = one[j, j] = math.cos(math.radians(degrees))
        one[j, i] = math.sin(math.radians(degrees))
        one[i, j] = -one[j, i]
        turned = one @ turned
    return turned


def affine_of(directions: np.ndarray, voxel=(0.8, 0.9, 2.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions * voxel
    affine[:3, 3] = -10, 20, 5
    return affine


def canonical(affine: np.ndarray, b0, storage: Axes) -> Axes:
    """Return what a storage of a volume is turned by in all, from the volume's own axes."""
    stored = storage.geometry(Geometry(SHAPE, (0.8, 0.9, 2.0), b0))
    return storage.then(axes_of(storage.affine(affine, SHAPE), stored))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_there_and_back_is_exact_and_moves_no_voxel(storage) -> None:
    turned = storage.turn(VOLUME)
    np.testing.assert_array_equal(storage.turn_back(turned), VOLUME)
    np.testing.assert_array_equal(storage.turn(np.stack([VOLUME, -VOLUME]))[1], -turned)
    assert storage.then(storage.inverse) == storage.inverse.then(storage) == STORED
    affine = affine_of(rotation(12, 7))
    there = storage.affine(affine, SHAPE)
    for voxel in ((0, 0, 0), (3, 1, 5)):
        (place,) = np.argwhere(turned == VOLUME[voxel])
        np.testing.assert_allclose(there @ [*place, 1], affine @ [*voxel, 1])


@given(angles, angles, angles)
def test_every_storage_of_a_tilted_volume_has_the_same_axes(a, b, c) -> None:
    directions = rotation(a, b, c)
    found = {canonical(affine_of(directions), tuple(directions[2]), s) for s in STORAGES}
    assert len(found) == 1


@pytest.mark.parametrize("degrees", [(45, 0), (0, 45), (45, 45), (90, 0), (0, 0)])
@pytest.mark.parametrize("b0", [None, (1, 1, 1), (0, 1, 1), (1, 0, 0)])
def test_so_has_one_where_two_axes_do_equally_well(degrees, b0) -> None:
    directions = rotation(*degrees)
    b0 = tuple(directions[2]) if b0 is None else b0
    assert len({canonical(affine_of(directions), b0, s) for s in STORAGES}) == 1


@pytest.mark.parametrize("degrees", [(0, 0), (20, 0), (-20, 15), (0, 44), (30, 30)])
def test_an_axial_head_in_ras_stays_as_it_is(degrees) -> None:
    directions = rotation(*degrees)
    assert canonical_axes(directions, directions[2]) == STORED


@pytest.mark.parametrize(
    ("letters", "order", "flipped"),
    [
        ("LAS", (0, 1, 2), (True, False, False)),
        ("LPS", (0, 1, 2), (True, True, False)),
        ("PSR", (2, 0, 1), (False, True, False)),
        ("RSA", (0, 2, 1), (False, False, False)),
    ],
)
def test_storages_by_name(letters, order, flipped) -> None:
    directions = directions_named(letters)
    assert canonical_axes(directions, directions[2]) == Axes(order, flipped)
    assert axes_named(letters) == Axes(order, flipped).inverse


def test_b0_that_was_stated_along_another_axis_decides_the_third() -> None:
    assert canonical_axes(np.eye(3), (1, 0, 0)).order == (2, 1, 0)
    assert canonical_axes(np.eye(3), (0, -2, 0.1)).order == (0, 2, 1)


def test_unknown_directions_are_permuted_and_never_flipped() -> None:
    for b0 in itertools.product((-1, 0, 1), repeat=3):
        if any(b0):
            assert axes_of(None, Geometry(SHAPE, b0_direction=b0)).flipped == (False,) * 3


def test_the_tilt_that_is_left_is_at_most_that_of_a_cube_s_diagonal() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        directions = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        axes = canonical_axes(directions, directions[2])
        tilt = math.degrees(math.acos(abs(axes.vector(directions[2])[2])))
        assert tilt <= math.degrees(math.acos(1 / math.sqrt(3))) + 1e-6


def test_a_box_begins_where_its_first_voxel_lies() -> None:
    affine = affine_of(rotation(20, 0))
    cut = from_corner(affine, (slice(1, 3), slice(None), slice(2, 5)))
    np.testing.assert_allclose(cut @ [0, 0, 0, 1], affine @ [1, 0, 2, 1])


@pytest.mark.parametrize("letters", ["", "RA", "RAT", "RLS", "ras", "RASS"])
def test_what_are_no_axes_is_refused(letters) -> None:
    with pytest.raises(GeometryError, match="three letters such as RAS or LPS"):
        axes_named(letters)
