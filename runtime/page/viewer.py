"""A viewer inside a page: three linked planes of some volumes, with all of their values.

It is what :func:`rows_figure` draws, to move through: a script of our own on plain canvases, no
library and no request, so that it opens on any machine, with a graphics card or without.

The volumes lie in the page as whole numbers (:attr:`Row.steps` to the unit, that is ppb or
milliradian), int16, little endian, x fastest, ``OUTSIDE`` where the mask is not; in the picture's
axes, which run to the right of the screen, up in the axial plane and up in the others; cut to the
mask's box; gzip, base64.
"""

import base64
import gzip
import importlib.resources
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.bounding_box import Corner
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.runtime.page.figure import has_matplotlib, png_of, rows_figure
from qsm_deploy.runtime.page.parts import json_script, note, picture
from qsm_deploy.runtime.page.planes import PLANES, Planes, centre_of
from qsm_deploy.runtime.page.rows import Row, require_one_grid
from qsm_deploy.runtime.scan.axes import STORED, Affine, Axes, from_corner
from qsm_deploy.runtime.scan.params import Vector
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

OUTSIDE, LARGEST = -32768, 32767
MOST_VOXELS = 24_000_000  # of a volume; larger ones are halved along each axis
MOST_BYTES = 36_000_000  # of all volumes of a page, that it stays below 40 MB
STILL_DPI = 90
WIDEST = 4  # of a slider, relative to the end of the window that is farther from 0
NOTCHES = 200  # of a slider, to either side of 0
EDGES = ("left", "right", "bottom", "top")
NO_SCRIPT = "Scripts are off: the planes do not move."


