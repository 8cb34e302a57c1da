"""Canonical axes: the order in which everything computes, whatever the order of storage.

The third axis is the one nearest to B0, towards the head; of the others the first goes to the right
and the second to the front, as nearly as whole axes can. A volume comes there by flips and
permutations, which are exact, so that one head gives one map, bit for bit, in all 48 storages.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsm_deploy.kernels.bounding_box import Box
from qsm_deploy.kernels.ends import ENDS, ends_named
from qsm_deploy.kernels.geometry import Geometry, Shape

RIGHT, FRONT = np.eye(3)[:2]  # of the scanner's axes, RAS
TIE = 1e-3  # between components of unit vectors
N = TypeVar("N", int, float)
Array = TypeVar("Array", bound=NDArray[Any])
Affine = NDArray[np.float64]
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Axes:
    """A signed permutation: how axes are made of those that a volume is stored in.

    Attributes
    ----------
    order
        Which stored axis becomes x, y and z.
    flipped
        Whether it runs the other way then.
    """

    order: Shape = (0, 1, 2)
    flipped: tuple[bool, bool, bool] = (False, False, False)

    def turn(self, volume: Array) -> Array:
        """Return a volume, or several as (n, x, y, z), in these axes; itself if nothing changes."""
        lead = volume.ndim - 3
        turned = volume.transpose(*range(lead), *(lead + axis for axis in self.order))
        return np.ascontiguousarray(turned[(..., *self._steps)])  # type: ignore[return-value]

    def turn_back(self, volume: Array) -> Array:
        """Return an (x, y, z) volume of these axes as it is stored."""
        return self.inverse.turn(volume)

    def vector(self, stored: ArrayLike) -> Vector:
        """Return a vector in these axes."""
        x, y, z = np.asarray(stored, dtype=np.float64)[list(self.order)] * self._signs + 0.0
        return float(x), float(y), float(z)

    def sizes(self, stored: tuple[N, N, N]) -> tuple[N, N, N]:
        """Return lengths along the stored axes, of a voxel or a volume, along these."""
        x, y, z = self.order
        return stored[x], stored[y], stored[z]

    def geometry(self, stored: Geometry) -> Geometry:
        """Return a grid in these axes."""
        direction = self.vector(stored.b0_direction)
        return Geometry(self.sizes(stored.shape), self.sizes(stored.voxel_size_mm), direction)

    def affine(self, stored: Affine, shape: Shape) -> Affine:
        """Return the (4, 4) matrix from voxels in these axes to the scanner.

        Parameters
        ----------
        stored
            (4, 4) from stored voxels.
        shape
            Of the stored volume.
        """
        first = self.inverse.voxel((0, 0, 0), self.sizes(shape))
        affine = stored.copy()
        affine[:3, :3] = stored[:3, list(self.order)] * self._signs + 0.0
        affine[:3, 3] = stored[:3, :3] @ first + stored[:3, 3]
        return affine

    def voxel(self, stored: Shape, shape: Shape) -> Shape:
        """Return where a voxel of a stored volume of that shape is in these axes."""
        x, y, z = (
            shape[axis] - 1 - stored[axis] if flip else stored[axis]
            for axis, flip in zip(self.order, self.flipped, strict=True)
        )
        return x, y, z

    def then(self, after: "Axes") -> "Axes":
        """Return what turning once more makes of these."""
        x, y, z = (
            (self.order[axis], self.flipped[axis] != flip)
            for axis, flip in zip(after.order, after.flipped, strict=True)
        )
        return Axes((x[0], y[0], z[0]), (x[1], y[1], z[1]))

    @property
    def inverse(self) -> "Axes":
        """How the stored axes are made of these."""
        x, y, z = map(self.order.index, range(3))
        return Axes((x, y, z), (self.flipped[x], self.flipped[y], self.flipped[z]))

    @property
    def letters(self) -> str:
        """The ends that they run to, such as LPS, if they are made of RAS."""
        named = zip(self.order, self.flipped, strict=True)
        return "".join(ENDS[axis][not flip] for axis, flip in named)

    @property
    def _steps(self) -> tuple[slice, slice, slice]:
        x, y, z = (slice(None, None, -1 if flip else None) for flip in self.flipped)
        return x, y, z

    @property
    def _signs(self) -> NDArray[np.float64]:
        return np.where(self.flipped, -1.0, 1.0)


STORED = Axes()


def from_corner(affine: Affine, box: Box) -> Affine:
    """Return the (4, 4) matrix from voxels of a box to the scanner."""
    cut = affine.copy()
    cut[:3, 3] += affine[:3, :3] @ [side.start or 0 for side in box]
    return cut


def axes_of(affine: Affine | None, stored: Geometry) -> Axes:
    """Return the canonical axes of a grid, from its affine if that is known."""
    directions = np.eye(3) if affine is None else affine[:3, :3]
    return canonical_axes(directions, stored.b0_direction)


def anatomical_axes(affine: Affine) -> Axes:
    """Return the axes that run to right, front and head, as nearly as those of a grid can.

    Their inverse, the grid's own made of RAS, has the letters that the grid is named by.
    """
    directions = _unit(affine[:3, :3])
    return canonical_axes(directions, directions[2])


def axes_between(stored: Affine, wanted: Affine) -> Axes:
    """Return the axes of one grid made of another's, as nearly as whole axes can; else as stored.

    Parameters
    ----------
    stored, wanted
        (4, 4) from voxels of each to the scanner.
    """
    cosines = _unit(stored[:3, :3]).T @ _unit(wanted[:3, :3])
    x, y, z = np.abs(cosines).argmax(axis=0).tolist()
    if {x, y, z} != {0, 1, 2}:
        return STORED
    along = cosines[[x, y, z], [0, 1, 2]]
    return Axes((x, y, z), (bool(along[0] < 0), bool(along[1] < 0), bool(along[2] < 0)))


def canonical_axes(directions: ArrayLike, b0_direction: ArrayLike) -> Axes:
    """Return the axes in which a volume is reconstructed; one of 48 candidates, without a guess.

    The axis that is nearest to B0 becomes the third, towards the head. The others become the first
    and the second by the pairing that lies nearer to right and front. Where two do equally well,
    the axis that goes farther to the head, else to the front or to the right, comes first.

    Parameters
    ----------
    directions
        (3, 3), of any lengths: the columns are the directions of the stored axes in the scanner,
        RAS. Where they are not known, the identity.
    b0_direction
        In stored axes, of any sign and length.
    """
    unit = _unit(np.asarray(directions, dtype=np.float64))
    b0 = np.asarray(b0_direction, dtype=np.float64)
    along_b0 = np.abs(b0) / np.linalg.norm(b0)
    third = max(np.flatnonzero(along_b0 >= along_b0.max() - TIE), key=lambda a: _rank(unit[:, a]))
    one, other = sorted({0, 1, 2} - {third}, key=lambda a: _rank(unit[:, a]), reverse=True)
    straight, crossed = (
        abs(RIGHT @ unit[:, first]) + abs(FRONT @ unit[:, second])
        for first, second in ((one, other), (other, one))
    )
    first, second = (one, other) if straight >= crossed - TIE else (other, one)
    return Axes(
        (int(first), int(second), int(third)),
        (
            _is_against(unit[:, first], (0, 1, 2)),
            _is_against(unit[:, second], (1, 2, 0)),
            _is_against(unit[:, third], (2, 1, 0)),
        ),
    )


def axes_named(letters: str) -> Axes:
    """Return axes by the ends that they run to, such as LPS, made of RAS.

    Raises
    ------
    GeometryError
        If they are no three ends of three different axes.
    """
    x, y, z = ends_named(letters)
    return Axes((x[0], y[0], z[0]), (x[1], y[1], z[1]))


def directions_named(letters: str) -> NDArray[np.float64]:
    """Return the (3, 3) directions, as columns, of axes that are given by their ends.

    Raises
    ------
    GeometryError
        If they are no three ends of three different axes.
    """
    directions = np.zeros((3, 3))
    for column, (place, against) in enumerate(ends_named(letters)):
        directions[place, column] = -1 if against else 1
    return directions


def _unit(directions: NDArray[np.float64]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = directions / np.linalg.norm(directions, axis=0)
    return unit


def _rank(direction: NDArray[np.float64]) -> tuple[float, ...]:
    """Return what orders axes that do equally well: head, front and right, whatever the sign."""
    x, y, z = np.rint(direction / TIE)
    most = next((v for v in (z, y, x) if v), 1.0)
    return tuple(float(v * np.sign(most)) for v in (z, y, x))


def _is_against(direction: NDArray[np.float64], order: Shape) -> bool:
    """Tell whether the first of the components that is not zero is negative."""
    rounded = np.rint(direction / TIE)[list(order)]
    return bool(next((v for v in rounded if v), 1.0) < 0)
