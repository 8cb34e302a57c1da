"""A head of tissue labels as a scanner measures it: finer than the voxels, then cropped in k-space.

Bone and air adjoin the brain, so that the outermost voxels hold some of both, as a scanner's do.
The truth is what the signal of a voxel sees: a mean weighted by the signal. A field that is
cropped itself rings from the steps at air, which nobody measures.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

from qsm_deploy.calibration.phantom.anatomy import Label, by_label
from qsm_deploy.calibration.phantom.contrast import Contrast, draw_contrast
from qsm_deploy.calibration.phantom.gradient_echo import GradientEcho, echo_signals, receive
from qsm_deploy.calibration.phantom.head_frame import HeadFrame, ellipsoid_radius
from qsm_deploy.calibration.phantom.phantom import CHI_PPM as BRAIN_PPM
from qsm_deploy.calibration.phantom.surroundings import CHI_PPM as AROUND_PPM
from qsm_deploy.calibration.phantom.surroundings import (
    POINT_SPREAD_VOXELS,
    field_with_neck,
    shim,
)
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Mask, Shape, Volume
from qsm_deploy.kernels.threads import workers
from qsm_deploy.runtime.local_field.echoes import Echoes

CHI_PPM = {Label.OUTSIDE: AROUND_PPM[Label.AIR]} | BRAIN_PPM | AROUND_PPM
TEXTURED = range(Label.CAUDATE, Label.CSF)
TEXTURE = ((1.2, 0.012), (4.0, 0.008))  # Gaussian [voxels] and standard deviation [ppm]
NECK_VOXELS = 64
HAEMORRHAGE_MM = (8.0, 6.0, 6.0)  # semi-axes
MICROBLEEDS, MICROBLEED_MM = 8, (1.0, 2.2)  # smallest and largest radius
LESION_DEPTH_MM = 12.0  # at least, of its centre below the brain's surface
TAPER = 0.3  # of k-space, at its ends
SHORT_S = 1e-4  # an echo before any phase has wrapped
PHASE_STEPS = 4096  # to a turn
BRIGHT = 1000.0  # what the magnitude of nearly all voxels of the first echo stays below
NEARLY_ALL = 99  # [%]


@dataclass(frozen=True)
class FineHead:
    """A head on the grid of its labels.

    Attributes
    ----------
    inner_ppm, outer_ppm
        (x, y, z) fields of the sources inside and outside the brain, the latter shimmed.
    chi_ppm
        (x, y, z) susceptibility of the brain without its mean, smoothed; 0 outside.
    contrast
        Of its tissues.
    mask
        (x, y, z) bool, the brain.
    labels
        (x, y, z) values of :class:`Label`, with lesions.
    geometry
        The grid.
    """

    inner_ppm: Volume
    outer_ppm: Volume
    chi_ppm: Volume
    contrast: Contrast
    mask: Mask
    labels: NDArray[np.uint8]
    geometry: Geometry


@dataclass(frozen=True)
class Measured:
    """What a scanner measures of a head, and the truth on its grid.

    Attributes
    ----------
    echoes
        Phase in 4096 steps of a turn, magnitude in whole numbers.
    total_ppm, local_ppm
        (x, y, z) field of all sources, and of those in the brain; 0 outside it.
    chi_ppm
        (x, y, z) susceptibility without its mean, 0 outside the brain.
    mask
        (x, y, z) bool, the brain.
    labels
        (x, y, z) of the nearest fine voxel, 0 outside the brain.
    """

    echoes: Echoes
    total_ppm: Volume
    local_ppm: Volume
    chi_ppm: Volume
    mask: Mask
    labels: NDArray[np.uint8]


def fine_head(labels: NDArray[np.uint8], geometry: Geometry, *, seed: int) -> FineHead:
    """Return the fields of a head that is given by its tissue labels.

    Inner and outer sources are smoothed apart, or bone would leak into the brain.

    Parameters
    ----------
    labels
        (x, y, z) values of :class:`Label`; 0 is air.
    geometry
        The grid.
    seed
        Decides texture and lesions.

    Raises
    ------
    DataError
        If there is no white matter deep enough for lesions.
    """
    lesion_rng, texture_rng, contrast_rng = np.random.default_rng(seed).spawn(3)
    labels = _with_lesions(labels, geometry, lesion_rng)
    brain = np.isin(labels, list(BRAIN_PPM))
    chi = _chi(labels, texture_rng)
    mean = chi[brain].mean()
    inner = gaussian_filter(np.where(brain, chi - mean, np.float32(0)), POINT_SPREAD_VOXELS)
    around = np.where(brain, mean, chi) - np.float32(AROUND_PPM[Label.AIR])
    outer = gaussian_filter(around, POINT_SPREAD_VOXELS)
    inner_field, outer_field = _field(inner, geometry), _field(outer, geometry)
    outer_field -= shim(inner_field + outer_field, brain, geometry)
    contrast = draw_contrast(labels, geometry, contrast_rng)
    return FineHead(inner_field, outer_field, inner, contrast, brain, labels, geometry)


def measure(
    head: FineHead, shape: Shape, sequence: GradientEcho, rng: np.random.Generator
) -> Measured:
    """Measure a head on a coarser grid that covers the same field of view.

    Parameters
    ----------
    head
        On its fine grid.
    shape
        Of the voxels that are measured, no more than the fine ones along any axis.
    sequence
        How.
    rng
        Draws the noise.
    """
    fine = head.geometry
    x, y, z = (v * n / m for v, n, m in zip(fine.voxel_size_mm, fine.shape, shape, strict=True))
    grid = Geometry(shape, (x, y, z), fine.b0_direction)
    mask = _cropped(head.mask, shape).real > 0.5
    total = head.inner_ppm + head.outer_ppm
    clean = (_cropped(s, shape) for s in echo_signals(sequence, head.contrast, total, fine))
    echoes = _stored(receive(clean, sequence, mask, grid, rng), mask)

    m0 = head.contrast.m0
    signal = _cropped(m0, shape).real
    sources = (_cropped(m0 * part, shape).real for part in (head.inner_ppm, head.chi_ppm))
    local, chi = (
        np.divide(part, signal, out=np.zeros_like(signal), where=mask) for part in sources
    )
    per_ppm = np.float32(GradientEcho((SHORT_S,), sequence.field_strength_t).rad_per_ppm(0))
    seen = np.angle(_cropped(m0 * np.exp(1j * per_ppm * total), shape)) / per_ppm
    labels = _nearest(head.labels, shape) * mask
    return Measured(echoes, seen * mask, local, chi, mask, labels)


def _chi(labels: NDArray[np.uint8], rng: np.random.Generator) -> Volume:
    """Return the susceptibility of tissues, some with texture [ppm]."""
    chi = by_label(CHI_PPM)[labels]
    textured = np.isin(labels, TEXTURED)
    for spread, std_ppm in TEXTURE:
        noise = gaussian_filter(rng.standard_normal(labels.shape, dtype=np.float32), spread)
        chi += textured * (noise * np.float32(std_ppm / noise.std()))
    return chi


def _with_lesions(
    labels: NDArray[np.uint8], geometry: Geometry, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Return labels with a haemorrhage and microbleeds, centred in white matter."""
    frame, labels = HeadFrame(geometry), labels.copy()
    depth_mm = distance_transform_edt(np.isin(labels, list(BRAIN_PPM)), sampling=frame.voxel_mm)
    places = np.argwhere((labels == Label.WHITE_MATTER) & (depth_mm > LESION_DEPTH_MM))
    if not len(places):
        raise DataError(f"no white matter {LESION_DEPTH_MM:g} mm below the brain's surface")
    lesions = [(Label.HAEMORRHAGE, HAEMORRHAGE_MM)]
    lesions += [(Label.MICROBLEED, (r, r, r)) for r in rng.uniform(*MICROBLEED_MM, MICROBLEEDS)]
    for label, semi_axes_mm in lesions:
        place = places[rng.integers(len(places))]
        centre_mm = [axis[n] for axis, n in zip(frame.axes, place, strict=True)]
        box = frame.box(centre_mm, max(semi_axes_mm))
        axes = [axis[part] for axis, part in zip(frame.axes, box, strict=True)]
        inside = ellipsoid_radius(axes, centre_mm, semi_axes_mm) <= 1
        labels[box][inside & np.isin(labels[box], list(BRAIN_PPM))] = label
    return labels


