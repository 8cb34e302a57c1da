"""A text in the pixels, at the top left of every image, for hospitals whose rules ask for one."""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.dicom.map_series import WINDOW_CENTRE_PPB, WINDOW_WIDTH_PPB

SIZES, SHARE = range(7, 64), 1 / 12  # of letters [pixels], of the rows
MARGIN = 1  # pixels


def letters_of(text: str, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a text as large as fits, (row, column), True on its letters.

    Raises
    ------
    UsageError
        If it is no line of ASCII, of which alone the font has letters, or longer than an image of
        that many rows and columns is wide.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not (text.strip() and text.isascii() and text.isprintable()):
        raise UsageError(f"--burn-in: {text!r} is no line of ASCII; pass one")
    rows, columns = shape
    for size in reversed(SIZES):
        font = ImageFont.load_default(size)
        left, top, right, bottom = map(round, font.getbbox(text, mode="1"))
        width, height = right - left + 2 * MARGIN, bottom - top + 2 * MARGIN
        if width <= columns and (size == SIZES[0] or height <= max(rows * SHARE, SIZES[0])):
            break
    else:
        raise UsageError(f"--burn-in: {text!r} is wider than an image of {columns} columns")
    drawn = Image.new("1", (width, height))
    ImageDraw.Draw(drawn).text((MARGIN - left, MARGIN - top), text, fill=1, font=font)
    return np.asarray(drawn)


def burn_in(ppb: NDArray[np.float32], letters: NDArray[np.bool_]) -> None:
    """Draw letters on (slice, row, column) images, white on black in the window that they name."""
    rows, columns = letters.shape
    half = WINDOW_WIDTH_PPB / 2
    ppb[:, :rows, :columns] = WINDOW_CENTRE_PPB + np.where(letters, half, -half)
