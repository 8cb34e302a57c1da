"""Susceptibility volumes to train on: procedural heads mixed with random shapes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.nifti import load_volume

MOST_MEDIAN_PPM = 1.0  # of a map, without signs; heads have 0.02


@dataclass(frozen=True)
class TrainingVolume:
    """A susceptibility map [ppm], 0 outside its mask, and its grid."""

    chi_ppm: NDArray[np.float32]
    mask: NDArray[np.bool_]
    geometry: Geometry


def random_geometry(rng: np.random.Generator, extent_mm: float, *, axial_1mm: bool) -> Geometry:
    """Return a grid of about ``extent_mm``: 1 mm axial, or any voxel size and B0 direction."""
    if axial_1mm:
        n = round(extent_mm)
        return Geometry((n, n, n))
    in_plane = rng.uniform(0.7, 1.1)
    slice_mm = rng.choice([in_plane, rng.uniform(1.0, 3.0)], p=[0.3, 0.7])
    n, m = round(extent_mm / in_plane), round(extent_mm / slice_mm)
    return Geometry((n, n, m), (in_plane, in_plane, float(slice_mm)), direction(rng))


def direction(rng: np.random.Generator) -> tuple[float, float, float]:
    """Return a direction of B0: along z in a quarter, else tilted by up to 50 degrees."""
    tilt = rng.choice([0.0, np.radians(rng.uniform(0, 50))], p=[0.25, 0.75])
    azimuth = rng.uniform(0, 2 * np.pi)
    x, y = np.sin(tilt) * np.cos(azimuth), np.sin(tilt) * np.sin(azimuth)
    return float(x), float(y), float(np.cos(tilt))


def head(geometry: Geometry, seed: int) -> TrainingVolume:
    """Return a procedural head, different for every seed."""
    phantom = head_phantom(geometry, seed=seed, noise_ppm=0.0)
    return TrainingVolume(phantom.chi_ppm, phantom.mask, geometry)


def user_maps(folder: Path) -> list[TrainingVolume]:
    """Return the susceptibility maps [ppm] of a folder; a voxel of exactly 0 is outside the mask.

    B0 lies where the files' affines say that the scanner's z is.

    Raises
    ------
    DataError
        If there are none, or one is no NIfTI file, or holds what is not finite, nothing at all,
        or what no tissue has in ppm.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name one of susceptibility maps in ppm")
    files = sorted(file for file in folder.iterdir() if ".nii" in file.suffixes)
    if not files:
        raise DataError(f"{folder} holds no NIfTI files; put susceptibility maps in ppm there")
    return [_user_map(file) for file in files]


def _user_map(file: Path) -> TrainingVolume:
    volume = load_volume(file)
    chi, mask = volume.data, volume.data != 0
    if not np.isfinite(chi).all():
        raise DataError(f"{file} holds NaN or Inf; put 0 where it is outside the mask")
    if not mask.any():
        raise DataError(f"{file} is 0 everywhere")
    if (median := float(np.median(np.abs(chi[mask])))) > MOST_MEDIAN_PPM:
        raise DataError(f"{file} has a median of {median:.3g} without signs; is it in ppb?")
    return TrainingVolume(chi, mask, volume.geometry)


def random_shapes(geometry: Geometry, seed: int) -> TrainingVolume:
    """Return boxes and ellipsoids of random susceptibility under band-limited texture.

    Sizes are log-uniform from 1.5 to 60 mm, small over large, values normal with a spread that
    falls with size: all scales from veins to lobes occur, and no anatomy is learnt.
    """
    rng = np.random.default_rng(seed)
    half = np.array(geometry.shape) * geometry.voxel_size_mm / 2
    axes = [
        (np.arange(n, dtype=np.float32) + 0.5) * d - h
        for n, d, h in zip(geometry.shape, geometry.voxel_size_mm, half, strict=True)
    ]
    chi = np.zeros(geometry.shape, dtype=np.float32)
    sizes_mm = np.exp(rng.uniform(np.log(1.5), np.log(60), rng.integers(300, 900)))
    for size_mm in sorted(sizes_mm, reverse=True):
        _paint_shape(chi, axes, half, size_mm, rng)
    for sigma_mm, amplitude in ((0.7, 0.012), (2.0, 0.01), (8.0, 0.012)):
        sigma = [sigma_mm / d for d in geometry.voxel_size_mm]
        texture = gaussian_filter(rng.standard_normal(geometry.shape, dtype=np.float32), sigma)
        chi += np.float32(amplitude * rng.uniform(0, 1.5) / texture.std()) * texture
    x, y, z = np.ix_(*(a / r for a, r in zip(axes, half * rng.uniform(0.75, 1.3, 3), strict=True)))
    mask = x * x + y * y + z * z < 1
    chi = np.where(mask, chi - chi[mask].mean(), 0).astype(np.float32)
    return TrainingVolume(chi, mask, geometry)


def _paint_shape(
    chi: NDArray[np.float32],
    axes: list[NDArray[np.float32]],
    half: NDArray[np.float64],
    size_mm: float,
    rng: np.random.Generator,
) -> None:
    """Paint one rotated box or ellipsoid over ``chi``, in place."""
    radii = size_mm / 2 * rng.uniform(0.4, 1.6, 3)
    centre = rng.uniform(-1, 1, 3) * half
    rotation = Rotation.random(rng=rng).as_matrix()
    box = tuple(
        slice(*np.searchsorted(axis, (c - reach, c + reach)))
        for axis, c, reach in zip(axes, centre, [1.8 * radii.max()] * 3, strict=True)
    )
    x, y, z = np.ix_(*(axis[part] - c for axis, part, c in zip(axes, box, centre, strict=True)))
    along = [(r[0] * x + r[1] * y + r[2] * z) / a for r, a in zip(rotation, radii, strict=True)]
    order = rng.choice([2, 10])  # 2 is an ellipsoid, 10 all but a box
    inside = along[0] ** order + along[1] ** order + along[2] ** order < 1
    value = rng.standard_normal() * 0.12 * (4 / (4 + size_mm)) ** 0.5
    chi[box][inside] = np.float32(value) + np.float32(rng.choice([0.0, 0.5])) * chi[box][inside]
