"""The picture: which way is up, the aspect ratio, its rows, and what it refuses."""

import io

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError, GeometryError, MissingDependencyError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.job.figure import Row, figure_png, rows_png

image = pytest.importorskip("matplotlib.image")

GEOMETRY = Geometry((20, 24, 12), (1.0, 1.0, 2.0))
MASK = np.pad(np.ones((16, 20, 8), bool), 2)
ZEROS = np.zeros(GEOMETRY.shape, np.float32)


def pixels(png: bytes) -> np.ndarray:
    return image.imread(io.BytesIO(png))[..., :3].mean(axis=-1)


def draw(chi: np.ndarray, geometry: Geometry = GEOMETRY) -> np.ndarray:
    return pixels(figure_png(ZEROS, chi, MASK, geometry))


def blob(*voxel: int) -> np.ndarray:
    chi = ZEROS.copy()
    chi[tuple(slice(v - 1, v + 2) for v in voxel)] = 1.0
    return chi


def brighter(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the (row, column) of every pixel that lit up."""
    return np.argwhere(after > before + 0.3)


def test_a_png_comes_back_and_is_reproducible():
    png = figure_png(ZEROS, ZEROS, MASK, GEOMETRY, title="title")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"Software" not in png  # nor the version of matplotlib
    assert png == figure_png(ZEROS, ZEROS, MASK, GEOMETRY, title="title")
    assert png != figure_png(ZEROS, ZEROS, MASK, GEOMETRY, title="another")


def test_what_a_card_says_is_text_and_no_formula():
    png = figure_png(ZEROS, ZEROS, MASK, GEOMETRY, title="$\\frac{$ tkd-unet $x$")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")


def test_a_truth_adds_two_rows():
    without = draw(ZEROS)
    with_truth = pixels(figure_png(ZEROS, ZEROS, MASK, GEOMETRY, truth_ppm=ZEROS))
    assert with_truth.shape[1] == without.shape[1]
    assert 1.6 < with_truth.shape[0] / without.shape[0] < 2


@pytest.mark.parametrize(("axis", "panel", "direction"), [(0, 0, 1), (1, 0, 0), (2, 1, 0)])
def test_x_points_right_and_y_and_z_point_up(axis, panel, direction):
    """A blob moved along +x goes right in the axial panel; along +y up; +z up in the coronal."""
    low, high = [10, 12, 6], [10, 12, 6]
    low[axis], high[axis] = low[axis] - 2, high[axis] + 2
    blank, width = draw(ZEROS), draw(ZEROS).shape[1]
    position = []
    for voxel in (low, high):
        lit = brighter(draw(blob(*voxel)), blank)
        edges = width * np.array([0, 0.32, 0.58, 0.95])
        inside = (lit[:, 1] > edges[panel]) & (lit[:, 1] < edges[panel + 1])
        position.append(lit[inside].mean(axis=0)[direction])
    moved = position[1] - position[0]
    assert moved > 10 if direction == 1 else moved < -10


def test_voxel_size_sets_the_aspect_ratio():
    chi = ZEROS.copy()
    chi[6:14, 8:16, 4:8] = 1.0  # a cube of 8 mm
    lit = brighter(draw(chi), draw(ZEROS))
    columns = np.unique(lit[:, 1])
    for panel in np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1):
        rows = np.unique(lit[np.isin(lit[:, 1], panel), 0])
        assert panel.size == pytest.approx(rows.size, abs=2)


def test_the_error_row_shows_the_reconstruction_minus_the_truth():
    same = pixels(figure_png(ZEROS, blob(10, 12, 6), MASK, GEOMETRY, truth_ppm=blob(10, 12, 6)))
    missing = pixels(figure_png(ZEROS, ZEROS, MASK, GEOMETRY, truth_ppm=blob(10, 12, 6)))
    darker = np.argwhere(missing < same - 0.3)[:, 0] / same.shape[0]
    in_error_row = darker > 0.75
    assert in_error_row.any()  # chi - truth is negative where the map misses the blob
    assert (~in_error_row).any()  # and the map itself lacks it


def test_voxels_outside_the_mask_are_not_shown():
    chi = np.where(MASK, ZEROS, np.float32(np.nan))
    np.testing.assert_array_equal(draw(chi), draw(ZEROS))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 300), (300, 1, 2)])
def test_any_shape_can_be_drawn(shape):
    volume = np.zeros(shape, np.float32)
    png = figure_png(volume, volume, np.ones(shape, bool), Geometry(shape), truth_ppm=volume)
    assert max(pixels(png).shape) < 8000


def test_the_planes_go_through_the_voxel_that_is_asked_for():
    row = Row("chi", blob(4, 5, 3), (-0.1, 0.2))
    away = pixels(rows_png([row], MASK, GEOMETRY, through=(15, 18, 8)))
    there = pixels(rows_png([row], MASK, GEOMETRY, through=(4, 5, 3)))
    assert len(brighter(there, away)) > 1000


def test_an_empty_mask_is_refused():
    with pytest.raises(DataError, match="mask is empty"):
        figure_png(ZEROS, ZEROS, np.zeros_like(MASK), GEOMETRY)


def test_another_grid_is_refused():
    with pytest.raises(GeometryError, match=r"the truth has shape \(19, 24, 12\)"):
        figure_png(ZEROS, ZEROS, MASK, GEOMETRY, truth_ppm=ZEROS[1:])


def test_a_missing_matplotlib_names_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"--figure needs matplotlib.*\[figure\]"):
        figure_png(ZEROS, ZEROS, MASK, GEOMETRY)
