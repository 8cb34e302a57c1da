"""The grid that an inversion works on: the box of the mask, with room around it."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from qsm_deploy.kernels.bounding_box import Box, bounding_box
from qsm_deploy.kernels.dipole import slabs
from qsm_deploy.kernels.geometry import Geometry, Mask, Shape, Volume
from qsm_deploy.kernels.threads import workers

SUPPORT_MM = 5.0  # sources farther outside the mask than this are none
BEYOND_VOXELS = 4  # a side, between the support and its periodic neighbour
SLACK = 1e-6  # of a length: headers state voxel sizes in single precision

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class PaddedBox:
    """The box of a mask, padded to lengths that transform fast.

    Attributes
    ----------
    box
        Of the mask, in the volume.
    inner
        The same in the padded grid.
    geometry
        The padded grid.
    shape
        Of the volume.
    """

    box: Box
    inner: Box
    geometry: Geometry
    shape: Shape

    def embed(self, volume: Volume) -> Volume:
        """Return a float32 volume's box on the padded grid, zeros around it."""
        padded = np.zeros(self.geometry.shape, dtype=np.float32)
        padded[self.inner] = volume[self.box]
        return padded

    def embed_mask(self, mask: Mask) -> Mask:
        """Return a mask's box on the padded grid, False around it."""
        padded = np.zeros(self.geometry.shape, dtype=np.bool_)
        padded[self.inner] = mask[self.box]
        return padded

    def restore(self, padded: NDArray[T]) -> NDArray[T]:
        """Return what lies in the box on the volume's grid, zeros around it."""
        volume = np.zeros(self.shape, dtype=padded.dtype)
        volume[self.box] = padded[self.inner]
        return volume


def padded_box(mask: Mask, geometry: Geometry, *, around_mm: float = SUPPORT_MM) -> PaddedBox:
    """Return the grid for an inversion whose sources lie up to ``around_mm`` outside the mask.

    Raises
    ------
    DataError
        If the mask is empty.
    """
    box = bounding_box(mask)
    pads = [math.ceil(around_mm / h - SLACK) + BEYOND_VOXELS for h in geometry.voxel_size_mm]
    sizes = [side.stop - side.start for side in box]
    x, y, z = (
        scipy.fft.next_fast_len(size + 2 * pad, real=True)
        for size, pad in zip(sizes, pads, strict=True)
    )
    i, j, k = (slice(pad, pad + size) for size, pad in zip(sizes, pads, strict=True))
    padded = Geometry((x, y, z), geometry.voxel_size_mm, geometry.b0_direction)
    return PaddedBox(box, (i, j, k), padded, geometry.shape)


def grown(mask: Mask, geometry: Geometry, radius_mm: float) -> Mask:
    """Return the voxels whose centre lies within a radius of the mask's, on a periodic grid."""
    inside: Mask = filtered(mask.astype(np.float32), ball_spectrum(geometry, radius_mm)) > 0.5
    return inside


def filtered(volume: Volume, multiplier: Volume) -> Volume:
    """Return a volume whose half-spectrum is multiplied by a real one, on a periodic grid."""
    spectrum = scipy.fft.rfftn(volume, workers=workers())
    spectrum *= multiplier
    image: Volume = scipy.fft.irfftn(spectrum, s=volume.shape, workers=workers())
    return image


def ball_spectrum(geometry: Geometry, radius_mm: float) -> Volume:
    """Return the half-spectrum of a ball around the origin; at DC, the number of its voxels.

    They are those whose centre lies within the radius, on a periodic grid: it is real.
    """
    axes = [
        np.minimum(np.arange(n), n - np.arange(n)) * h
        for n, h in zip(geometry.shape, geometry.voxel_size_mm, strict=True)
    ]
    x, y, z = np.ix_(*axes)
    ball = (np.sqrt(x * x + y * y + z * z) <= radius_mm * (1 + SLACK)).astype(np.float32)
    spectrum: Volume = scipy.fft.rfftn(ball, workers=workers()).real
    return spectrum


def each_slab(work: Callable[[slice], object], shape: tuple[int, ...]) -> None:
    """Do something to every few planes of a volume that fit the cache, on all threads."""
    with ThreadPoolExecutor(workers()) as pool:
        for _ in pool.map(work, slabs(shape)):
            pass
