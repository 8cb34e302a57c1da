"""The isotropic grid along B0 that AFTER-QSM reconstructs on, and the way there and back.

Both ways are trilinear, zero beyond the volume. The grid holds everything that interpolation
leaves of a masked volume, and no more: what a network computes is the larger part of a run.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import affine_transform

from qsm_deploy.kernels.bounding_box import Box, bounding_box
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume

SLAB_VOXELS = 1 << 18  # the reach of a mask is found in pieces of about this size
ROUNDING = 1e-3  # a grid this close to a whole number of voxels has that number


@dataclass(frozen=True)
class TurnedGrid:
    """A grid with B0 along its third axis, around the box of a mask.

    Attributes
    ----------
    geometry
        The turned grid.
    mask
        (x, y, z) bool on the turned grid, True where turning back to the mask looks.
    box
        The part of the original grid that it covers.
    matrix, offset
        (3, 3) and (3,): a voxel j of it lies at ``matrix @ j + offset`` in voxels of the box.
    """

    geometry: Geometry
    mask: Mask
    box: Box
    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]

    def turn(self, volume: Volume) -> Volume:
        """Return a volume of the original grid, zero outside the mask, on the turned one."""
        return _interpolate(volume[self.box], self.matrix, self.offset, self.geometry.shape)

    def turn_back(self, turned: Volume, shape: tuple[int, ...]) -> Volume:
        """Return a volume of the turned grid on the original one of that shape, 0 off the box."""
        matrix = np.linalg.inv(self.matrix)
        size = tuple(side.stop - side.start for side in self.box)
        volume = np.zeros(shape, dtype=np.float32)
        volume[self.box] = _interpolate(turned, matrix, -matrix @ self.offset, size)
        return volume


def turned_grid(geometry: Geometry, mask: Mask, voxel_size_mm: float) -> TurnedGrid:
    """Return the grid that is turned by the smallest angle, centred on the box of a mask.

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
    rotation = rotation_onto_z(geometry.b0_direction)
    # interpolated values vanish one voxel beyond the first and the last
    reach = np.abs(rotation) @ ((size + 1) * voxel) / voxel_size_mm
    x, y, z = (int(n) + 1 for n in np.ceil(reach - ROUNDING))
    matrix = rotation.T * voxel_size_mm / voxel[:, None]
    offset = (size - 1) / 2 - matrix @ ((np.array([x, y, z]) - 1) / 2)
    turned = Geometry((x, y, z), (voxel_size_mm,) * 3, (0.0, 0.0, 1.0))
    return TurnedGrid(turned, _reach(mask[box], matrix, offset, turned.shape), box, matrix, offset)


def rotation_onto_z(direction: ArrayLike) -> NDArray[np.float64]:
    """Return the (3, 3) rotation by the smallest angle that turns a line onto the third axis.

    Parameters
    ----------
    direction
        Unit vector along the line; its sign has no meaning, so the angle is at most 90 degrees.
    """
    bx, by, bz = np.asarray(direction, dtype=np.float64)
    if bz < 0:
        bx, by, bz = -bx, -by, -bz
    cross = np.array([[0, 0, -bx], [0, 0, -by], [bx, by, 0]])
    rotation: NDArray[np.float64] = np.eye(3) + cross + cross @ cross / (1 + bz)
    return rotation


def _interpolate(
    volume: Volume,
    matrix: NDArray[np.floating],
    offset: NDArray[np.floating],
    shape: tuple[int, ...],
) -> Volume:
    result: Volume = affine_transform(
        volume,
        matrix,
        offset,
        output_shape=shape,
        output=np.float32,
        order=1,
        mode="grid-constant",
        prefilter=False,
    )
    return result


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
