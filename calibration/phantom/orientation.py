"""How a head lies in the scanner: its B0 direction as an affine, and heads tilted for COSMOS."""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.geometry import Geometry

# where the tilts after the first orientation point, in the scanner's (x, y)
TILTS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def affine_from_geometry(geometry: Geometry) -> NDArray[np.float64]:
    """Return an affine that puts the grid's centre at the scanner's origin.

    Of the rotations that turn B0 into the scanner's z it takes the smallest, so that
    :meth:`Geometry.from_affine` reads the same geometry back.

    Parameters
    ----------
    geometry
        The grid.

    Returns
    -------
    (4, 4) float64 array
        Voxel-to-scanner (RAS mm) matrix.
    """
    affine = np.eye(4)
    affine[:3, :3] = _rotation(geometry) * geometry.voxel_size_mm
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(geometry.shape) - 1) / 2)
    return affine


def tilted(geometry: Geometry, count: int, tilt_deg: float) -> list[Geometry]:
    """Return a grid as registered scans of one head share it, with the B0 direction of each.

    Parameters
    ----------
    geometry
        Of the first scan.
    count
        How many, 1 to 5: as it is, and tilted to the front, to a side, back, to the other side.
    tilt_deg
        By which angle from the first.
    """
    tilt = np.radians(tilt_deg)
    leaning = np.array([(x * np.sin(tilt), y * np.sin(tilt), np.cos(tilt)) for x, y in TILTS])
    directions = (leaning @ _rotation(geometry))[: count - 1].tolist()
    shape, voxel_size_mm = geometry.shape, geometry.voxel_size_mm
    return [geometry, *(Geometry(shape, voxel_size_mm, b0) for b0 in directions)]


def _rotation(geometry: Geometry) -> NDArray[np.float64]:
    """Return the (3, 3) rotation from voxel axes to the scanner's; B0 is its third row."""
    down = geometry.b0_direction[2] < 0
    x, y, z = -np.array(geometry.b0_direction) if down else geometry.b0_direction
    # Rodrigues' rotation of the upward (x, y, z) to the z axis: 1 + z is never small
    rotation = np.array(
        [
            [1 - x * x / (1 + z), -x * y / (1 + z), -x],
            [-x * y / (1 + z), 1 - y * y / (1 + z), -y],
            [x, y, z],
        ]
    )
    if down:  # half a turn about the scanner's x
        rotation[1:] *= -1
    return rotation
