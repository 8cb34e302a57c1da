"""The pictures of a check's report: three planes to move through, and three charts."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qsm_deploy.export.check.cases import Compared
from qsm_deploy.runtime.metrics.difference import difference_ppb
from qsm_deploy.runtime.page.rows import CHI_WINDOW_PPM, Row
from qsm_deploy.runtime.page.viewer import LARGEST, viewer
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI, SIZE_INCH = 110, (11.0, 3.4)
SHOWN_PERCENT = 99.9  # of the voxels are within the window of the difference
BINS = 101
SCATTERED, SCATTERED_ENDS = 8000, 500  # voxels, and of them the lowest and highest
TICKS = 5
COLOURS = ("#0b5cad", "#c2510c", "#3f7d20")
STEPS = (1.0, 2.0, 5.0, 10.0)


def planes_viewer(one: Compared, most_bytes: int) -> str:
    """Return reference, engine and difference, to move through from the largest difference."""
    scan = one.case.measured
    difference = one.engine_ppm - one.reference_ppm
    shown = float(np.percentile(np.abs(difference[scan.mask]), SHOWN_PERCENT))
    limit = round_up(shown * PPB_PER_PPM)
    largest = float(np.abs(difference[scan.mask]).max()) or limit / PPB_PER_PPM
    steps = 10.0 ** math.floor(math.log10(LARGEST / largest))
    rows = [
        Row("reference χ", one.reference_ppm, CHI_WINDOW_PPM),
        Row("engine χ", one.engine_ppm, CHI_WINDOW_PPM),
        Row("difference", difference, (-limit, limit), "ppb", PPB_PER_PPM, "RdBu_r", steps),
    ]
    x, y, z = one.row["worst_voxel"]
    return viewer(
        rows,
        scan.mask,
        scan.geometry,
        scan.affine,
        title=one.row["where"],
        about=f"stored {scan.stored_letters}, planes through its voxel ({x}, {y}, {z})",
        at=scan.axes.voxel((x, y, z), scan.axes.inverse.sizes(scan.geometry.shape)),
        axes=scan.axes,
        most_bytes=most_bytes,
    )


def charts_png(comparisons: Sequence[Compared]) -> bytes:
    """Draw the histogram of the difference, the maps against each other, and bias by field.

    Parameters
    ----------
    comparisons
        Of one volume, one for each way that the engine was run; the scatter shows the first.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE_INCH, dpi=DPI, layout="constrained")
    histogram, scatter, bias = figure.subplots(1, 3)
    _draw_histogram(histogram, comparisons)
    _draw_scatter(scatter, comparisons[0])
    _draw_bias(bias, comparisons)
    for axes in (histogram, scatter, bias):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(TICKS))
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def round_up(value: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten; 1 for 0."""
    if not 0 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step for step in STEPS if step * power >= value * (1 - 1e-9)) * power


def _draw_histogram(axes: "Axes", comparisons: Sequence[Compared]) -> None:
    differences = [
        difference_ppb(one.engine_ppm, one.reference_ppm, one.case.measured.mask)
        for one in comparisons
    ]
    limit = round_up(max(float(np.abs(d).max()) for d in differences))
    for one, difference, colour in zip(comparisons, differences, COLOURS, strict=False):
        counts, edges = np.histogram(difference, BINS, (-limit, limit))
        axes.stairs(counts, edges, color=colour, label=one.row["by"], linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    _label(axes, "engine - reference [ppb]", "voxels", "Difference")
    axes.legend(fontsize=7, frameon=False)


def _draw_scatter(axes: "Axes", one: Compared) -> None:
    mask = one.case.measured.mask
    x, y = one.reference_ppm[mask], one.engine_ppm[mask]
    shown = np.argsort(x, kind="stable")
    if shown.size > SCATTERED:  # every n-th, and all where there are few
        ends = shown[:SCATTERED_ENDS], shown[-SCATTERED_ENDS:]
        shown = np.concatenate([*ends, shown[:: shown.size // SCATTERED]])
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    axes.plot([low, high], [low, high], color="#999999", linewidth=0.8)
    axes.plot(x[shown], y[shown], ".", color=COLOURS[0], markersize=2, alpha=0.5)
    axes.set_aspect("equal")
    _label(axes, "reference χ [ppm]", "engine χ [ppm]", f"Engine ({one.row['by']}), reference")


def _draw_bias(axes: "Axes", comparisons: Sequence[Compared]) -> None:
    axes.axhline(0, color="#999999", linewidth=0.8)
    for one, colour in zip(comparisons, COLOURS, strict=False):
        bins = one.row.get("bias_by_field", [])
        field = [b["field_ppm"] for b in bins]
        low, high = ([b[name] for b in bins] for name in ("p5_ppb", "p95_ppb"))
        axes.fill_between(field, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(field, [b["mean_ppb"] for b in bins], color=colour, marker=".", markersize=4)
    if not any(one.row.get("bias_by_field") for one in comparisons):
        axes.text(0.5, 0.5, "no local field", transform=axes.transAxes, ha="center")
    _label(axes, "local field [ppm]", "mean, 5 to 95 % [ppb]", "Bias by local field strength")


def _label(axes: "Axes", x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.set_title(title, fontsize=9)
