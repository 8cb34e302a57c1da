"""Images of one volume, in order, and where they lie in the scanner.

The protocol gives directions and positions in patient coordinates to the left, back and head;
NIfTI's go to the right, front and head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError, GeometryError
from qsm_deploy.kernels.geometry import Geometry, vector_text
from qsm_deploy.runtime.serve.codec import Image

Vector = NDArray[np.float64]

RAS_FROM_LPS = np.array([-1.0, -1.0, 1.0])
SPACING_TOLERANCE = 0.02  # of the spacing
OFFSET_TOLERANCE_MM = 0.05
VOXEL_DIGITS = 4  # of its size [mm]: what positions in single precision tell of their distances
GRID_TOLERANCE = 0.1  # of a voxel, for volumes that belong together
SMALLEST_ASPECT = 0.1  # below it the third extent is that of one partition


@dataclass(frozen=True)
class Stack:
    """One volume.

    Attributes
    ----------
    images
        Slices in the order of ``slice_dir``, or the one image of a slab.
    affine
        (4, 4) voxel-to-scanner (RAS mm) matrix.
    geometry
        Shape, voxel size and B0 direction.
    """

    images: tuple[Image, ...]
    affine: NDArray[np.float64]
    geometry: Geometry

    def volume(self) -> NDArray[np.float32]:
        """Return the (x, y, z) pixels as they came, without any scaling."""
        slices = np.concatenate([image.pixels[0] for image in self.images])
        return np.ascontiguousarray(slices.transpose(2, 1, 0), dtype=np.float32)

    @property
    def is_whole_numbered(self) -> bool:
        """Whether the pixels are integers."""
        return self.images[0].pixels.dtype.kind in "iu"


def stack_images(images: Sequence[Image]) -> Stack:
    """Put the images of one volume in order.

    Raises
    ------
    GeometryError
        If their sizes, orientations or distances differ, or two lie at the same place.
    DataError
        If there is only one slice.
    """
    first = images[0]
    x, y, z = (int(n) for n in first.head.matrix_size)
    axes = _axes(first)
    for image in images[1:]:
        if tuple(image.head.matrix_size) != (x, y, z) or image.pixels.dtype != first.pixels.dtype:
            raise GeometryError(
                f"images of {tuple(image.head.matrix_size)} and {(x, y, z)} voxels in the same "
                f"volume ({_where(image)}); send one acquisition at a time"
            )
        if np.abs(_axes(image) - axes).max() > 1e-3:
            raise GeometryError(f"slices of one volume are turned ({_where(image)})")
    if len(images) > 1 and z > 1:
        raise GeometryError(f"{len(images)} slabs of {z} partitions in {_where(first)}; send one")
    ordered, positions = _in_order(images, axes[2])
    slices = z if z > 1 else len(ordered)
    if slices < 2:
        raise DataError(f"one slice in {_where(first)}; a volume has two or more")
    voxel = _image_voxel_mm(first)
    if z == 1:
        voxel[2] = _spacing(positions, axes, _where(first))
    voxel = voxel.round(VOXEL_DIGITS)  # the same along every axis of the images
    corner = positions[0] - ((np.array([x, y, z]) - 1) / 2 * voxel) @ axes
    affine = np.eye(4)
    affine[:3, :3] = (axes * voxel[:, None] * RAS_FROM_LPS).T
    affine[:3, 3] = corner * RAS_FROM_LPS
    return Stack(tuple(ordered), affine, Geometry.from_affine((x, y, slices), affine))


def require_same_grid(stack: Stack, other: Stack) -> None:
    """Check that two volumes lie on each other.

    Raises
    ------
    GeometryError
        If not.
    """
    here, there = _where(stack.images[0]), _where(other.images[0])
    if stack.geometry.shape != other.geometry.shape:
        raise GeometryError(
            f"{here} has {stack.geometry.shape} voxels, {there} {other.geometry.shape}; send one "
            "acquisition at a time"
        )
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in stack.geometry.shape])).reshape(3, -1)
    apart = (stack.affine - other.affine) @ np.vstack([ends, np.ones(8)])
    if np.abs(apart).max() > GRID_TOLERANCE * min(stack.geometry.voxel_size_mm):
        raise GeometryError(f"{here} and {there} lie {np.abs(apart).max():.3g} mm apart")


def image_axes(image: Image) -> tuple[Vector, Vector, Vector]:
    """Return the LPS directions in which x, y and z of the pixels grow.

    A host that turned the pixels keeps the directions of the acquisition in the header and says
    the real ones in the attributes.

    Raises
    ------
    GeometryError
        If one is zero, not finite, or not three numbers.
    """
    head = image.head
    named = {
        "ImageRowDir": head.read_dir,
        "ImageColumnDir": head.phase_dir,
        "ImageSliceNormDir": head.slice_dir,
    }
    row, column, normal = (_direction(image, name, list(v)) for name, v in named.items())
    return row, column, normal


def _axes(image: Image) -> NDArray[np.float64]:
    return np.array(image_axes(image))


def _image_voxel_mm(image: Image) -> Vector:
    """Return the voxel size in one image [mm]; in a slice the third is its thickness."""
    extent = np.array(list(image.head.field_of_view), dtype=float)
    count = np.array(list(image.head.matrix_size))
    if not np.all(np.isfinite(extent)) or extent[: 2 if count[2] == 1 else 3].min() <= 0:
        raise GeometryError(
            f"field of view {vector_text(tuple(extent))} mm in {_where(image)}; every extent must "
            "be positive"
        )
    voxel: Vector = extent / count
    if voxel[2] < SMALLEST_ASPECT * voxel[:2].min():
        voxel[2] = extent[2]
    return voxel


def _direction(image: Image, name: str, in_header: list[float]) -> Vector:
    stated = image.values(name)
    try:
        vector = np.array([float(v) for v in stated] if stated else in_header)
    except ValueError:
        raise GeometryError(f"the attribute {name} is {stated}, not three numbers") from None
    norm = float(np.linalg.norm(vector)) if vector.shape == (3,) else 0.0
    if not 0.99 < norm < 1.01:
        raise GeometryError(
            f"{vector_text(tuple(vector))} is no direction ({name} or the header of "
            f"{_where(image)}): a unit vector is needed"
        )
    return vector / norm


def _in_order(images: Sequence[Image], normal: Vector) -> tuple[list[Image], list[Vector]]:
    placed = [(np.array(image.head.position, dtype=float), image) for image in images]
    if not all(np.all(np.isfinite(position)) for position, _ in placed):
        raise GeometryError(f"a position in {_where(images[0])} is not finite")
    placed.sort(key=lambda item: float(item[0] @ normal))
    return [image for _, image in placed], [position for position, _ in placed]


def _spacing(positions: list[Vector], axes: NDArray[np.float64], where: str) -> float:
    """Return the distance of neighbouring slices [mm]."""
    steps = np.diff(np.array(positions), axis=0) @ axes.T
    along = steps[:, 2]
    spacing = float(along.mean())
    if along.min() < 1e-3:
        raise GeometryError(f"two images at the same place in {where}; send one of each")
    if np.abs(along - spacing).max() > SPACING_TOLERANCE * spacing:
        raise GeometryError(
            f"the slices of {where} are {along.min():.4g} to {along.max():.4g} mm apart; one is "
            "missing, or they are not equally spaced"
        )
    if np.abs(steps[:, :2]).max() > OFFSET_TOLERANCE_MM:
        raise GeometryError(
            f"the slices of {where} are shifted by {np.abs(steps[:, :2]).max():.3g} mm in plane"
        )
    return spacing


def _where(image: Image) -> str:
    return f"series {image.head.image_series_index}, echo {image.head.contrast}"
