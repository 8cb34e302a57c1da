"""The small picture of a map in an index: its axial plane, as PNG, without matplotlib."""

import base64
import math
import re
import struct
import zlib
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.page.planes import PLANES, Planes, centre_of
from qsm_deploy.runtime.page.rows import GIVEN
from qsm_deploy.runtime.scan.params import is_number
from qsm_deploy.runtime.scan.scan import Scan

MOST_PIXELS = 128  # of a side; of more voxels every n-th is shown
GREYS = 256
BASE64 = re.compile("[A-Za-z0-9+/]+=*")
LARGEST_MM = 10_000
OUTSIDE = 12  # the grey of the background of pictures


class Thumbnail(TypedDict):
    """A PNG in base64, and the size that it shows [mm]."""

    png: str
    size_mm: list[float]


def thumbnail(volume: Volume, scan: Scan, name: str) -> Thumbnail:
    """Return the axial plane through the centre of a map's mask, in the window of its kind."""
    axial = PLANES[0]
    planes = Planes(scan.mask, scan.affine, centre_of(scan.mask), scan.axes)
    low, high = GIVEN[name][1]
    shown = planes.cut(volume, axial)[::-1]
    every = math.ceil(max(shown.shape) / MOST_PIXELS)
    shown = shown[::every, ::every]
    scaled = np.floor((shown - low) / (high - low) * GREYS)
    greys = np.nan_to_num(np.clip(scaled, 0, GREYS - 1), nan=OUTSIDE).astype(np.uint8)
    sides = planes.sides_mm(scan.geometry.voxel_size_mm)
    size_mm = [round(sides[axis], 1) for axis in (axial.across, axial.up)]
    return {"png": base64.b64encode(grey_png(greys)).decode(), "size_mm": size_mm}


def is_thumbnail(said: Any) -> bool:
    """Return whether what was read from a file is a thumbnail, safe to put into a page."""
    if not isinstance(said, dict):
        return False
    png, size_mm = said.get("png"), said.get("size_mm")
    return (
        isinstance(png, str)
        and BASE64.fullmatch(png) is not None
        and isinstance(size_mm, list)
        and len(size_mm) == 2
        and all(is_number(side) and 0 < side < LARGEST_MM for side in size_mm)
    )


def grey_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return (height, width) greys as a PNG file."""
    height, width = pixels.shape
    lines = np.pad(pixels, ((0, 0), (1, 0)))  # each begins with the number of its filter, none
    chunks = (
        (b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
