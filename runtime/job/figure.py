"""A three-plane picture of one reconstruction: field, susceptibility, and the error if known."""

import importlib.util
import io
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import center_of_mass

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.errors import GeometryError, MissingDependencyError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.scan import Scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

Volume = NDArray[np.float32]
Mask = NDArray[np.bool_]

FIELD_WINDOW_PPM = (-0.05, 0.05)
CHI_WINDOW_PPM = (-0.1, 0.2)
PHASE_WINDOW_RAD = (-math.pi, math.pi)
ERROR_WINDOW_PPM = (-0.05, 0.05)

DPI = 150
BAR_HEIGHT = 0.7  # of its row
PANELS_INCH, BAR_INCH, GAP_INCH = 8.0, 0.12, 0.1  # widths: three panels, a colour bar, a gap
LEFT_INCH, RIGHT_INCH, TOP_INCH, BOTTOM_INCH = 0.45, 0.75, 0.95, 0.2
MARGIN_VOXELS = 2

BACKGROUND, FOREGROUND, MUTED = "#0b0d10", "#e8eaed", "#8a9099"


class Plane(NamedTuple):
    """One of the three cuts: its name and the axes across (right), up, and through it."""

    name: str
    across: int
    up: int
    through: int


class Row(NamedTuple):
    """One line of the picture: a volume, the window it is shown in, and their unit."""

    name: str
    volume: Volume
    window: tuple[float, float]
    unit: str = "ppm"
    colours: str = "gray"


# With RAS-like voxel axes anterior is up in the first, superior in the others.
PLANES = (Plane("axial", 0, 1, 2), Plane("coronal", 0, 2, 1), Plane("sagittal", 1, 2, 0))


def figure_png(
    measured: Volume,
    chi_ppm: Volume,
    mask: Mask,
    geometry: Geometry,
    *,
    truth_ppm: Volume | None = None,
    title: str = "",
    is_phase: bool = False,
) -> bytes:
    """Draw three planes through the centre of the mask, grey, in fixed windows.

    Parameters
    ----------
    measured, chi_ppm
        (x, y, z) local field, or wrapped phase [rad], and susceptibility [ppm]; a row each.
    mask
        (x, y, z) bool, True inside; the picture is cut to it and dark outside.
    geometry
        The grid; its voxel size sets the aspect ratio.
    truth_ppm
        (x, y, z) true susceptibility [ppm]; adds a row for it and one for the error.
    title
        Written above the picture.
    is_phase
        Whether ``measured`` is a wrapped phase.

    Returns
    -------
    bytes
        A PNG file. Voxel axes point right and up and are named, whatever their anatomy.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    GeometryError
        If a shape differs from the geometry's.
    DataError
        If the mask is empty.
    """
    rows = scan_rows(measured, chi_ppm, mask, geometry, truth_ppm=truth_ppm, is_phase=is_phase)
    return png_of(rows_figure(rows, mask, geometry, title=title))


def scan_figure(scan: Scan, chi_ppm: Volume, title: str = "") -> "Figure":
    """Return the picture of a reconstruction; see :func:`figure_png`."""
    rows = scan_rows(
        scan.measured[0],
        chi_ppm,
        scan.mask,
        scan.geometry,
        truth_ppm=scan.truth_ppm,
        is_phase=scan.quantity == "phase_rad",
    )
    return rows_figure(rows, scan.mask, scan.geometry, title=title)


def scan_rows(
    measured: Volume,
    chi_ppm: Volume,
    mask: Mask,
    geometry: Geometry,
    *,
    truth_ppm: Volume | None = None,
    is_phase: bool = False,
) -> list[Row]:
    """Return the lines of :func:`figure_png`."""
    require_matplotlib()
    volumes = {"field": measured, "susceptibility": chi_ppm, "mask": mask}
    if truth_ppm is not None:
        volumes["truth"] = truth_ppm
    for name, volume in volumes.items():
        if volume.shape != geometry.shape:
            raise GeometryError(
                f"the {name} has shape {volume.shape}, its geometry says {geometry.shape}"
            )

    rows = [
        Row("phase", measured, PHASE_WINDOW_RAD, "rad")
        if is_phase
        else Row("local field", measured, FIELD_WINDOW_PPM),
        Row("susceptibility χ", chi_ppm, CHI_WINDOW_PPM),
    ]
    if truth_ppm is not None:
        rows.append(Row("true χ", truth_ppm, CHI_WINDOW_PPM))
        rows.append(Row("error of χ", chi_ppm - truth_ppm, ERROR_WINDOW_PPM))
    return rows


def rows_png(
    rows: list[Row],
    mask: Mask,
    geometry: Geometry,
    *,
    title: str = "",
    through: tuple[int, int, int] | None = None,
) -> bytes:
    """Draw three planes of some volumes on one grid; see :func:`rows_figure`."""
    return png_of(rows_figure(rows, mask, geometry, title=title, through=through))


