"""What a scanner and a pipeline make of a susceptibility map: cases to train on.

A case is one part of a map, cut by a mask of its own, with a field that only its own sources make,
for a direction of B0 of its own. Half of them have what no dipole explains, as every acquisition
has: errors of the field, voids of signal, a background that is left over or went through the
removal of this package, a mask that leaves out some of the sources.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.fft
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter
from training_volumes import TrainingVolume, direction

from qsm_deploy.calibration.phantom.phantom import dipole_field
from qsm_deploy.calibration.phantom.residual_background import residual_background
from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.runtime.local_field.background.removal import BackgroundRemoval, Task
from qsm_deploy.runtime.local_field.background.spheres import VSharp
from qsm_deploy.runtime.local_field.background.two_prior import TwoPrior

PART_VOXELS = (84, 112)  # a side
TEXTURE_PPM = 0.016  # of each of two bands, at most
LEAST_VOXELS = 40_000
MARGIN_VOXELS = 4


@dataclass(frozen=True)
class Case:
    """A field [ppm], 0 outside its mask, its sources [ppm] and grid."""

    field_ppm: Volume
    mask: Mask
    chi_ppm: Volume
    geometry: Geometry


def draw_case(volume: TrainingVolume, rng: np.random.Generator, *, axial: bool) -> Case:
    """Return a case of some part of a volume, along its own B0 where ``axial``."""
    least = min(LEAST_VOXELS, np.count_nonzero(volume.mask) // 4)
    while True:
        chi, sources, geometry = _part(volume, rng)
        if np.count_nonzero(sources) >= least:
            break
    if not axial:
        geometry = replace(geometry, b0_direction=direction(rng))
    if rng.random() < 0.6:
        for _ in range(2):
            chi += _band(chi.shape, geometry, rng.uniform(0, TEXTURE_PPM), rng)
    chi -= chi[sources].mean() - np.float32(rng.normal(0, 0.004))
    chi *= sources
    field = dipole_field(chi, geometry)
    mask = sources
    is_real = rng.random() < 0.5
    if is_real:
        mask = _eroded(sources, rng)
        field += _unexplained(field, chi, geometry, rng)
    noise_ppm = 0 if rng.random() < 0.13 else rng.uniform(0.0004, 0.006)
    field += _noise(chi.shape, geometry, noise_ppm, rng)
    odds = [0.2, 0.4, 0.4] if is_real else [0.8, 0.2, 0]
    kind = rng.choice(["none", "left over", "removed"], p=odds)
    if kind == "left over":
        rms_ppm = np.exp(rng.uniform(np.log(0.0005), np.log(0.007)))
        field += residual_background(mask, geometry, rms_ppm=rms_ppm, rng=rng)
    elif kind == "removed":
        field, mask = _removed(field, mask, geometry, rng)
    return _cropped(Case(field * mask, mask, chi, geometry))


def _part(volume: TrainingVolume, rng: np.random.Generator) -> tuple[Volume, Mask, Geometry]:
    """Return the map in a lumpy ellipsoid somewhere in a volume, or all of it, if it is small."""
    shape, voxel = volume.mask.shape, volume.geometry.voxel_size_mm
    sizes = [min(n, int(rng.integers(*PART_VOXELS))) for n in shape]
    starts = [int(rng.integers(0, n - size + 1)) for n, size in zip(shape, sizes, strict=True)]
    box = tuple(slice(s, s + size) for s, size in zip(starts, sizes, strict=True))
    inside = volume.mask[box]
    if sizes != list(shape) or rng.random() < 0.3:
        axes = [np.linspace(-1, 1, n, dtype=np.float32) / rng.uniform(0.8, 1.1) for n in sizes]
        x, y, z = np.ix_(*axes)
        lumps = gaussian_filter(rng.standard_normal(sizes, dtype=np.float32), 8)
        inside = inside & (x * x + y * y + z * z + 0.15 * lumps / lumps.std() < 1)
    pads = [(MARGIN_VOXELS, MARGIN_VOXELS)] * 3
    a, b, c = (size + 2 * MARGIN_VOXELS for size in sizes)
    geometry = Geometry((a, b, c), voxel, volume.geometry.b0_direction)
    return np.pad(volume.chi_ppm[box] * inside, pads), np.pad(inside, pads), geometry


def _band(
    shape: tuple[int, ...], geometry: Geometry, rms_ppm: float, rng: np.random.Generator
) -> Volume:
    """Return a texture of one scale, from half a millimetre to six."""
    sigma_mm = np.exp(rng.uniform(np.log(0.5), np.log(6)))
    sigma = [sigma_mm / h for h in geometry.voxel_size_mm]
    texture: Volume = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
    texture *= np.float32(rms_ppm / texture.std())
    return texture


def _noise(
    shape: tuple[int, ...], geometry: Geometry, sigma_ppm: float, rng: np.random.Generator
) -> Volume:
    """Return white noise, stronger in places in a third of the cases, blurred in a sixth."""
    noise: Volume = rng.standard_normal(shape, dtype=np.float32)
    if rng.random() < 1 / 3:
        noise *= np.exp(_smooth(shape, geometry, 12, rng) * np.float32(0.5))
    if rng.random() < 1 / 6:
        noise = gaussian_filter(noise, (0.5, 0.5, 0))
        noise /= noise.std()
    noise *= np.float32(sigma_ppm)
    return noise


def _smooth(
    shape: tuple[int, ...], geometry: Geometry, sigma_mm: float, rng: np.random.Generator
) -> Volume:
    """Return smooth noise of unit deviation."""
    sigma = [sigma_mm / h for h in geometry.voxel_size_mm]
    noise: Volume = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma)
    noise /= noise.std()
    return noise


def _coloured(shape: tuple[int, ...], geometry: Geometry, rng: np.random.Generator) -> Volume:
    """Return errors whose spectrum falls with frequency, as what lies on the cone in vivo does.

    There it is 4.6 times that of the noise at 0.15 / mm, and twice at 0.27 / mm.
    """
    x, y, z = (np.fft.fftfreq(n, h) for n, h in zip(shape, geometry.voxel_size_mm, strict=True))
    kx, ky, kz = np.ix_(x, y, np.abs(z[: shape[2] // 2 + 1]))
    k0, power = 1 / rng.uniform(10, 40), rng.uniform(0.7, 2)
    falling = (kx * kx + ky * ky + kz * kz + k0 * k0) ** (-power / 2)
    white = rng.standard_normal(shape, dtype=np.float32)
    error: Volume = scipy.fft.irfftn(scipy.fft.rfftn(white) * falling.astype(np.float32), s=shape)
    if rng.random() < 0.5:
        error *= np.exp(_smooth(shape, geometry, 12, rng) * np.float32(0.5))
    error *= np.float32(np.exp(rng.uniform(np.log(0.0008), np.log(0.007))) / error.std())
    return error


def _eroded(mask: Mask, rng: np.random.Generator) -> Mask:
    """Return a mask less so many voxels of its edge, none to four."""
    if not (voxels := int(rng.integers(0, 5))):
        return mask
    eroded: Mask = binary_erosion(mask, iterations=voxels)
    return eroded if np.count_nonzero(eroded) >= LEAST_VOXELS // 2 else mask


def _unexplained(
    field: Volume, chi: Volume, geometry: Geometry, rng: np.random.Generator
) -> Volume:
    """Return errors that no dipole makes: of every scale, and where the signal is lost."""
    error = _coloured(field.shape, geometry, rng)
    error += _band(field.shape, geometry, rng.uniform(0, 0.002), rng)
    noise = rng.standard_normal(field.shape, dtype=np.float32)
    if rng.random() < 0.5:  # noise grows with the field, as its spread within a voxel does
        noise_ppm = np.float32(rng.uniform(0.0005, 0.003) * rng.uniform(1, 5))
        error += noise_ppm * noise * np.minimum(1, np.abs(field) / np.float32(0.05))
    if rng.random() < 0.5:
        void = np.abs(chi) > rng.uniform(0.2, 0.5)
        around = distance_transform_edt(~void) <= rng.uniform(0, 2) if void.any() else void
        error[around] += (np.float32(rng.uniform(0.005, 0.1)) * noise)[around]
    return error


def _removed(
    field: Volume, mask: Mask, geometry: Geometry, rng: np.random.Generator
) -> tuple[Volume, Mask]:
    """Return what this package's removal leaves of the field under a strong background."""
    rms_ppm = np.exp(rng.uniform(np.log(0.02), np.log(0.3)))
    total = field + residual_background(mask, geometry, rms_ppm=rms_ppm, rng=rng)
    remove: BackgroundRemoval = VSharp()
    if rng.random() < 0.4:
        remove = TwoPrior(noise_ppm=max(0.001, float(rng.uniform(0, 0.004))), iterations=40)
    local, left = remove(Task(total * mask, mask, mask, geometry))
    return (local, left) if np.count_nonzero(left) >= LEAST_VOXELS // 2 else (field, mask)


def _cropped(case: Case) -> Case:
    """Return the box of the mask, on lengths that are multiples of four."""
    box = []
    for side, n in zip(bounding_box(case.mask), case.mask.shape, strict=True):
        size = min(-(-(side.stop - side.start) // 4) * 4, n)
        start = min(side.start, n - size)
        box.append(slice(start, start + size))
    part = tuple(box)
    a, b, c = (side.stop - side.start for side in part)
    geometry = replace(case.geometry, shape=(a, b, c))
    mask = case.mask[part]
    return Case(case.field_ppm[part], mask, case.chi_ppm[part] * mask, geometry)
