"""The grid of a volume in the scanner: shape, voxel size and the direction of B0."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsm_deploy.kernels.errors import GeometryError

Shape = tuple[int, int, int]
Volume = NDArray[np.float32]  # (x, y, z)
Mask = NDArray[np.bool_]  # (x, y, z), True inside

VOXEL_SIZE_MM = (0.01, 100.0)
LARGEST_SHEAR_DEG = 1.0


@dataclass(frozen=True)
class Geometry:
    """Grid shape, voxel size and B0 direction, everything the dipole operator depends on.

    Parameters
    ----------
    shape
        Voxels along (x, y, z), each at least 1.
    voxel_size_mm
        Edge lengths of a voxel along (x, y, z), 0.01 to 100 [mm].
    b0_direction
        Direction of the main field in voxel axes, of any non-zero norm; stored as a unit vector.
        Its sign has no meaning.

    Raises
    ------
    GeometryError
        If a size is not possible, or ``b0_direction`` has zero norm.
    """

    shape: tuple[int, int, int]
    voxel_size_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    b0_direction: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"shape must be three positive integers, got {self.shape}")
        voxel = _three_floats("voxel_size_mm", self.voxel_size_mm)
        smallest, largest = VOXEL_SIZE_MM
        if not all(smallest <= size <= largest for size in voxel):
            raise GeometryError(
                f"voxel size must be positive, {smallest:g} to {largest:g} mm, got "
                f"{vector_text(voxel)} mm; correct the header, or what was stated"
            )
        direction = np.asarray(_three_floats("b0_direction", self.b0_direction))
        # exactly summed, so that it is the same in every order of the axes
        norm = math.sqrt(math.fsum(direction**2)) if np.abs(direction).max() < 1e100 else np.inf
        if not 0 < norm < np.inf:
            raise GeometryError(
                f"B0 direction must be finite and non-zero, got {vector_text(tuple(direction))}; "
                "pass --b0-direction X Y Z in voxel axes"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "voxel_size_mm", voxel)
        object.__setattr__(self, "b0_direction", tuple((direction / norm).tolist()))

    @classmethod
    def from_affine(cls, shape: tuple[int, ...], affine: ArrayLike) -> "Geometry":
        """Read voxel size and B0 direction off a NIfTI affine.

        B0 points along +z of the scanner, so its direction in voxel axes is the third row of
        the affine's rotation part.

        Parameters
        ----------
        shape
            Voxels along (x, y, z).
        affine
            (4, 4) voxel-to-scanner (RAS mm) matrix.

        Raises
        ------
        GeometryError
            If the volume is not 3-D, or the affine is singular, sheared or not finite.
        """
        if len(shape) != 3:
            raise GeometryError(f"a 3-D volume is needed, got {len(shape)}-D of shape {shape}")
        matrix = np.asarray(affine, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.all(np.isfinite(matrix)):
            raise GeometryError(
                f"the affine must be a finite 4x4 matrix, got {matrix.tolist()}; correct the header"
            )
        linear = matrix[:3, :3]
        voxel = np.linalg.norm(linear, axis=0)
        if not 0 < voxel.min() <= voxel.max() < np.inf or abs(np.linalg.det(linear / voxel)) < 1e-6:
            raise GeometryError(
                f"the affine is singular (voxel size {vector_text(tuple(voxel))} mm); "
                "correct the header"
            )
        if (shear := shear_deg(matrix)) > LARGEST_SHEAR_DEG:
            raise GeometryError(
                f"the affine shears the voxel axes {shear:.1f} degrees off the right angle (at "
                f"most {LARGEST_SHEAR_DEG:g}); resample the volume onto a straight grid"
            )
        x, y, z = shape
        return cls(
            (x, y, z),
            _three_floats("voxel_size_mm", voxel),
            _three_floats("b0_direction", (linear / voxel)[2]),
        )

    def b0_angle_deg(self, direction: ArrayLike) -> float:
        """Return the angle between the B0 axis and ``direction`` [degrees, 0 to 90]."""
        other = np.asarray(direction, dtype=np.float64)
        cosine = abs(float(np.dot(self.b0_direction, other)) / float(np.linalg.norm(other)))
        return float(np.degrees(np.arccos(min(1.0, cosine))))

    def padded(self, pad_voxels: "int | tuple[int, int, int]") -> "Geometry":
        """Return the same grid grown by ``pad_voxels`` >= 0 on both sides of each axis."""
        pads = np.broadcast_to(np.asarray(pad_voxels, dtype=int), (3,))
        if pads.min() < 0:
            raise GeometryError(f"padding must be zero or more voxels, got {pad_voxels}")
        x, y, z = (int(n + 2 * p) for n, p in zip(self.shape, pads, strict=True))
        return Geometry((x, y, z), self.voxel_size_mm, self.b0_direction)

    def __str__(self) -> str:
        return (
            f"{shape_text(self.shape)}, voxel {vector_text(self.voxel_size_mm)} mm, "
            f"B0 {vector_text(self.b0_direction)}"
        )


def _three_floats(name: str, values: ArrayLike) -> tuple[float, float, float]:
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if array.shape != (3,):
        raise GeometryError(f"{name} must have three components, got {values!r}")
    return float(array[0]), float(array[1]), float(array[2])


def shear_deg(affine: ArrayLike) -> float:
    """Return how far the voxel axes of a regular affine are off the right angle [degrees]."""
    linear = np.asarray(affine, dtype=np.float64)[:3, :3]
    axes = linear / np.linalg.norm(linear, axis=0)
    return float(np.degrees(np.arcsin(min(1, np.abs(np.tril(axes.T @ axes, -1)).max()))))


def shape_text(shape: Iterable[int | str]) -> str:
    """Return ``160x192x144``, as messages and flags show shapes."""
    return "x".join(map(str, shape))


def vector_text(values: tuple[float, ...]) -> str:
    """Return ``(1, 0.86, 2)``, as messages show vectors."""
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
