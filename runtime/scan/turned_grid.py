"""Grids turned along B0, and the way there and back, by B-splines that are zero beyond the volume.

A grid holds everything that interpolation leaves of a masked volume, and little more: what a
network computes is the larger part of a run.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import affine_transform, spline_filter

from qsm_deploy.kernels.bounding_box import Box, bounding_box
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.inversion.grid import each_slab
from qsm_deploy.runtime.scan.scan import Scan

SLAB_VOXELS = 1 << 18  # a mask is turned, or its reach is found, in pieces of about this size
ROUNDING = 1e-3  # a grid this close to a whole number of voxels has that number
LEAST_SHARE = 1e-3  # of the mask in what a voxel interpolates
DECAY_VOXELS = 12  # beyond a volume, where its spline is 1e-7 of what it was
MARGIN_VOXELS = 3  # around the mask, into which cubic interpolation reaches
LINEAR: Final = 1
CUBIC: Final = 3
Three = tuple[float, float, float]


@dataclass(frozen=True)
class TurnedGrid:
    """A grid that is turned against the original one, around the box of a mask.

    Attributes
    ----------
    geometry
        The turned grid.
    mask
        (x, y, z) bool on the turned grid, True where it has to do with the mask.
    box
        The part of the original grid that it covers.
    matrix, offset
        (3, 3) and (3,): a voxel j of it lies at ``matrix @ j + offset`` in voxels of the box.
    order
        Of the splines, both ways.
    """

    geometry: Geometry
    mask: Mask
    box: Box
    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]
    order: Literal[1, 3]

    def turn(self, volume: Volume) -> Volume:
        """Return a volume of the original grid, zero outside the mask, on the turned one."""
        return self._interpolate(volume[self.box], self.matrix, self.offset, self.geometry.shape)

    def turn_back(self, turned: Volume, shape: tuple[int, ...]) -> Volume:
        """Return a volume of the turned grid on the original one of that shape, 0 off the box."""
        matrix = np.linalg.inv(self.matrix)
        size = tuple(side.stop - side.start for side in self.box)
        volume = np.zeros(shape, dtype=np.float32)
        volume[self.box] = self._interpolate(turned, matrix, -matrix @ self.offset, size)
        return volume

    def scan_with(self, scan: Scan, measured: NDArray[np.float32]) -> Scan:
        """Return an acquisition of what was measured, on this grid."""
        return scan.on_grid(self.geometry, self.mask, measured, self.turn)

    def _interpolate(
        self,
        volume: Volume,
        matrix: NDArray[np.floating],
        offset: NDArray[np.floating],
        shape: tuple[int, ...],
    ) -> Volume:
        if self.order == CUBIC:
            return _cubic(volume, matrix, offset, shape)
        result: Volume = affine_transform(
            volume,
            matrix,
            offset,
            output_shape=shape,
            output=np.float32,
            order=LINEAR,
            mode="grid-constant",
        )
        return result


def grid_centred_on(geometry: Geometry, mask: Mask, voxel_size_mm: float) -> TurnedGrid:
    """Return the isotropic grid along B0 that is centred on the box of a mask, for AFTER-QSM.

    Its mask is where turning back to the mask looks. Both ways are trilinear.

    Parameters
    ----------
    geometry
        The original grid.
    mask
        (x, y, z) bool, True inside, not empty.
    voxel_size_mm
        Edge length of the turned grid's voxels.

    Raises
    ------
    DataError
        If the mask is empty.
    """
    box = bounding_box(mask)
    size = np.array([side.stop - side.start for side in box])
    voxel = np.asarray(geometry.voxel_size_mm)
    rotation = rotation_onto(geometry.b0_direction)
    # interpolated values vanish one voxel beyond the first and the last
    reach = np.abs(rotation) @ ((size + 1) * voxel) / voxel_size_mm
    x, y, z = (int(n) + 1 for n in np.ceil(reach - ROUNDING))
    matrix = rotation.T * voxel_size_mm / voxel[:, None]
    offset = (size - 1) / 2 - matrix @ ((np.array([x, y, z]) - 1) / 2)
    turned = Geometry((x, y, z), (voxel_size_mm,) * 3, (0.0, 0.0, 1.0))
    reached = _reach(mask[box], matrix, offset, turned.shape)
    return TurnedGrid(turned, reached, box, matrix, offset, LINEAR)


def grid_along(
    geometry: Geometry, mask: Mask, b0_direction: Three, voxel_size_mm: Three
) -> TurnedGrid:
    """Return the grid in which B0 has a direction that it has not on the original one.

    It is turned by the smallest angle that does so. One of its voxels lies exactly on one of the
    original ones, the nearest to the centre of the mask's box: along an axis that the angle leaves
    alone, nothing is interpolated then. Its mask is what has a share of the mask; both ways are
    cubic.

    Parameters
    ----------
    geometry
        The original grid.
    mask
        (x, y, z) bool, True inside, not empty.
    b0_direction
        In the axes of the turned grid.
    voxel_size_mm
        Of the turned grid.

    Raises
    ------
    DataError
        If the mask is empty.
    """
    box = bounding_box(mask, margin=MARGIN_VOXELS)
    centre = [(side.start + side.stop - 1) // 2 for side in bounding_box(mask)]
    on_both = np.array(centre) - [side.start for side in box]
    rotation = rotation_onto(geometry.b0_direction, b0_direction)
    matrix = rotation.T * np.asarray(voxel_size_mm) / np.asarray(geometry.voxel_size_mm)[:, None]
    inside = mask[box]
    farthest = np.maximum(on_both, np.array(inside.shape) - on_both) + 1
    before = np.ceil(np.abs(np.linalg.inv(matrix)) @ farthest).astype(int)
    offset = on_both - matrix @ before
    wide = _share(inside, matrix, offset, 2 * before + 1)
    around = bounding_box(wide)
    first = np.array([side.start for side in around]) - MARGIN_VOXELS
    reached = np.pad(wide[around], MARGIN_VOXELS)
    x, y, z = reached.shape
    turned = Geometry((x, y, z), voxel_size_mm, b0_direction)
    return TurnedGrid(turned, reached, box, matrix, offset + matrix @ first, CUBIC)


def rotation_onto(direction: ArrayLike, target: ArrayLike = (0.0, 0.0, 1.0)) -> NDArray[np.float64]:
    """Return the (3, 3) rotation by the smallest angle that turns a line onto another.

    Parameters
    ----------
    direction, target
        Along the lines, the first of unit length; the length of the other and both signs have no
        meaning, so the angle is at most 90 degrees.
    """
    start, end = np.asarray(direction, dtype=np.float64), np.asarray(target, dtype=np.float64)
    end = end / np.linalg.norm(end)
    if start @ end < 0:
        start = -start
    cross = np.outer(end, start) - np.outer(start, end)
    rotation: NDArray[np.float64] = np.eye(3) + cross + cross @ cross / (1 + start @ end)
    return rotation


def _cubic(
    volume: Volume,
    matrix: NDArray[np.floating],
    offset: NDArray[np.floating],
    shape: tuple[int, ...],
) -> Volume:
    """Return the cubic B-spline through a volume, at ``matrix @ j + offset`` of its voxels."""
    coefficients = spline_filter(np.pad(volume, DECAY_VOXELS), CUBIC, output=np.float32)
    result = np.empty(shape, dtype=np.float32)
    _over_slabs(coefficients, matrix, offset + DECAY_VOXELS, result, CUBIC)
    return result


def _share(
    mask: Mask, matrix: NDArray[np.float64], offset: NDArray[np.float64], shape: ArrayLike
) -> Mask:
    """Return the turned voxels that trilinear interpolation makes of a share of the mask."""
    share = np.empty(np.asarray(shape).tolist(), dtype=np.float32)
    _over_slabs(np.pad(mask, 1).astype(np.float32), matrix, offset + 1, share, LINEAR)
    has_share: Mask = share > LEAST_SHARE
    return has_share


def _over_slabs(
    coefficients: Volume,
    matrix: NDArray[np.floating],
    offset: NDArray[np.floating],
    out: Volume,
    order: Literal[1, 3],
) -> None:
    """Interpolate in slabs, on all threads; of one size, so that their number changes no bit."""

    def interpolate(slab: slice) -> None:
        affine_transform(
            coefficients,
            matrix,
            offset + matrix[:, 0] * slab.start,
            output=out[slab],
            output_shape=out[slab].shape,
            order=order,
            prefilter=False,
        )

    each_slab(interpolate, out.shape)


def _reach(
    mask: Mask, matrix: NDArray[np.float64], offset: NDArray[np.float64], shape: tuple[int, ...]
) -> Mask:
    """Return the turned voxels that trilinear interpolation at the mask's voxels looks at."""
    reached = np.zeros(shape, dtype=bool)
    inverse = np.linalg.inv(matrix)
    rows = max(1, SLAB_VOXELS // (mask.shape[1] * mask.shape[2]))
    for start in range(0, mask.shape[0], rows):
        inside = np.argwhere(mask[start : start + rows]) + np.array([start, 0, 0])
        low = np.floor((inside - offset) @ inverse.T).astype(np.int32)
        for corner in np.ndindex(2, 2, 2):
            x, y, z = np.minimum(low + np.array(corner, dtype=np.int32), np.array(shape) - 1).T
            reached[x, y, z] = True
    return reached
