"""Pictures of reconstructions: a row for each volume, three planes of it, and a colour bar."""

import importlib.util
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qsm_deploy.kernels.bounding_box import Corner
from qsm_deploy.kernels.errors import MissingDependencyError, UsageError
from qsm_deploy.kernels.geometry import Geometry, Mask, shape_text, vector_text
from qsm_deploy.runtime.page.planes import PLANES, Planes, centre_of, voxel_at
from qsm_deploy.runtime.page.rows import Row, require_one_grid
from qsm_deploy.runtime.scan.axes import STORED, Affine, Axes
from qsm_deploy.runtime.scan.params import Vector
from qsm_deploy.runtime.scan.scan import Scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Panel
    from matplotlib.figure import Figure

DPI = 150
PANELS_INCH = 8.0  # the widths of three, or the greatest height
THINNEST_INCH = 2 / DPI
COLUMN_INCH, ROW_INCH = 1.5, 1.3  # at least, for what is written there
BAR_INCH, BAR_HEIGHT = 0.12, 0.7  # its height is relative to the row's
GAP_INCH = 0.45  # between panels, for their letters
LEFT_INCH, RIGHT_INCH, TOP_INCH, BOTTOM_INCH = 0.65, 0.65, 1.15, 0.3
NAME_INCH = 0.2  # of a row, from the left
TITLE_INCH, SUBTITLE_INCH, PLANES_INCH = 0.3, 0.52, 0.84  # from the top
LETTER_POINTS = 4  # from its edge
# of a panel: where it is, relative to the panel, and how a letter beside it is aligned
EDGES = (
    ((0, 0.5), "right", "center"),
    ((1, 0.5), "left", "center"),
    ((0.5, 0), "center", "top"),
    ((0.5, 1), "center", "bottom"),
)

BACKGROUND, FOREGROUND, MUTED = "#0b0d10", "#e8eaed", "#8a9099"


def scan_figure(
    scan: Scan,
    rows: Sequence[Row],
    title: str = "",
    *,
    about: str = "",
    slices: Sequence[float] | None = None,
) -> "Figure":
    """Return the picture of a reconstruction.

    Parameters
    ----------
    scan
        The acquisition.
    rows
        What of it, on its grid; see :func:`scan_rows`.
    title, about
        What is written above the picture, and at the end of the line under it.
    slices
        Where the planes lie: R, A and S [mm], or the stored voxel where the axes are not known; by
        default the centre of the mask.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    GeometryError
        If a shape differs from the scan's.
    UsageError
        If ``slices`` lie outside the mask's box.
    DataError
        If the mask is empty.
    """
    return rows_figure(
        rows,
        scan.mask,
        scan.geometry,
        scan.affine,
        title=title,
        about=about,
        at=None if slices is None else voxel_at(slices, scan),
        axes=scan.axes,
    )


def rows_figure(
    rows: Sequence[Row],
    mask: Mask,
    geometry: Geometry,
    affine: Affine | None,
    *,
    title: str = "",
    about: str = "",
    at: Corner | None = None,
    axes: Axes = STORED,
) -> "Figure":
    """Draw three planes of some volumes on one grid.

    Parameters
    ----------
    rows
        An (x, y, z) volume each.
    mask
        (x, y, z) bool, True inside; the picture shows its whole box and is dark outside.
    geometry
        The grid; its voxel size sets the aspect ratio.
    affine
        (4, 4) from voxels to RAS [mm]; ``None`` where nobody says where axes run to.
    title, about
        Written above the picture, and at the end of the line under it.
    at
        A voxel that the planes cut; by default the centre of the mask.
    axes
        How those of the grid are made of the stored ones, by which they are named without an
        affine.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    GeometryError
        If a shape differs from the geometry's.
    DataError
        If the mask is empty.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    require_one_grid(rows, mask, geometry)
    figure = Figure(dpi=DPI, facecolor=BACKGROUND)
    planes = Planes(mask, affine, at or centre_of(mask), axes)
    panels = _panels(figure, planes.sides_mm(geometry.voxel_size_mm), len(rows))
    for row, (*row_panels, bar) in zip(rows, panels, strict=True):
        _draw_row(figure, planes, row, row_panels, bar)
    for plane, panel in zip(PLANES, panels[0], strict=False):
        _write(figure, _middle(panel)[0], PLANES_INCH, planes.title(plane), ha="center")
    grid = f"{shape_text(geometry.shape)}, voxel {vector_text(geometry.voxel_size_mm)} mm"
    tilt = f"B0 {geometry.b0_angle_deg((0, 0, 1)):.3g} deg off the third axis"
    subtitle = ", ".join(text for text in (grid, tilt, about) if text)
    left = LEFT_INCH / figure.get_figwidth()
    _write(figure, left, TITLE_INCH, title, fontsize=13, fontweight="bold")
    _write(figure, left, SUBTITLE_INCH, subtitle, fontsize=8, color=MUTED)
    return figure


def png_of(figure: "Figure", dpi: int = DPI) -> bytes:
    """Return a picture as a file."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi, metadata={"Software": None})
    return png.getvalue()