def viewer_head() -> str:
    """Return what a page with viewers needs in its head."""
    folder = importlib.resources.files("qsm_deploy.runtime.page")
    style, script = ((folder / f"viewer.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return f"<style>\n{style}</style>\n<script>\n{script}</script>"


def viewer(
    rows: Sequence[Row],
    mask: Mask,
    geometry: Geometry,
    affine: Affine | None,
    *,
    title: str = "",
    about: str = "",
    at: Corner | None = None,
    axes: Axes = STORED,
    most_bytes: int = MOST_BYTES,
) -> str:
    """Return three planes of some volumes on one grid, to move through.

    Parameters
    ----------
    rows, mask, geometry, affine, title, about, at, axes
        As for :func:`rows_figure`, whose picture is shown until the volumes are unpacked, and where
        they cannot be; without matplotlib there is none. ``title`` says what it is.
    most_bytes
        Of the volumes in the page; where they need more, they are halved along each axis.

    Raises
    ------
    GeometryError
        If a shape differs from the geometry's.
    DataError
        If the mask is empty.
    """
    require_one_grid(rows, mask, geometry)
    planes = Planes(mask, affine, at or centre_of(mask), axes)
    still = ""
    if has_matplotlib():
        drawn = rows_figure(
            rows, mask, geometry, affine, title=title, about=about, at=at, axes=axes
        )
        still = picture(png_of(drawn, STILL_DPI), f"three planes of {title}", "planes still")
    inside = planes.axes.turn(mask[planes.box])
    volumes = [planes.axes.turn(row.volume[planes.box]) for row in rows]
    packed, clipped, halvings = _packed(rows, volumes, inside, most_bytes)
    said = f"Shown at {2**halvings} x the voxel size, to keep the page small." if halvings else ""
    if clipped:
        said += f" {clipped} values lie beyond what the page holds, and are shown at its end."
    facts = _facts(rows, planes, geometry, halvings)
    sides_mm = planes.sides_mm(geometry.voxel_size_mm)
    x, y, z = sides_mm
    sizes = f"--x:{x:g}fr;--y:{y:g}fr;--wide:{(2 * x + y) / max(y, z):g}"
    return "".join(
        (
            f'<div class="viewer" style="{sizes}">\n',
            still,
            f"<noscript>{note(NO_SCRIPT)}</noscript>\n",
            f'<p class="note said">{escape(said.strip())}</p>\n',
            '<div class="live" hidden>\n',
            _titles(),
            *(_row(row, planes, sides_mm) for row in rows),
            '<p class="keys"><output class="voxel"></output> Wheel or page up, page down: through '
            "the slices; drag or arrow keys: the cross.</p>\n</div>\n",
            json_script(facts, "facts"),
            *(f'<script type="text/plain" class="volume">{data}</script>\n' for data in packed),
            "</div>\n",
        )
    )


def _packed(
    rows: Sequence[Row], volumes: list[Volume], inside: Mask, most_bytes: int
) -> tuple[list[str], int, int]:
    """Return the volumes as text, how many values were clipped, and how often they were halved."""
    halvings = 0
    while True:
        if inside.size <= MOST_VOXELS:
            wholes = [
                _whole_numbers(volume, inside, row.steps)
                for row, volume in zip(rows, volumes, strict=True)
            ]
            packed = [_text(whole) for whole, _ in wholes]
            if sum(map(len, packed)) <= most_bytes:
                return packed, sum(clipped for _, clipped in wholes), halvings
        volumes = [_halved(volume, inside) for volume in volumes]
        inside = np.logical_or.reduce(_blocks(inside), axis=(1, 3, 5))
        halvings += 1


def _whole_numbers(volume: Volume, inside: Mask, steps: float) -> tuple[NDArray[np.int16], int]:
    """Return a volume in whole numbers, and how many of them are clipped."""
    inside = inside & np.isfinite(volume)
    scaled = np.rint(np.where(inside, volume, 0) * np.float32(steps))
    clipped = int(np.count_nonzero(np.abs(scaled) > LARGEST))
    whole = np.clip(scaled, -LARGEST, LARGEST).astype("<i2")
    return np.where(inside, whole, np.int16(OUTSIDE)), clipped


def _text(whole: NDArray[np.int16]) -> str:
    data = whole.astype("<i2").tobytes(order="F")
    return base64.b64encode(gzip.compress(data, compresslevel=9, mtime=0)).decode()


def _halved(volume: Volume, inside: Mask) -> Volume:
    """Return the means of blocks of 2x2x2 voxels, of those inside."""
    blocks = (1, 3, 5)
    total = _blocks(np.where(inside, volume, np.float32(0))).sum(axis=blocks)
    mean: Volume = total / np.maximum(_blocks(inside).sum(axis=blocks), 1).astype(np.float32)
    return mean


def _blocks(volume: NDArray[Any]) -> NDArray[Any]:
    """Return (x / 2, 2, y / 2, 2, z / 2, 2) of a volume, which is filled up where it is odd."""
    even = np.pad(volume, [(0, side % 2) for side in volume.shape])
    return even.reshape([n for side in even.shape for n in (side // 2, 2)])


def _facts(
    rows: Sequence[Row], planes: Planes, geometry: Geometry, halvings: int
) -> dict[str, Any]:
    """Return what the script has to know."""
    x, y, z = (side.stop - side.start for side in planes.box)
    size = 2**halvings
    # from the viewer's voxels, of the picture's axes, to the grid's
    to_grid = planes.axes.affine(from_corner(np.eye(4), planes.box), (x, y, z)) @ np.array(
        np.diag([size, size, size, 1.0]) + np.outer([1, 1, 1, 0], [0, 0, 0, (size - 1) / 2])
    )
    at = np.linalg.inv(to_grid) @ (*planes.at, 1)
    stored = planes.stored.affine(np.eye(4), planes.stored.inverse.sizes(geometry.shape))
    places = [planes.place(plane) for plane in PLANES]
    return {
        "shape": [-(-side // size) for side in planes.axes.sizes((x, y, z))],
        "at": [int(n) for n in np.rint(at[:3] - 1e-6)],
        "planes": [
            {**plane._asdict(), **place._asdict(), "row": (place.row @ to_grid).tolist()}
            for plane, place in zip(PLANES, places, strict=True)
        ],
        "stored": (stored @ to_grid)[:3].tolist(),
        "rows": [_row_facts(row) for row in rows],
    }


def _row_facts(row: Row) -> dict[str, Any]:
    """Return how a row is shown: susceptibility and fields in ppb, whatever its picture says."""
    unit, factor = row.unit, row.factor
    if unit == "ppm":
        unit, factor = "ppb", PPB_PER_PPM
    low, high = (float(f"{end / row.factor * factor:.6g}") for end in row.window)
    step = factor / row.steps
    return {
        "name": row.name,
        "unit": unit,
        "step": step,
        "digits": max(0, -math.floor(math.log10(step) + 1e-9)),
        "window": [low, high],
        "colours": row.colours,
    }


def _titles() -> str:
    return f'<div class="titles">{"<output></output>" * len(PLANES)}</div>\n'


def _row(row: Row, planes: Planes, sides_mm: Vector) -> str:
    """Return three panels with letters at their edges, and what is said and set beside them."""
    panels = "".join(
        '<div class="panel" tabindex="0" role="application"'
        f' aria-label="{escape(row.name)}, {plane.name}"'
        f' style="aspect-ratio:{sides_mm[plane.across]:g}/{sides_mm[plane.up]:g}">'
        '<canvas></canvas><i class="across"></i><i class="up"></i>'
        + "".join(
            f'<b class="{edge}">{escape(letters)}</b>'
            for edge, letters in zip(EDGES, planes.ends(plane), strict=True)
        )
        + "</div>"
        for plane in PLANES
    )
    facts = _row_facts(row)
    widest = WIDEST * max(map(abs, facts["window"]))
    slider = f'type="range" min="{-widest:g}" max="{widest:g}" step="{widest / NOTCHES:g}"'
    ends = "".join(
        f'<label>{end}<input type="number" step="any" class="{end}">'
        f'<input {slider} class="{end}" aria-label="{end}"></label>'
        for end in ("low", "high")
    )
    return (
        f'<div class="row">{panels}<fieldset><legend>{escape(row.name)}</legend>'
        '<div><p><output class="value"></output> <span>at the cross</span></p>'
        '<p><output class="pointed"></output> <span>under the pointer</span></p></div>'
        '<div><canvas class="bar" width="256" height="1"></canvas><p class="ends"><span></span>'
        f"<span>{facts['unit']}</span><span></span></p></div><div>{ends}"
        '<button type="button">reset</button></div>'
        "</fieldset></div>\n"
    )
