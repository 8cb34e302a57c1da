"""The picture: which side is left, the aspect ratio, its rows and bars, and what it refuses."""

import io
import itertools
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import (
    DataError,
    GeometryError,
    MissingDependencyError,
    UsageError,
)
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.page import figure as figures
from qsm_deploy.runtime.page.figure import (
    BACKGROUND,
    BOTTOM_INCH,
    DPI,
    FOREGROUND,
    GAP_INCH,
    TOP_INCH,
    png_of,
    require_look,
    rows_figure,
)
from qsm_deploy.runtime.page.rows import Row, scan_rows
from qsm_deploy.runtime.reconstruction.inversion import CHI
from qsm_deploy.runtime.scan.axes import axes_named
from qsm_deploy.runtime.scan.scan import Scan

image = pytest.importorskip("matplotlib.image")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

GEOMETRY = Geometry((20, 24, 12), (1.0, 1.0, 2.0))
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
MASK = np.pad(np.ones((16, 20, 8), bool), 2)
ZEROS = np.zeros(GEOMETRY.shape, np.float32)
AXIAL, CORONAL, SAGITTAL, BAR = range(4)  # of a row


def scan_of(affine=AFFINE, **more) -> Scan:
    return Scan(ZEROS[None], MASK, GEOMETRY, nib.Nifti1Header(), affine, **more)


def scan_figure(scan: Scan, chi, title="", *, unit="ppm", window=None, slices=None, **more):
    require_look(slices, window)
    rows = scan_rows(scan, {CHI: chi}, unit=unit, window=window)
    return figures.scan_figure(scan, rows, title, slices=slices, **more)


def pixels(png: bytes) -> np.ndarray:
    return image.imread(io.BytesIO(png))[..., :3].mean(axis=-1)


def panel(figure: Figure, column: int, row: int = 0) -> np.ndarray:
    """Return the pixels of one panel."""
    drawn = pixels(png_of(figure))
    height, width = drawn.shape
    cell = figure.axes[4 * row + column].get_position()
    top, bottom = (round(height * (1 - y)) for y in (cell.y1, cell.y0))
    return drawn[top:bottom, round(width * cell.x0) : round(width * cell.x1)]


def middle_of(lit: np.ndarray) -> np.ndarray:
    """Return where the brightest part of a panel is: right of and above its middle, in halves."""
    row, column = np.argwhere(lit > 0.9).mean(axis=0) / lit.shape
    return np.array([2 * column - 1, 1 - 2 * row])


def blob(*voxel: int) -> np.ndarray:
    chi = ZEROS.copy()
    chi[tuple(slice(v - 1, v + 2) for v in voxel)] = 1.0
    return chi


def test_a_png_comes_back_and_is_reproducible():
    png = png_of(scan_figure(scan_of(), ZEROS, "title"))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"Software" not in png  # nor the version of matplotlib
    assert png == png_of(scan_figure(scan_of(), ZEROS, "title"))
    assert png != png_of(scan_figure(scan_of(), ZEROS, "another"))
    assert png != png_of(scan_figure(scan_of(), ZEROS, "title", about="turned"))


def test_what_a_card_says_is_text_and_no_formula():
    png = png_of(scan_figure(scan_of(), ZEROS, "$\\frac{$ tv-unet $x$", about="$_$"))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("x_runs_to", ["R", "L", "?"])
def test_r_is_on_the_left_and_a_and_s_are_up(x_runs_to):
    affine = {"R": AFFINE, "L": AFFINE * (-1, 1, 1, 1), "?": None}[x_runs_to]
    across = -1 if x_runs_to == "R" else 1
    row = Row("χ", blob(14, 17, 8), (-0.1, 0.2))
    figure = rows_figure([row], MASK, GEOMETRY, affine, at=(14, 17, 8))
    for column, sides in ((AXIAL, (across, 1)), (CORONAL, (across, 1)), (SAGITTAL, (1, 1))):
        found = middle_of(panel(figure, column))
        assert (np.sign(found) == sides).all()
        assert (np.abs(found) > 0.2).all()