def has_matplotlib() -> bool:
    """Tell whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Refuse to draw without the library for it.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    if not has_matplotlib():
        raise MissingDependencyError("matplotlib", "figure", "--figure")


def require_look(slices: Sequence[float] | None, window: Sequence[float] | None) -> None:
    """Refuse what says neither where planes lie nor what they show.

    Raises
    ------
    UsageError
        If they are not three finite numbers, and two of which the first is less.
    """
    if slices is not None and not (len(slices) == 3 and all(map(math.isfinite, slices))):
        raise UsageError(f"--slices are {_words(slices)}, expected three finite numbers, R, A, S")
    if window is not None and not (
        len(window) == 2 and all(map(math.isfinite, window)) and window[0] < window[1]
    ):
        raise UsageError(f"--window is {_words(window)}, expected LOW HIGH, finite, LOW < HIGH")


def _words(numbers: Sequence[float]) -> str:
    return " ".join(f"{n:g}" for n in numbers)


def _panels(figure: "Figure", sides_mm: Vector, n_rows: int) -> list[list["Panel"]]:
    """Return three panels and a colour bar's axes per row; every panel has the same scale."""
    sizes_mm = [(sides_mm[plane.across], sides_mm[plane.up]) for plane in PLANES]
    widths_mm, heights_mm = zip(*sizes_mm, strict=True)
    inch = PANELS_INCH / max(sum(widths_mm), *heights_mm)
    sizes = [(max(w * inch, THINNEST_INCH), max(h * inch, THINNEST_INCH)) for w, h in sizes_mm]
    row = max(*(h for _, h in sizes), ROW_INCH)
    columns = [*(max(w, COLUMN_INCH) for w, _ in sizes), BAR_INCH]
    sizes.append((BAR_INCH, BAR_HEIGHT * row))
    width = LEFT_INCH + sum(columns) + len(PLANES) * GAP_INCH + RIGHT_INCH
    height = TOP_INCH + n_rows * row + (n_rows - 1) * GAP_INCH + BOTTOM_INCH
    width, height = (math.ceil(side * DPI) / DPI for side in (width, height))
    figure.set_size_inches(width, height)

    def panel(n: int, column: int) -> "Panel":
        w, h = sizes[column]
        x = LEFT_INCH + sum(columns[:column]) + column * GAP_INCH + (columns[column] - w) / 2
        y = height - TOP_INCH - n * (row + GAP_INCH) - (row + h) / 2
        return figure.add_axes((x / width, y / height, w / width, h / height))

    return [[panel(n, column) for column in range(len(columns))] for n in range(n_rows)]


def _draw_row(
    figure: "Figure", planes: Planes, row: Row, panels: list["Panel"], bar: "Panel"
) -> None:
    """Draw three planes of a volume with the letters of their edges, a name and a colour bar."""
    low, high = row.window
    for plane, panel in zip(PLANES, panels, strict=True):
        shown = planes.cut(row.volume, plane) * np.float32(row.factor)
        image = panel.imshow(shown, row.colours, vmin=low, vmax=high, origin="lower", aspect="auto")
        panel.set_axis_off()
        for letters, (edge, ha, va) in zip(planes.ends(plane), EDGES, strict=True):
            x, y = (LETTER_POINTS * (2 * at - 1) for at in edge)
            panel.annotate(
                letters,
                edge,
                (x, y),
                "axes fraction",
                "offset points",
                color=FOREGROUND,
                fontsize=9,
                ha=ha,
                va=va,
            )
    ticks = [low, 0, high] if low < 0 < high else [low, high]
    colours = figure.colorbar(image, cax=bar, ticks=ticks, format="{x:.3g}")
    colours.outline.set_visible(False)
    bar.tick_params(length=2, color=MUTED, labelcolor=MUTED, labelsize=8)
    bar.set_title(row.unit, color=MUTED, fontsize=8, loc="left")
    below = (1 - _middle(bar)[1]) * figure.get_figheight()
    name = NAME_INCH / figure.get_figwidth()
    _write(figure, name, below, row.name, rotation=90, ha="center", va="center")


def _middle(panel: "Panel") -> tuple[float, float]:
    """Return where a panel is in its figure."""
    cell = panel.get_position()
    return (cell.x0 + cell.x1) / 2, (cell.y0 + cell.y1) / 2


def _write(figure: "Figure", x: float, below_inch: float, text: str, **style: Any) -> None:
    """Write a text at a distance from the top."""
    y = 1 - below_inch / figure.get_figheight()
    figure.text(x, y, text, **{"color": FOREGROUND, "parse_math": False, **style})
