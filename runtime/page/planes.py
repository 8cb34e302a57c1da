"""Three planes of a grid as pictures show them: R on the left, A and S up, and how to say so.

They are planes of voxels, not resampled. Where an axis lies oblique, its letter has a second one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import center_of_mass

from qsm_deploy.kernels.bounding_box import Box, Corner, bounding_box
from qsm_deploy.kernels.ends import ENDS
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.scan.axes import STORED, Affine, Axes, anatomical_axes, axes_named
from qsm_deploy.runtime.scan.params import Vector
from qsm_deploy.runtime.scan.scan import Scan

MARGIN_VOXELS = 2
LEAST_SINE = math.sin(math.radians(15))  # of an angle that a second letter tells
ROUND = 3  # digits, so that the last bits of an affine do not show
RADIOLOGICAL = axes_named("LAS")  # to the right, up and up, seen from the feet and from the front


class Plane(NamedTuple):
    """One of the three cuts: its name and the axes across (right), up, and through it."""

    name: str
    across: int
    up: int
    through: int


PLANES = (Plane("axial", 0, 1, 2), Plane("coronal", 0, 2, 1), Plane("sagittal", 1, 2, 0))


@dataclass(frozen=True)
class Planes:
    """The planes of a grid through one voxel.

    Attributes
    ----------
    mask
        (x, y, z) bool, True inside, not empty; the planes show its whole box.
    affine
        (4, 4) from voxels to RAS [mm]; ``None`` where nobody says, and x points right then.
    at
        The voxel.
    stored
        How the grid's axes are made of the stored ones, by which they are named without an affine.
    """

    mask: Mask
    affine: Affine | None
    at: Corner
    stored: Axes = STORED

    @cached_property
    def axes(self) -> Axes:
        """How the picture's axes are made of the grid's."""
        if self.affine is None:
            return STORED
        return anatomical_axes(self.affine).then(RADIOLOGICAL)

    @cached_property
    def box(self) -> Box:
        """What is shown, in the grid's axes."""
        return bounding_box(self.mask, margin=MARGIN_VOXELS)

    def sides_mm(self, voxel_size_mm: Vector) -> Vector:
        """Return the size of what is shown, in the picture's axes."""
        x, y, z = (
            (side.stop - side.start) * size
            for side, size in zip(self.box, voxel_size_mm, strict=True)
        )
        return self.axes.sizes((x, y, z))

    def cut(self, volume: Volume, plane: Plane) -> NDArray[np.float32]:
        """Return a plane of a volume as (up, across), NaN outside the mask."""
        through = self.axes.order[plane.through]
        slab = tuple(
            slice(at, at + 1) if axis == through else side
            for axis, (side, at) in enumerate(zip(self.box, self.at, strict=True))
        )
        inside = np.where(self.mask[slab], volume[slab], np.float32(np.nan))
        shown: NDArray[np.float32] = self.axes.turn(inside).take(0, axis=plane.through).T
        return shown

    def ends(self, plane: Plane) -> list[str]:
        """Return the letters of its edges: left, right, bottom and top, such as P, A, Ia and Sp."""
        if self.affine is None:
            return ["?"] * 4
        turned = self.axes.affine(self.affine, self.mask.shape)
        return [
            _letters(sign * turned[:3, axis], axis)
            for axis in (plane.across, plane.up)
            for sign in (-1, 1)
        ]

    def place(self, plane: Plane) -> "Place":
        """Return how it is said where a plane lies."""
        frame = _frame(self.mask, self.affine, self.stored)
        if self.affine is not None:
            return Place(f"{plane.name}, ", frame[plane.through], ends=ENDS[plane.through])
        axis = self.stored.order[plane.through]
        across, up = ("xyz"[self.stored.order[n]] for n in (plane.across, plane.up))
        return Place(f"{plane.name}, {'xyz'[axis]} = ", frame[axis], f" ({across} →, {up} ↑)")

    def title(self, plane: Plane) -> str:
        """Return what a plane is called and where it lies, such as ``axial, S 12.3 mm``."""
        return self.place(plane).text(self.at)


class Place(NamedTuple):
    """How it is said where a plane lies: in words around a number, which a voxel gives.

    The number is the product of ``row`` and (x, y, z, 1): mm, by the letters of both ends, or an
    index where there are none. Halves are rounded up, as the same words in ``viewer.js`` are.
    """

    before: str
    row: NDArray[np.float64]
    after: str = " mm"
    ends: str = ""

    def text(self, at: Corner) -> str:
        """Return it of a voxel."""
        number = float(self.row @ (*at, 1))
        if not self.ends:
            return f"{self.before}{number:.0f}{self.after}"
        tenths = math.floor(math.floor(1000 * abs(number) + 0.5) / 100 + 0.5)
        return f"{self.before}{self.ends[number >= 0 or tenths == 0]} {tenths / 10:.1f}{self.after}"


def centre_of(mask: Mask) -> Corner:
    """Return the voxel nearest to the centre of a mask.

    Raises
    ------
    DataError
        If it is empty.
    """
    box = bounding_box(mask)
    middle = center_of_mass(mask[box])
    x, y, z = (side.start + round(float(c)) for side, c in zip(box, middle, strict=True))
    return x, y, z


def voxel_at(slices: Sequence[float], scan: Scan) -> Corner:
    """Return the voxel that planes cut by where they lie, in the terms of their titles.

    Parameters
    ----------
    slices
        R, A and S [mm]; where the axes are not known the stored voxel.
    scan
        The acquisition.

    Raises
    ------
    UsageError
        If it lies outside the mask's box.
    """
    box, frame = bounding_box(scan.mask), _frame(scan.mask, scan.affine, scan.axes)
    x, y, z = (round(n) for n in (np.linalg.inv(frame) @ (*slices, 1))[:3].tolist())
    if all(side.start <= n < side.stop for n, side in zip((x, y, z), box, strict=True)):
        return x, y, z
    corners = np.array(np.meshgrid(*[(side.start, side.stop - 1) for side in box])).reshape(3, -1)
    ends = (frame[:3, :3] @ corners + frame[:3, 3:]).T
    names, unit = (ENDS, "mm") if scan.affine is not None else ("xyz", "stored voxels")
    spans = ", ".join(
        f"{name[-1]} {low:.4g} to {high:.4g}"
        for name, low, high in zip(names, ends.min(axis=0), ends.max(axis=0), strict=True)
    )
    seen = " ".join(f"{n:g}" for n in slices)
    raise UsageError(f"--slices {seen} lies outside the mask, whose box is {spans} ({unit})")


def _frame(mask: Mask, affine: Affine | None, stored: Axes) -> Affine:
    """Return the (4, 4) matrix from voxels to what says where planes lie."""
    if affine is not None:
        return affine
    return stored.affine(np.eye(4), stored.inverse.sizes(mask.shape))


def _letters(direction: NDArray[np.float64], axis: int) -> str:
    """Return the end that a direction runs to, and a second one if it is 15 degrees off or more.

    Of two that lie as near, that of the axis comes first.
    """
    parts = np.round(direction / np.linalg.norm(direction), ROUND)
    first, second, _ = sorted(range(3), key=lambda n: (-abs(parts[n]), n != axis))
    shown = [first, second] if abs(parts[second]) >= LEAST_SINE else [first]
    return "".join(ENDS[n][int(parts[n] > 0)] for n in shown).capitalize()
