"""What one map is made of: the images of every echo, along the slices, and where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.dicom.headers import Frame
from qsm_deploy.runtime.scan.axes import Affine
from qsm_deploy.runtime.scan.unit_names import SAME_STRENGTH, field_strength

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
WHOLE = 0.01  # voxels that an index may be off a whole number


@dataclass(frozen=True)
class Echo:
    """The images of one echo, each of a slice, along :func:`normal`.

    Attributes
    ----------
    time_s
        Of the echo.
    first
        Phase, or real parts.
    second
        Magnitude or nothing, or imaginary parts.
    """

    time_s: float
    first: tuple[Frame, ...]
    second: tuple[Frame, ...]


@dataclass(frozen=True)
class Acquisition:
    """A gradient echo as a scanner sent it.

    Attributes
    ----------
    echoes
        In the order of their times.
    are_parts
        Whether the images are real and imaginary parts.
    """

    echoes: tuple[Echo, ...]
    are_parts: bool

    def __str__(self) -> str:
        first, second = self.echoes[0].first, self.echoes[0].second
        names = ("real parts", "imaginary parts") if self.are_parts else ("phase", "magnitude")
        held = [
            f"{name} of series {images[0].series_number}"
            for name, images in zip(names, (first, second), strict=True)
            if images
        ]
        times = ", ".join(f"{1e3 * echo.time_s:g}" for echo in self.echoes)
        return f"{' and '.join(held)}: {len(first)} slices, echoes at {times} ms"

    @property
    def slices(self) -> tuple[Frame, ...]:
        """The images of the first echo, after which those of a map are made."""
        return self.echoes[0].first

    @property
    def field_strength_t(self) -> float | None:
        """Of B0, as the frequency tells it where it is known.

        Raises
        ------
        DataError
            If strength and frequency are of different scanners, or images of different strengths.
        """
        strengths = {(f.field_strength_t, f.frequency_mhz) for f in self.frames}
        found = {field_strength(nominal, frequency) for nominal, frequency in strengths} - {None}
        known = [strength for strength in found if strength is not None]
        if known and max(known) > SAME_STRENGTH * min(known):
            raise DataError(
                f"the images say field strengths of {min(known):g} and {max(known):g} T; export "
                "one acquisition alone"
            )
        return min(known, default=None)

    @property
    def frames(self) -> tuple[Frame, ...]:
        """All images."""
        return tuple(f for echo in self.echoes for f in (*echo.first, *echo.second))


def normal(frame: Frame) -> NDArray[np.float64]:
    """Return the (3,) unit vector along which the slices of a series follow each other, LPS."""
    return np.cross(*frame.orientation)


def affine_of(slices: Sequence[Frame]) -> Affine:
    """Return the (4, 4) matrix from (column, row, slice) to RAS [mm] of at least two slices."""
    first, last = slices[0], slices[-1]
    between_rows, between_columns = first.spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * between_columns
    affine[:3, 1] = first.orientation[1] * between_rows
    affine[:3, 2] = (last.position_mm - first.position_mm) / (len(slices) - 1)
    affine[:3, 3] = first.position_mm
    return RAS_FROM_LPS @ affine


def as_images(
    volume: NDArray[np.float32], affine: Affine, slices: Sequence[Frame]
) -> NDArray[np.float32]:
    """Return a volume as (slice, row, column), the order of its DICOM images.

    Parameters
    ----------
    volume
        (x, y, z) on the grid of the images, in any storage order.
    affine
        (4, 4) from its voxels to RAS [mm].
    slices
        The images.

    Raises
    ------
    DataError
        If it lies on another grid.
    """
    index = np.linalg.inv(affine) @ affine_of(slices)  # of a pixel in the volume
    rows, columns = slices[0].shape
    counts = np.array([columns, rows, len(slices)])
    order = np.abs(index[:3, :3]).argmax(axis=0)  # the volume's axis that each of theirs is
    signs = np.sign(index[order, range(3)])
    expected = np.eye(4)
    expected[:3, :3] = 0
    expected[order, range(3)] = signs
    expected[order, 3] = np.where(signs < 0, counts - 1, 0)
    off = np.abs(index - expected)[:3] @ (*counts, 1)
    if (
        sorted(order) != [0, 1, 2]
        or off.max() > WHOLE
        or (np.array(volume.shape)[order] != counts).any()
    ):
        raise DataError(
            f"a volume of {'x'.join(map(str, volume.shape))} lies on another grid than its "
            f"{len(slices)} images of {rows} rows and {columns} columns"
        )
    turned = volume.transpose(*order)[tuple(slice(None, None, int(sign)) for sign in signs)]
    return np.ascontiguousarray(turned.transpose(2, 1, 0))
