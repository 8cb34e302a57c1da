"""A procedural head: susceptibility, labels and the local field it makes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from qsm_deploy.calibration.phantom.anatomy import Label, by_label, draw_anatomy
from qsm_deploy.calibration.phantom.head_frame import HeadFrame, smooth_noise
from qsm_deploy.calibration.phantom.lesions import draw_lesions
from qsm_deploy.calibration.phantom.veins import draw_veins
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry, Volume

# Marques et al., Magn Reson Med 86:526-542 (2021); microbleed and haemorrhage are added.
CHI_PPM = {
    Label.CAUDATE: 0.044,
    Label.GLOBUS_PALLIDUS: 0.1305,
    Label.PUTAMEN: 0.038,
    Label.RED_NUCLEUS: 0.100,
    Label.DENTATE: 0.152,
    Label.SUBSTANTIA_NIGRA: 0.111,
    Label.THALAMUS: 0.02,
    Label.WHITE_MATTER: -0.03,
    Label.GREY_MATTER: 0.02,
    Label.CSF: 0.019,
    Label.VEIN: 0.19,
    Label.CALCIFICATION: -3.3,
    Label.MICROBLEED: 1.0,
    Label.HAEMORRHAGE: 0.5,
}
CHI_SPREAD = 0.08  # relative, between heads
TEXTURE = ((1.6, 0.012), (6.0, 0.009))  # band limit [mm] and standard deviation [ppm]
POINT_SPREAD_VOXELS = 0.45
SMALLEST_GRID = 16
STREAMS = 6  # of random numbers that a head takes of its seed; what measures it takes later ones


@dataclass(frozen=True)
class Phantom:
    """A head whose susceptibility is known.

    Attributes
    ----------
    chi_ppm
        (x, y, z) float32 susceptibility, 0 outside the mask.
    local_field_ppm
        (x, y, z) float32 field of the sources inside the mask, with noise, 0 outside the mask.
    mask
        (x, y, z) bool, True in the brain.
    labels
        (x, y, z) uint8, values of :class:`Label`, 0 outside the mask.
    geometry
        The grid.
    noise_ppm
        Standard deviation of the noise in the field.
    seed
        What the head was drawn from.
    """

    chi_ppm: Volume
    local_field_ppm: Volume
    mask: NDArray[np.bool_]
    labels: NDArray[np.uint8]
    geometry: Geometry
    noise_ppm: float
    seed: int


def head_phantom(
    geometry: Geometry, *, seed: int, noise_ppm: float = 0.0025, lesions: bool = True
) -> Phantom:
    """Draw a head that fills the grid, up to adult size.

    Parameters
    ----------
    geometry
        The grid. The head's axes are the voxel axes whatever the B0 direction.
    seed
        Decides anatomy, texture, vessels, lesions and noise, each from a stream of its own. The
        same seed gives the same head, on a finer grid too but for lesions, texture and noise.
    noise_ppm
        Standard deviation of the Gaussian noise added to the field.
    lesions
        Whether to add a calcification, microbleeds and a haemorrhage.

    Raises
    ------
    GeometryError
        If the grid has fewer than 16 voxels along an axis.
    UsageError
        If ``seed`` is negative, or ``noise_ppm`` negative or not finite.
    """
    if min(geometry.shape) < SMALLEST_GRID:
        raise GeometryError(
            f"a head needs at least {SMALLEST_GRID} voxels along every axis, got {geometry.shape}"
        )
    if seed < 0:
        raise UsageError(f"seed must not be negative, got {seed}")
    _check_noise(noise_ppm)
    streams = np.random.default_rng(seed).spawn(STREAMS)
    size_rng, anatomy_rng, vein_rng, lesion_rng, chi_rng, noise_rng = streams

    frame = HeadFrame(geometry, tuple(size_rng.normal(0.98, 0.02, 3).clip(0.93, 1.02)))
    anatomy = draw_anatomy(frame, anatomy_rng)
    mask = anatomy.labels > 0
    inclusions = [(Label.VEIN, draw_veins(frame, vein_rng))]
    if lesions:
        inclusions += draw_lesions(frame, anatomy, lesion_rng)

    labels = anatomy.labels
    chi = _tissue_chi(geometry, labels, chi_rng)
    for label, coverage in inclusions:
        chi += coverage * (np.float32(CHI_PPM[label]) - chi)
        labels[(coverage >= 0.5) & mask] = label
    chi[~mask] = 0
    field = local_field(chi, mask, geometry, noise_ppm=noise_ppm, rng=noise_rng)
    return Phantom(chi, field, mask, labels, geometry, noise_ppm, seed)


def local_field(
    chi_ppm: Volume,
    mask: NDArray[np.bool_],
    geometry: Geometry,
    *,
    noise_ppm: float,
    rng: np.random.Generator,
) -> Volume:
    """Return the field of the sources inside the mask, without wrap-around, plus noise.

    Parameters
    ----------
    chi_ppm
        (x, y, z) susceptibility [ppm]; what lies outside the mask is ignored.
    mask
        (x, y, z) bool.
    geometry
        The grid of both.
    noise_ppm
        Standard deviation of Gaussian noise inside the mask, not negative.
    rng
        Draws the noise.

    Returns
    -------
    (x, y, z) float32 array
        Field [ppm], 0 outside the mask.

    Raises
    ------
    UsageError
        If ``noise_ppm`` is negative or not finite.
    """
    _check_noise(noise_ppm)
    field = dipole_field(np.where(mask, chi_ppm, np.float32(0)), geometry)
    field += np.float32(noise_ppm) * rng.standard_normal(field.shape, dtype=np.float32)
    field[~mask] = 0
    return field


def dipole_field(chi_ppm: Volume, geometry: Geometry) -> Volume:
    """Return the (x, y, z) field [ppm] of a susceptibility [ppm], without wrap-around."""
    x, y, z = (n // 2 for n in geometry.shape)
    return dipole_convolve(chi_ppm, geometry, pad_voxels=(x, y, z))


def _check_noise(noise_ppm: float) -> None:
    if not 0 <= noise_ppm < np.inf:
        raise UsageError(f"noise must be a standard deviation in ppm, 0 or more, got {noise_ppm}")


def _tissue_chi(geometry: Geometry, labels: NDArray[np.uint8], rng: np.random.Generator) -> Volume:
    """Return the susceptibility of the tissues: a value each, partial volume, texture [ppm]."""
    table = by_label({label: v * rng.normal(1, CHI_SPREAD) for label, v in CHI_PPM.items()})
    chi: Volume = gaussian_filter(table[labels], POINT_SPREAD_VOXELS, truncate=3)
    half = np.array(geometry.shape) * geometry.voxel_size_mm / 2
    axes = [
        ((np.arange(n) - (n - 1) / 2) * step).astype(np.float32)
        for n, step in zip(geometry.shape, geometry.voxel_size_mm, strict=True)
    ]
    for spacing_mm, std_ppm in TEXTURE:
        chi += np.float32(std_ppm) * smooth_noise(axes, spacing_mm, half, rng)
    return chi