def column_of(letter: str, drawn: np.ndarray) -> float:
    """Return the column where a letter of a panel's edge stands in a part of a picture."""
    found = []
    for quarter in np.ndindex(4, 4):  # text is drawn at fractions of pixels
        figure = Figure((1, 1), dpi=DPI, facecolor=BACKGROUND)
        x, y = (0.5 + n / 4 / DPI for n in quarter)
        figure.text(x, y, letter, color=FOREGROUND, fontsize=9, ha="center", va="center")
        lone = pixels(png_of(figure))
        rows, columns = np.nonzero(lone > 0.1)
        glyph = lone[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        windows = np.lib.stride_tricks.sliding_window_view(drawn, glyph.shape)
        apart = np.abs(windows - glyph).mean(axis=(2, 3))
        column = int(apart.argmin()) % apart.shape[1] + glyph.shape[1] / 2
        found.append((float(apart.min()), column))
    apart, column = min(found)
    assert apart < 0.04, letter
    return column


def test_the_picture_is_the_same_in_every_storage_and_r_is_on_the_marked_side(tmp_path):
    """Through qsm-run, with one corner marked: right, front and top."""
    shape = (20, 24, 16)
    mask = np.pad(np.ones((16, 20, 12), np.uint8), 2)
    rng = np.random.default_rng(1)
    field = np.where(mask, 0.002 * rng.standard_normal(shape), 0).astype(np.float32)
    field[14:17, 18:21, 10:13] = 1.0
    affine = np.diag([1.0, 1.1, 2.0, 1.0])
    affine[:3, 3] = -9, -11, 4
    pngs = set()
    for letters in ("RAS", "LAS", "PSR", "LPI"):
        axes = axes_named(letters)
        words = ["--method", "tkd", "-q", "--units", "ppm", "--slices", "6", "9.9", "26"]
        for flag, volume in (("", field), ("-m", mask)):
            path = tmp_path / f"{letters}{flag}.nii"
            nib.Nifti1Image(axes.turn(volume), axes.affine(affine, shape)).to_filename(path)
            words += [flag, str(path)] if flag else [str(path)]
        picture = tmp_path / f"{letters}.png"
        words += ["-o", str(tmp_path / f"{letters}-chi.nii"), "--figure", str(picture)]
        assert main(words) == 0
        pngs.add(picture.read_bytes())
    (png,) = pngs
    drawn = pixels(png)
    row = (len(drawn) / DPI - TOP_INCH - BOTTOM_INCH - GAP_INCH) / 2
    middle = round((TOP_INCH + row / 2) * DPI)
    axial = drawn[: 2 * middle, : drawn.shape[1] // 3]
    mark = np.argwhere(axial[round(TOP_INCH * DPI) :] > 0.95)[:, 1].mean()
    edges = axial[middle - 15 : middle + 15]
    right, left = (column_of(letter, edges) for letter in "RL")
    assert right < mark < left
    assert mark - right < (left - right) / 3


def test_a_truth_adds_two_rows_and_every_row_has_a_bar_with_its_ends_and_unit():
    figure = scan_figure(scan_of(truth_ppm=ZEROS), ZEROS)
    bars = figure.axes[BAR::4]
    assert [bar.get_title(loc="left") for bar in bars] == ["ppm"] * 4
    ends = [tuple(bar.get_yticks()[[0, -1]]) for bar in bars]
    assert ends == [(-0.05, 0.05), (-0.1, 0.2), (-0.1, 0.2), (-0.05, 0.05)]
    assert len(scan_figure(scan_of(), ZEROS).axes) == 8
    phase = scan_figure(scan_of(quantity="phase_rad"), ZEROS).axes[BAR]
    assert phase.get_title(loc="left") == "rad"


def test_a_window_is_in_the_unit_of_the_map():
    chi, truth = blob(10, 12, 6) / 8, blob(10, 12, 6) / 10
    scan = scan_of(truth_ppm=truth)
    in_ppm = scan_figure(scan, chi, window=(0.05, 0.15))
    in_ppb = scan_figure(scan, chi, unit="ppb", window=(50, 150))
    for row in range(4):
        np.testing.assert_allclose(panel(in_ppb, AXIAL, row), panel(in_ppm, AXIAL, row), atol=0.01)
    assert in_ppb.axes[4 + BAR].get_title(loc="left") == "ppb"
    assert [*in_ppb.axes[4 + BAR].get_yticks()] == [50, 150]
    assert [*in_ppb.axes[12 + BAR].get_yticks()] == [-50, 0, 50]
    assert panel(in_ppm, AXIAL, 1).max() == pytest.approx(0.75, abs=0.01)


def test_slices_say_where_planes_cut():
    there = scan_figure(scan_of(), blob(4, 5, 3), slices=(4.2, 4.8, 6.9))
    away = scan_figure(scan_of(), blob(4, 5, 3), slices=(15, 18, 16))
    for column in (AXIAL, CORONAL, SAGITTAL):
        assert (panel(there, column, 1) > 0.9).sum() > 200
        assert (panel(away, column, 1) > 0.9).sum() == 0


@pytest.mark.parametrize(
    ("look", "says"),
    [
        ({"slices": (0, np.nan, 1)}, "--slices are 0 nan 1, expected three finite numbers"),
        ({"slices": (1, 2)}, "expected three"),
        ({"slices": (900, 12, 12)}, "lies outside the mask, whose box is R 2 to 17"),
        ({"window": (0.2, 0.2)}, "--window is 0.2 0.2, expected LOW HIGH"),
        ({"window": (0, np.inf)}, "expected LOW HIGH, finite"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(look, says):
    with pytest.raises(UsageError, match=says):
        scan_figure(scan_of(), ZEROS, **look)


def test_voxel_size_sets_the_aspect_ratio():
    chi = ZEROS.copy()
    chi[6:14, 8:16, 4:8] = 1.0  # a cube of 8 mm
    figure = scan_figure(scan_of(), chi)
    for column in (AXIAL, CORONAL, SAGITTAL):
        lit = panel(figure, column, 1) > 0.5
        height, width = (lit.any(axis=axis).sum() for axis in (1, 0))
        assert width == pytest.approx(height, abs=2)
        assert width > 50


def test_the_error_row_shows_the_reconstruction_minus_the_truth():
    there = blob(10, 12, 6)
    figure = scan_figure(scan_of(truth_ppm=there), ZEROS)
    assert [panel(figure, AXIAL, row).max() > 0.9 for row in range(4)] == [0, 0, 1, 0]
    lowest = [panel(figure, AXIAL, row).min() for row in (1, 3)]
    assert lowest[1] < 0.01 < lowest[0]  # chi - truth is negative where the map misses the blob


def test_voxels_outside_the_mask_are_not_shown():
    chi = np.where(MASK, ZEROS, np.float32(np.nan))
    assert png_of(scan_figure(scan_of(), chi)) == png_of(scan_figure(scan_of(), ZEROS))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 300), (300, 1, 2), (90, 80, 1), (61, 75, 50)])
def test_the_whole_box_is_in_the_frame_and_every_word(shape):
    volume = np.zeros(shape, np.float32)
    rows = [Row("susceptibility χ", volume, (-0.1, 0.2)), Row("error", volume, (-50, 50), "ppb")]
    mask = np.ones(shape, bool)
    affine = np.diag([0.8, 1.0, 1.2, 1.0])
    figure = rows_figure(rows, mask, Geometry(shape, (0.8, 1.0, 1.2)), affine, title="a network")
    assert max(pixels(png_of(figure)).shape) < 4000
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    frame = figure.bbox
    for words in figure.findobj(Text):
        if words.get_text() and words.get_visible():
            box = words.get_window_extent(canvas.get_renderer())
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1, words
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1, words
    titles = [text for text in figure.texts if text.get_text().endswith("mm")]
    ends = [text.get_window_extent(canvas.get_renderer()) for text in titles]
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(ends))
    x, y, z = shape
    for column, across in enumerate([(y, x), (z, x), (z, y)]):
        (drawn,) = figure.axes[column].images
        assert drawn.get_array().shape == across
        cell = figure.axes[column].get_window_extent()
        assert min(cell.width, cell.height) > 1.9  # pixels


def test_the_mask_is_shown_to_its_last_voxel():
    mask = np.zeros((40, 50, 30), bool)
    mask[3:38, 5:49, 9:10] = True
    row = Row("χ", np.ones(mask.shape, np.float32), (-1, 1))
    figure = rows_figure([row], mask, Geometry(mask.shape), np.eye(4))
    shown = [(~np.ma.getmaskarray(axes.images[0].get_array())).sum() for axes in figure.axes[:3]]
    assert shown == [35 * 44, 35, 44]


def test_an_empty_mask_is_refused():
    with pytest.raises(DataError, match="mask is empty"):
        scan_figure(replace(scan_of(), mask=np.zeros_like(MASK)), ZEROS)


def test_another_grid_is_refused():
    with pytest.raises(GeometryError, match=r"the susceptibility χ has shape \(19, 24, 12\)"):
        scan_figure(scan_of(), ZEROS[1:])


def test_a_missing_matplotlib_names_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"--figure needs matplotlib.*\[figure\]"):
        scan_figure(scan_of(), ZEROS)
