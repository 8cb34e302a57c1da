"""Tilted heads: B0 where it is said to be, and affines that say so."""

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.orientation import affine_from_geometry, tilted
from qsm_deploy.kernels.geometry import Geometry

DIRECTIONS = [(0, 0, 1), (0.3, -0.5, 0.7), (1, 0, 0), (-0.2, 0.4, -0.8), (0, 0, -1)]


@pytest.mark.parametrize("b0_direction", DIRECTIONS)
def test_every_orientation_is_tilted_by_the_angle_and_differs(b0_direction):
    first = Geometry((31, 24, 18), (1.0, 0.8, 2.0), b0_direction)
    grids = tilted(first, 5, 25.0)
    assert grids[0] is first
    for n, grid in enumerate(grids[1:], 1):
        assert grid.b0_angle_deg(first.b0_direction) == pytest.approx(25, abs=1e-4)
        assert min(grid.b0_angle_deg(other.b0_direction) for other in grids[:n]) > 24
        again = Geometry.from_affine(grid.shape, affine_from_geometry(grid))
        np.testing.assert_allclose(again.b0_direction, grid.b0_direction, atol=1e-12)
        np.testing.assert_allclose(again.voxel_size_mm, first.voxel_size_mm, rtol=1e-12)


def test_the_tilts_of_an_upright_head_are_about_its_axes():
    directions = [grid.b0_direction for grid in tilted(Geometry((8, 8, 8)), 5, 30.0)]
    c = np.cos(np.radians(30))
    expected = [(0, 0, 1), (0, 0.5, c), (0.5, 0, c), (0, -0.5, c), (-0.5, 0, c)]
    np.testing.assert_allclose(directions, expected, atol=1e-12)
    assert tilted(Geometry((8, 8, 8)), 1, 30.0) == [Geometry((8, 8, 8))]
