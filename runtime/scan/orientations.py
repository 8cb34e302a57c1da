"""Where B0 points in every one of several registered fields."""

import math
from collections.abc import Sequence

import numpy as np

from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry, vector_text
from qsm_deploy.runtime.scan.axes import STORED, Axes, axes_between
from qsm_deploy.runtime.scan.nifti import NiftiVolume
from qsm_deploy.runtime.scan.params import Vector

SMALLEST_ANGLE_DEG = 1.0
MOST_OF_A_HEAD = math.radians(60)


def stored_as_first(first: NiftiVolume, other: NiftiVolume) -> Axes:
    """Return how the axes of a registered field are turned into those that the first is stored in.

    Registered fields have the same axes but for the turn of the head, so that what is mirrored or
    turned farther than a head can be is another order of storage.
    """
    if first.directed_affine is None or other.directed_affine is None:
        return STORED
    turn = np.linalg.solve(*(v.affine[:3, :3] / v.geometry.voxel_size_mm for v in (first, other)))
    if np.linalg.det(turn) > 0 and (np.trace(turn) - 1) / 2 > math.cos(MOST_OF_A_HEAD):
        return STORED
    return axes_between(other.affine, first.affine)


def more_b0_directions(
    first: Geometry,
    volume: NiftiVolume,
    others: list[NiftiVolume],
    ways: list[Axes],
    stated: tuple[Vector, ...],
) -> tuple[Vector, ...]:
    """Return the B0 directions of the fields after the first.

    Registered fields share one grid of voxels; the head was turned between them, so that B0 lies
    differently in it. An affine that was kept from before the registration still says how.

    Parameters
    ----------
    first
        The first field's geometry.
    volume, others
        The first field, as read, and the others in its axes.
    ways
        How these are made of those that each of the others is stored in.
    stated
        Directions in stored axes that win over the headers': none, or one for each other field.

    Raises
    ------
    UsageError
        If there are fewer or more stated directions than fields.
    GeometryError
        If a voxel size differs, a header does not tell, or two directions are the same.
    """
    if len(stated) not in (0, len(others)):
        raise UsageError(
            f"{len(others) + 1} fields but {len(stated) + 1} --b0-direction; pass one for each "
            "field, in their order, or none"
        )
    directions = [first.b0_direction]
    for n, other in enumerate(others):
        if not np.allclose(other.geometry.voxel_size_mm, volume.geometry.voxel_size_mm, rtol=2e-3):
            raise GeometryError(
                f"{other.path} has voxels of {vector_text(other.geometry.voxel_size_mm)} mm, "
                f"{volume.path} of {vector_text(volume.geometry.voxel_size_mm)} mm; register one "
                "to the other"
            )
        if other.transforms.doubt and not stated:
            raise GeometryError(f"{other.path}: {other.transforms.doubt}, once for each field")
        b0 = ways[n].vector(stated[n]) if stated else other.geometry.b0_direction
        found = Geometry(first.shape, b0_direction=b0)
        directions.append(found.b0_direction)
        require_different(directions, str(other.path))
    return tuple(directions[1:])


def require_different(directions: Sequence[Vector], last: str = "the last field") -> None:
    """Refuse a last B0 direction that is that of an earlier field.

    Raises
    ------
    GeometryError
        If it is.
    """
    *earlier, found = directions
    for other in earlier:
        if Geometry((1, 1, 1), b0_direction=found).b0_angle_deg(other) < SMALLEST_ANGLE_DEG:
            raise GeometryError(
                f"{last}: B0 direction {vector_text(found)}, the same as that of another field; "
                "pass --b0-direction X Y Z for each field, in order"
            )
