"""The head's own coordinates on a grid, and the shapes and noise everything in it is made of.

Head coordinates are millimetres in an adult head whose centre is the centre of the grid. A grid
that is too small for an adult shrinks the head, so the anatomy is complete on any grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation

from qsm_deploy.kernels.geometry import Geometry, Volume

Axes = Sequence[NDArray[np.float32]]
Slices = tuple[slice, slice, slice]

ADULT_FOV_MM = np.array([160.0, 192.0, 160.0])
CUBIC = 3


@dataclass(frozen=True)
class HeadFrame:
    """Head coordinates of the voxels of a grid.

    Parameters
    ----------
    geometry
        The grid.
    size
        Extents of this head along (x, y, z), relative to the reference adult's.
    """

    geometry: Geometry
    size: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @cached_property
    def voxel_mm(self) -> NDArray[np.float64]:
        """Edge lengths of a voxel in head coordinates."""
        voxel = np.asarray(self.geometry.voxel_size_mm)
        shrink = min(1.0, float(np.min(voxel * self.geometry.shape / ADULT_FOV_MM)))
        return voxel / (shrink * np.asarray(self.size))

    @cached_property
    def axes(self) -> tuple[NDArray[np.float32], ...]:
        """Head coordinates of the voxel centres along each axis [mm]."""
        return tuple(
            ((np.arange(n) - (n - 1) / 2) * step).astype(np.float32)
            for n, step in zip(self.geometry.shape, self.voxel_mm, strict=True)
        )

    def box(self, centre_mm: ArrayLike, reach_mm: float) -> Slices:
        """Return the part of the grid within ``reach_mm`` of a point along every axis."""
        x, y, z = (
            slice(*np.searchsorted(axis, (c - reach_mm, c + reach_mm)).tolist())
            for axis, c in zip(self.axes, np.asarray(centre_mm), strict=True)
        )
        return x, y, z


def ellipsoid_radius(
    axes: Axes, centre_mm: ArrayLike, semi_axes_mm: ArrayLike, rotation: Rotation | None = None
) -> Volume:
    """Return the normalised radius of an ellipsoid on a grid: 0 at its centre, 1 on its surface.

    Parameters
    ----------
    axes
        Coordinates of the grid along (x, y, z) [mm].
    centre_mm, semi_axes_mm
        Three numbers each.
    rotation
        Turns the ellipsoid about its centre.
    """
    matrix = np.eye(3) if rotation is None else rotation.as_matrix()
    to_sphere = (matrix / np.asarray(semi_axes_mm, dtype=float)).T.astype(np.float32)
    offsets = np.ix_(
        *(axis - np.float32(c) for axis, c in zip(axes, np.asarray(centre_mm), strict=True))
    )
    squared = sum((sum(w * o for w, o in zip(row, offsets, strict=True))) ** 2 for row in to_sphere)
    radius: Volume = np.sqrt(squared)
    return radius


def smooth_noise(
    axes: Axes, spacing_mm: float, half_extent_mm: ArrayLike, rng: np.random.Generator
) -> Volume:
    """Return Gaussian noise of unit variance, band-limited by a cubic B-spline lattice.

    The random lattice depends on ``spacing_mm`` and ``half_extent_mm`` only, so the same
    generator gives the same function of space on any grid.

    Parameters
    ----------
    axes
        Coordinates of the grid along (x, y, z) [mm]; clipped to the lattice.
    spacing_mm
        Distance of the lattice points; little is left above the frequency 1 / (2 spacing).
    half_extent_mm
        The lattice covers minus this to plus this, along (x, y, z).
    """
    bx, by, bz = (
        _spline_basis(axis, spacing_mm, float(half))
        for axis, half in zip(axes, np.broadcast_to(half_extent_mm, 3), strict=True)
    )
    lattice = rng.standard_normal((bx.shape[1], by.shape[1], bz.shape[1]), dtype=np.float32)
    noise = by @ np.tensordot(bx, lattice, axes=1) @ bz.T
    return noise.astype(np.float32, copy=False)


def ball_coverage(frame: HeadFrame, centres_mm: NDArray[np.float32], radii_mm: Volume) -> Volume:
    """Return how much of every voxel a union of balls covers, in [0, 1].

    Parameters
    ----------
    frame
        Where to draw.
    centres_mm, radii_mm
        (n, 3) and (n,), head coordinates. A voxel whose centre lies inside a ball is covered by
        at least one half.
    """
    shape = np.array(frame.geometry.shape)
    voxel = frame.voxel_mm.astype(np.float32)
    edge = float(np.cbrt(voxel.prod()))
    index = centres_mm / voxel + (shape - 1).astype(np.float32) / 2
    nearest = np.rint(index).astype(np.int32)
    coverage = np.zeros(shape, dtype=np.float32)
    reach = np.ceil((float(radii_mm.max()) + edge / 2) / voxel).astype(int)
    for step in np.ndindex(*(2 * reach + 1)):
        at = nearest + (np.array(step) - reach).astype(np.int32)
        distance = np.linalg.norm((at - index) * voxel, axis=1)
        cover = np.clip(0.5 + (radii_mm - distance) / edge, 0, 1)
        seen = (cover > 0) & np.all((at >= 0) & (at < shape), axis=1)
        np.maximum.at(coverage, tuple(at[seen].T), cover[seen])
    return coverage


def _spline_basis(
    positions_mm: NDArray[np.float32], spacing_mm: float, half_extent_mm: float
) -> NDArray[np.float32]:
    """Return the (positions, lattice) cubic B-spline matrix with rows of unit norm."""
    cells = int(np.ceil(half_extent_mm / spacing_mm))
    knots = spacing_mm * np.arange(-cells - CUBIC, cells + CUBIC + 1, dtype=float)
    inside = np.clip(positions_mm.astype(float), -half_extent_mm, half_extent_mm)
    basis = BSpline.design_matrix(inside, knots, CUBIC).toarray()
    unit: NDArray[np.float32] = (basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype("f4")
    return unit
