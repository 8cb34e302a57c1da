"""Turning to B0 and back: the rotation, an analytic blob, and what the reach must cover."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.turned_grid import grid_along, grid_centred_on, rotation_onto

OBLIQUE = (0.36, 0.48, 0.8)
unit = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda b: np.linalg.norm(b) > 0.1)


@given(unit)
def test_the_rotation_turns_the_line_onto_the_third_axis(b) -> None:
    b = np.array(b) / np.linalg.norm(b)
    r = rotation_onto(b)
    np.testing.assert_allclose(r @ r.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(r) == pytest.approx(1)
    np.testing.assert_allclose(np.abs(r @ b), [0, 0, 1], atol=1e-12)
    # the smallest angle: what is normal to both lines stays
    normal = np.cross(b, [0, 0, 1])
    np.testing.assert_allclose(r @ normal, normal, atol=1e-12)


@given(unit, unit)
def test_any_line_is_turned_onto_any_other(b, target) -> None:
    b, target = np.array(b) / np.linalg.norm(b), np.array(target)
    rotation = rotation_onto(b, target)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    assert abs(rotation @ b @ target) / np.linalg.norm(target) == pytest.approx(1)


def test_a_grid_along_another_axis_has_one_voxel_on_another_and_holds_the_mask() -> None:
    grid = Geometry((21, 24, 18), (1.0, 1.0, 2.0), OBLIQUE)
    mask = box(grid.shape, start=(3, 2, 2), stop=(4, 3, 2))
    turned = grid_along(grid, mask, (0, 2, 0), (1.5, 1.5, 1.5))
    assert turned.geometry.b0_direction == (0, 1, 0)
    places = np.argwhere(np.ones(turned.geometry.shape)) @ turned.matrix.T + turned.offset
    assert np.abs(places - np.rint(places)).max(axis=1).min() < 1e-9
    assert turned.mask.sum() * 1.5**3 > mask.sum() * 2.0
    edges = turned.mask.copy()
    edges[3:-3, 3:-3, 3:-3] = False
    assert not edges.any()


def box(shape, *, start=(0, 0, 0), stop=(0, 0, 0)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, n - b) for a, b, n in zip(start, stop, shape, strict=True))] = True
    return mask


def test_a_grid_that_is_turned_already_is_copied() -> None:
    grid = Geometry((9, 8, 7), (0.6, 0.6, 0.6))
    mask = box(grid.shape, start=(2, 1, 1), stop=(3, 2, 0))
    volume = np.random.default_rng(0).standard_normal(grid.shape, dtype=np.float32) * mask
    turned = grid_centred_on(grid, mask, 0.6)
    assert turned.geometry.b0_direction == (0, 0, 1)
    np.testing.assert_allclose(turned.turn_back(turned.turn(volume), grid.shape), volume, atol=1e-6)
    assert turned.turn(volume).sum() == pytest.approx(volume.sum(), rel=1e-4)


def blob(geometry: Geometry, rotation=None, at=(0.0, 0.0, 0.0)) -> np.ndarray:
    """Return an ellipsoidal Gaussian [mm] around a point of the scanner, seen on a grid."""
    axes = [
        (np.arange(n) - (n - 1) / 2) * d
        for n, d in zip(geometry.shape, geometry.voxel_size_mm, strict=True)
    ]
    mm = np.stack(np.meshgrid(*axes, indexing="ij"))
    if rotation is not None:
        mm = np.einsum("ij,j...->i...", rotation.T, mm)
    sigma = np.array([4.0, 5.0, 6.0])
    return np.exp(-sum(((mm[i] - at[i]) / sigma[i]) ** 2 for i in range(3)) / 2)


@pytest.mark.parametrize("voxel", [(1.0, 1.0, 1.0), (0.7, 1.0, 1.6)])
def test_a_blob_arrives_where_the_rotation_puts_it(voxel) -> None:
    grid = Geometry((61, 52, 45), voxel, OBLIQUE)
    volume = blob(grid, at=(3, -2, 4)).astype(np.float32)
    turned = grid_centred_on(grid, np.ones(grid.shape, dtype=bool), 0.6)
    expected = blob(turned.geometry, rotation_onto(OBLIQUE), at=(3, -2, 4))
    seen = turned.turn(volume)
    inside = seen > 0.05  # beyond the original grid there is nothing
    assert inside.sum() > 10_000
    assert np.abs(seen - expected)[inside].max() < 0.02  # trilinear


@settings(max_examples=20, deadline=None)
@given(unit, st.integers(0, 2**31))
def test_the_mask_is_all_that_turning_back_looks_at(b, seed) -> None:
    rng = np.random.default_rng(seed)
    grid = Geometry((11, 9, 7), (1.0, 0.8, 1.3), tuple(np.array(b) / np.linalg.norm(b)))
    mask = rng.random(grid.shape) > 0.8
    mask[5, 4, 3] = True
    turned = grid_centred_on(grid, mask, 0.6)
    chi = rng.standard_normal(turned.geometry.shape, dtype=np.float32)
    whole = turned.turn_back(chi, grid.shape)[mask]
    np.testing.assert_allclose(turned.turn_back(chi * turned.mask, grid.shape)[mask], whole)


def test_the_grid_holds_all_that_interpolation_leaves() -> None:
    grid = Geometry((12, 10, 8), (1.0, 1.2, 0.9), OBLIQUE)
    turned = grid_centred_on(grid, np.ones(grid.shape, dtype=bool), 0.6)
    for n, corner in enumerate(np.ndindex(2, 2, 2)):
        volume = np.zeros(grid.shape, dtype=np.float32)
        volume[tuple(-c for c in corner)] = 1
        seen = turned.turn(volume)
        # one voxel of the coarse grid, by the volume of the fine ones
        assert seen.sum() == pytest.approx(1.0 * 1.2 * 0.9 / 0.6**3, rel=0.1), n


def test_an_empty_mask_is_refused() -> None:
    grid = Geometry((5, 5, 5))
    with pytest.raises(DataError):
        grid_centred_on(grid, np.zeros(grid.shape, dtype=bool), 0.6)