def png_of(figure: "Figure") -> bytes:
    """Return a picture as a file."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return png.getvalue()


def rows_figure(
    rows: list[Row],
    mask: Mask,
    geometry: Geometry,
    *,
    title: str = "",
    through: tuple[int, int, int] | None = None,
) -> "Figure":
    """Draw three planes of some volumes on one grid, as :func:`figure_png` does.

    Parameters
    ----------
    rows
        A volume each.
    mask
        (x, y, z) bool, True inside, not empty.
    geometry
        The grid.
    title
        Written above the picture.
    through
        A voxel of the mask that the planes cut; by default the centre of the mask.
    """
    from matplotlib.figure import Figure

    at = "the centre of the mask" if through is None else "voxel ({}, {}, {})".format(*through)
    figure = Figure(dpi=DPI, facecolor=BACKGROUND)
    _draw_rows(figure, rows, mask, geometry, through)
    _draw_title(figure, title, f"{geometry}; planes through {at}")
    return figure


def require_matplotlib() -> None:
    """Refuse to draw without the library for it.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib", "figure", "--figure")


def _draw_rows(
    figure: "Figure",
    rows: list[Row],
    mask: Mask,
    geometry: Geometry,
    through: tuple[int, int, int] | None,
) -> None:
    """Draw a panel per row and plane and a colour bar per row."""
    box = bounding_box(mask, margin=MARGIN_VOXELS)
    centre = through or tuple(round(float(c)) for c in center_of_mass(mask))
    sides_mm = [
        (side.stop - side.start) * voxel
        for side, voxel in zip(box, geometry.voxel_size_mm, strict=True)
    ]
    panels = _panels(figure, sides_mm, len(rows))
    for row, (*row_panels, bar) in zip(rows, panels, strict=True):
        inside = np.where(mask[box], row.volume[box], np.float32(np.nan))
        low, high = row.window
        for plane, axes in zip(PLANES, row_panels, strict=True):
            index = centre[plane.through] - box[plane.through].start
            image = axes.imshow(
                inside.take(index, axis=plane.through).T,
                cmap=row.colours,
                vmin=low,
                vmax=high,
                origin="lower",
                extent=(0, sides_mm[plane.across], 0, sides_mm[plane.up]),
            )
        colorbar = figure.colorbar(image, cax=bar, ticks=[low, 0, high], format="{x:.3g}")
        _draw_bar(bar, colorbar, row.unit)
        cell = row_panels[0].get_position(original=True)
        middle = (cell.y0 + cell.y1) / 2
        figure.text(
            cell.x0 / 2, middle, row.name, color=FOREGROUND, rotation=90, ha="center", va="center"
        )
    for plane, axes in zip(PLANES, panels[0][:3], strict=True):
        _draw_plane_labels(figure, axes, plane, centre[plane.through])


def _panels(figure: "Figure", sides_mm: list[float], n_rows: int) -> list[list["Axes"]]:
    """Return three panels and a colour bar's axes per row; every panel has the same scale."""
    widths_mm = [sides_mm[plane.across] for plane in PLANES]
    height_mm = max(sides_mm[plane.up] for plane in PLANES)
    inch_per_mm = PANELS_INCH / max(sum(widths_mm), height_mm)
    columns = [width_mm * inch_per_mm for width_mm in widths_mm] + [BAR_INCH]
    row = height_mm * inch_per_mm
    width = LEFT_INCH + sum(columns) + (len(columns) - 1) * GAP_INCH + RIGHT_INCH
    height = BOTTOM_INCH + n_rows * row + (n_rows - 1) * GAP_INCH + TOP_INCH
    figure.set_size_inches(math.ceil(width * DPI) / DPI, math.ceil(height * DPI) / DPI)
    grid = figure.add_gridspec(
        n_rows,
        len(columns),
        width_ratios=columns,
        left=LEFT_INCH / width,
        right=1 - RIGHT_INCH / width,
        bottom=BOTTOM_INCH / height,
        top=1 - TOP_INCH / height,
        wspace=GAP_INCH * len(columns) / sum(columns),  # relative to the mean column
        hspace=GAP_INCH / row,
    )
    panels = [[figure.add_subplot(grid[i, j]) for j in range(len(columns))] for i in range(n_rows)]
    for *row_panels, bar in panels:
        for axes in row_panels:
            axes.set_axis_off()
        bar.set_box_aspect(BAR_HEIGHT * row / BAR_INCH)
    return panels


def _draw_bar(axes: "Axes", bar: "Colorbar", unit: str) -> None:
    """Style a colour bar, its unit on top."""
    axes.tick_params(length=2, color=MUTED, labelcolor=MUTED, labelsize=8)
    axes.set_title(unit, color=MUTED, fontsize=8, loc="left")
    bar.outline.set_visible(False)


def _draw_plane_labels(figure: "Figure", axes: "Axes", plane: Plane, index: int) -> None:
    """Write the plane's name above its column, and its axes into the corner of the first panel."""
    cell = axes.get_position(original=True)
    across, up, through = ("xyz"[axis] for axis in (plane.across, plane.up, plane.through))
    title = f"{plane.name}, {through} = {index}"
    figure.text((cell.x0 + cell.x1) / 2, cell.y1, title, color=FOREGROUND, ha="center", va="bottom")
    figure.text(cell.x0, cell.y0, f"{across} →\n{up} ↑", color=MUTED, fontsize=8)


def _draw_title(figure: "Figure", title: str, subtitle: str) -> None:
    """Write two lines into the top left corner."""
    width, height = figure.get_size_inches()
    left = LEFT_INCH / width
    figure.text(
        left,
        1 - 0.3 / height,
        title,
        color=FOREGROUND,
        fontsize=13,
        fontweight="bold",
        parse_math=False,
    )
    figure.text(left, 1 - 0.52 / height, subtitle, color=MUTED, fontsize=8)
