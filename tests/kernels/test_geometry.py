"""Voxel size and B0 direction, read off affines of every kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.kernels.geometry import Geometry

SHAPE = (5, 6, 7)


def affine_of(linear: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = -90, 126, -72
    return affine


@settings(deadline=None)
@given(
    st.tuples(*[st.floats(0.1, 10)] * 3),
    st.tuples(*[st.floats(-180, 180)] * 3),
    st.permutations(range(3)),
    st.tuples(*[st.sampled_from((-1, 1))] * 3),
)
def test_an_affine_gives_voxel_size_and_direction(voxel_size_mm, angles_deg, order, flips):
    rotation = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    rotation = rotation[:, order] * flips
    geometry = Geometry.from_affine(SHAPE, affine_of(rotation * voxel_size_mm))
    np.testing.assert_allclose(geometry.voxel_size_mm, voxel_size_mm, rtol=1e-12)
    np.testing.assert_allclose(geometry.b0_direction, rotation[2], atol=1e-12)


@pytest.mark.parametrize(
    ("linear", "voxel_size_mm", "b0_direction"),
    [
        (np.diag([1, 2, 3]), (1, 2, 3), (0, 0, 1)),
        (np.diag([-1, 2, -3]), (1, 2, 3), (0, 0, -1)),
        ([[0, 0, 3], [1, 0, 0], [0, 2, 0]], (1, 2, 3), (0, 1, 0)),  # sagittal
        ([[1, 0, 0], [0, 0, 3], [0, -2, 0]], (1, 2, 3), (0, -1, 0)),  # coronal
    ],
)
def test_slices_along_the_axes(linear, voxel_size_mm, b0_direction):
    geometry = Geometry.from_affine(SHAPE, affine_of(np.array(linear)))
    assert geometry == Geometry(SHAPE, voxel_size_mm, b0_direction)


@pytest.mark.parametrize(
    "linear",
    [
        np.zeros((3, 3)),
        np.diag([1, 0, 1]),
        [[1, 1, 0], [0, 0, 0], [0, 0, 1]],
        [[1, 2, 3], [2, 4, 6], [3, 6, 9]],
        np.diag([1, np.nan, 1]),
        np.diag([1, np.inf, 1]),
    ],
    ids=["zero", "flat", "two axes alike", "rank one", "NaN", "Inf"],
)
def test_an_impossible_affine_is_refused(linear):
    with pytest.raises(GeometryError, match=r"singular|finite.*correct the header"):
        Geometry.from_affine(SHAPE, affine_of(np.array(linear)))


def test_an_affine_of_another_shape_is_refused():
    with pytest.raises(GeometryError, match="finite 4x4 matrix"):
        Geometry.from_affine(SHAPE, np.eye(3))


@pytest.mark.parametrize("shape", [(), (5,), (5, 6), (5, 6, 7, 2)])
def test_a_volume_that_is_not_3d_is_refused(shape):
    with pytest.raises(GeometryError, match=f"{len(shape)}-D"):
        Geometry.from_affine(shape, np.eye(4))


@pytest.mark.parametrize("shape", [(0, 6, 7), (5, -6, 7), (5, 6), (5, 6, 7, 1), ()])
def test_a_bad_shape_is_refused(shape):
    with pytest.raises(GeometryError, match="three positive integers"):
        Geometry(shape)


@pytest.mark.parametrize("voxel", [(0, 1, 1), (1, -1, 1), (1, 1, np.nan), (np.inf, 1, 1), (1, 1)])
def test_a_bad_voxel_size_is_refused(voxel):
    with pytest.raises(GeometryError, match=r"voxel.size"):
        Geometry(SHAPE, voxel)


@pytest.mark.parametrize("direction", [(0, 0, 0), (0, np.nan, 1), (np.inf, 0, 0), (0, 1), 1.0])
def test_a_bad_direction_is_refused(direction):
    with pytest.raises(GeometryError, match=r"(?i)b0.direction"):
        Geometry(SHAPE, b0_direction=direction)


@settings(deadline=None)
@given(st.tuples(*[st.floats(-1e6, 1e6)] * 3).filter(lambda b: max(map(abs, b)) > 1e-6))
def test_the_direction_is_a_unit_vector(direction):
    geometry = Geometry(SHAPE, b0_direction=direction)
    assert np.linalg.norm(geometry.b0_direction) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(np.cross(geometry.b0_direction, direction), 0, atol=1e-9)
    assert geometry.b0_angle_deg(direction) == pytest.approx(0, abs=1e-5)


def test_the_angle_between_axes_has_no_sign():
    geometry = Geometry(SHAPE)
    assert geometry.b0_angle_deg((0, 0, -2)) == 0
    assert geometry.b0_angle_deg((3, 0, 0)) == pytest.approx(90)
    assert geometry.b0_angle_deg((0, -1, 1)) == pytest.approx(45)


def test_padding_grows_both_sides():
    geometry = Geometry(SHAPE, (1, 2, 3), (0, 0.6, 0.8))
    assert geometry.padded(0) == geometry
    assert geometry.padded(2) == Geometry((9, 10, 11), (1, 2, 3), (0, 0.6, 0.8))
    assert geometry.padded((0, 1, 2)).shape == (5, 8, 11)
    with pytest.raises(GeometryError, match="zero or more"):
        geometry.padded((0, -1, 0))


def test_a_sheared_affine_is_refused():
    affine = np.eye(4)
    affine[0, 1] = 0.01
    assert Geometry.from_affine((4, 4, 4), affine).voxel_size_mm == pytest.approx((1, 1, 1), 1e-3)
    affine[0, 1] = 0.1
    with pytest.raises(GeometryError, match=r"shears the voxel axes 5\.7 degrees"):
        Geometry.from_affine((4, 4, 4), affine)