def _field(chi_ppm: Volume, geometry: Geometry) -> Volume:
    """Return the field of a head with its neck."""
    x, y, z = geometry.shape
    pads = x // 4, y // 4, (z + NECK_VOXELS) // 4
    return field_with_neck(chi_ppm, geometry, neck_voxels=NECK_VOXELS, pad_voxels=pads)


def _stored(echoes: Echoes, mask: Mask) -> Echoes:
    """Return echoes as a scanner stores them, in whole numbers."""
    step = np.float32(2 * np.pi / PHASE_STEPS)
    half = PHASE_STEPS // 2
    phase = np.rint(echoes.phase_rad / step).clip(-half, half - 1) * step
    scale = np.float32(BRIGHT / np.percentile(echoes.magnitude[0][mask], NEARLY_ALL))
    return replace(echoes, phase_rad=phase, magnitude=np.rint(echoes.magnitude * scale))


def _nearest(labels: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Return labels on a coarser grid, which :func:`_cropped` takes an image to."""
    sides = zip(labels.shape, shape, strict=True)
    at = (np.rint(np.arange(m) * n / m).astype(int) % n for n, m in sides)
    nearest: NDArray[np.uint8] = labels[np.ix_(*at)]
    return nearest


def _cropped(fine: NDArray[np.generic], shape: Shape) -> NDArray[np.complex64]:
    """Return an image of the low frequencies alone, those at the ends tapered."""
    spectrum = scipy.fft.fftn(fine.astype(np.complex64), workers=workers(), overwrite_x=True)
    for axis, (n, m) in enumerate(zip(fine.shape, shape, strict=True)):
        kept = np.fft.fftfreq(m, 1 / m).astype(int)
        outer = (np.abs(kept) / (m / 2) - (1 - TAPER)).clip(0, TAPER) / TAPER
        taper = 0.5 * (1 + np.cos(np.pi * outer)).astype(np.float32)
        spectrum = np.take(spectrum, kept % n, axis=axis)
        spectrum *= taper.reshape([-1 if a == axis else 1 for a in range(3)])
    image = scipy.fft.ifftn(spectrum, workers=workers(), overwrite_x=True)
    image *= np.float32(np.prod(shape) / np.prod(fine.shape))
    return image.astype(np.complex64, copy=False)
