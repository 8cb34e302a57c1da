"""A head of tissue labels as a scanner measures it: finer than the voxels, then cropped in k-space.

Bone and air adjoin the brain, so that the outermost voxels hold some of both, as a scanner's do.
The truth is what the signal of a voxel sees: a mean weighted by the signal. A field that is
cropped itself rings from the steps at air, which nobody measures.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.calibration.phantom.contrast import Contrast, draw_contrast
from qsm_deploy.calibration.phantom.gradient_echo import (
    GradientEcho,
    excitation_phase,
    r2_star_factor,
    readout_offset,
)
from qsm_deploy.calibration.phantom.phantom import CHI_PPM as BRAIN_PPM
from qsm_deploy.calibration.phantom.surroundings import CHI_PPM as AROUND_PPM
from qsm_deploy.calibration.phantom.surroundings import shim
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.threads import workers
from qsm_deploy.runtime.local_field.echoes import Echoes

BRAIN = (
    *range(Label.CAUDATE, Label.VEIN + 1),
    Label.CALCIFICATION,
    Label.MICROBLEED,
    Label.HAEMORRHAGE,
)
TEXTURED = (Label.CAUDATE, Label.GREY_MATTER)  # first and last label
TEXTURE = ((1.2, 0.012), (4.0, 0.008))  # Gaussian [voxels] and standard deviation [ppm]
POINT_SPREAD_VOXELS = 0.8
NECK_SLICES = 64
FAT_PPM = 0.019
HAEMORRHAGE_MM, MICROBLEEDS, MICROBLEED_MM = (16.0, 12.0, 12.0), 8, (1.0, 2.2)
TAPER = 0.3  # of k-space, at its ends
SHORT_S = 1e-4  # an echo before any phase has wrapped
PHASE_STEPS = 4096
FULL_SCALE = 1000.0  # of the whole numbers of the magnitude


@dataclass(frozen=True)
class FineHead:
    """A head on the grid of its labels.

    Attributes
    ----------
    inner_ppm, outer_ppm
        (x, y, z) fields of the sources inside and outside the brain, the latter shimmed.
    chi_ppm
        (x, y, z) susceptibility of the brain without its mean, 0 outside.
    contrast
        Of its tissues.
    mask
        (x, y, z) bool, the brain.
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
        (x, y, z) field of all sources, and of those in the brain; in the brain.
    chi_ppm
        (x, y, z) susceptibility without its mean.
    mask
        (x, y, z) bool, the brain.
    labels
        (x, y, z) of the nearest fine voxel.
    geometry
        The grid.
    """

    echoes: Echoes
    total_ppm: Volume
    local_ppm: Volume
    chi_ppm: Volume
    mask: Mask
    labels: NDArray[np.uint8]
    geometry: Geometry


def fine_head(labels: NDArray[np.uint8], geometry: Geometry, seed: int) -> FineHead:
    """Return the fields of a head that is given by its tissue labels.

    Parameters
    ----------
    labels
        (x, y, z) values of :class:`Label`, air all around.
    geometry
        The grid.
    seed
        Decides texture and lesions.
    """
    lesion_rng, texture_rng, contrast_rng = np.random.default_rng(seed).spawn(3)
    labels = _with_lesions(labels, geometry, lesion_rng)
    brain = np.isin(labels, BRAIN)
    chi = _chi(labels, texture_rng)
    inner = np.where(brain, chi - chi[brain].mean(), np.float32(0))
    outer = np.where(brain, chi[brain].mean(), chi) - np.float32(AROUND_PPM[Label.AIR])
    inner, outer = (gaussian_filter(part, POINT_SPREAD_VOXELS) for part in (inner, outer))
    inner_field, outer_field = (_field(part, geometry) for part in (inner, outer))
    outer_field -= shim(inner_field + outer_field, brain, geometry)
    contrast = draw_contrast(labels, geometry, contrast_rng)
    return FineHead(inner_field, outer_field, inner, contrast, brain, labels, geometry)


def measure(
    head: FineHead, shape: tuple[int, int, int], sequence: GradientEcho, rng: np.random.Generator
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
    voxel = tuple(v * n / m for v, n, m in zip(fine.voxel_size_mm, fine.shape, shape, strict=True))
    geometry = Geometry(shape, voxel, fine.b0_direction)
    mask = _cropped(head.mask.astype(np.complex64), shape).real > 0.5
    total = head.inner_ppm + head.outer_ppm
    m0 = head.contrast.m0.astype(np.complex64)
    signal = _cropped(m0, shape).real
    weighted = _cropped(m0 * head.inner_ppm, shape).real, _cropped(m0 * head.chi_ppm, shape).real
    safe = np.where(np.abs(signal) > 0, signal, 1)
    local, chi = (np.where(mask, part / safe, 0).astype(np.float32) for part in weighted)
    per_ppm = sequence.rad_per_ppm(0) / sequence.echo_times_s[0]
    short = _cropped(m0 * np.exp(1j * np.float32(SHORT_S * per_ppm) * total), shape)
    seen = np.where(mask, np.angle(short) / (SHORT_S * per_ppm), 0).astype(np.float32)
    echoes = _echoes(head, total, shape, sequence, mask, rng)
    nearest = np.ix_(
        *(
            np.rint(np.arange(m) * n / m).astype(int) % n
            for n, m in zip(fine.shape, shape, strict=True)
        )
    )
    labels = head.labels[nearest] * mask
    return Measured(
        Echoes(*echoes, sequence.echo_times_s, sequence.field_strength_t, geometry),
        seen,
        local,
        chi,
        mask,
        labels,
        geometry,
    )


def _echoes(head, total, shape, sequence, mask, rng) -> tuple[Volume, Volume]:
    offset, readout = excitation_phase(head.geometry), readout_offset(head.geometry)
    decay = head.contrast.r2_star_3t * np.float32(r2_star_factor(sequence.field_strength_t))
    stack = (len(sequence.echo_times_s), *shape)
    phase, magnitude = np.empty(stack, np.float32), np.empty(stack, np.float32)
    sigma = scale = 0.0
    for echo, seconds in enumerate(sequence.echo_times_s):
        angle = offset + sequence.rad_per_ppm(echo) * total
        if sequence.bipolar:
            angle += (-1) ** echo * readout
        fine = head.contrast.m0 * np.exp(-seconds * decay) * np.exp(1j * angle)
        signal = _cropped(fine.astype(np.complex64), shape)
        sigma = sigma or float(np.abs(signal[mask]).mean()) / sequence.snr
        noise = rng.standard_normal((2, *shape), dtype=np.float32)
        signal = signal + sigma * (noise[0] + 1j * noise[1])
        scale = scale or FULL_SCALE / float(np.percentile(np.abs(signal[mask]), 99))
        step = 2 * np.pi / PHASE_STEPS
        phase[echo] = (
            np.rint(np.angle(signal) / step).clip(-PHASE_STEPS // 2, PHASE_STEPS // 2 - 1) * step
        )
        magnitude[echo] = np.rint(np.abs(signal) * scale)
    return phase, magnitude


def _chi(labels, rng) -> Volume:
    table = np.zeros(max(Label) + 1, dtype=np.float32)
    for label, value in (BRAIN_PPM | AROUND_PPM).items():
        table[label] = value
    table[12] = FAT_PPM
    table[0] = AROUND_PPM[Label.AIR]
    chi = table[labels]
    textured = (labels >= TEXTURED[0]) & (labels <= TEXTURED[1])
    for spacing, std_ppm in TEXTURE:
        noise = gaussian_filter(rng.standard_normal(labels.shape, dtype=np.float32), spacing)
        chi += textured * (noise * np.float32(std_ppm / noise.std()))
    return chi


def _with_lesions(labels, geometry, rng):
    labels = labels.copy()
    white = np.argwhere(labels == Label.WHITE_MATTER)
    voxel = np.asarray(geometry.voxel_size_mm)
    sizes = [(Label.HAEMORRHAGE, np.array(HAEMORRHAGE_MM) / 2)] + [
        (Label.MICROBLEED, np.full(3, r)) for r in rng.uniform(*MICROBLEED_MM, MICROBLEEDS)
    ]
    from scipy.ndimage import distance_transform_edt

    deep = distance_transform_edt(np.isin(labels, BRAIN), sampling=voxel)
    white = white[deep[tuple(white.T)] > 12]
    for label, semi in sizes:
        centre = white[rng.integers(len(white))]
        reach = np.ceil(semi / voxel).astype(int)
        box = tuple(slice(max(0, c - r), c + r + 1) for c, r in zip(centre, reach, strict=True))
        at = np.ix_(
            *(
                (np.arange(s.start, min(s.stop, n)) - c) * v / e
                for s, n, c, v, e in zip(box, labels.shape, centre, voxel, semi, strict=True)
            )
        )
        inside = sum(a * a for a in at) <= 1
        part = labels[box]
        part[inside & np.isin(part, BRAIN)] = label
    return labels


def _field(chi: Volume, geometry: Geometry) -> Volume:
    """Return the field of sources, the lowest slice of which goes on below."""
    longer = np.pad(chi, ((0, 0), (0, 0), (NECK_SLICES, 0)), mode="edge")
    x, y, z = longer.shape
    grid = Geometry((x, y, z), geometry.voxel_size_mm, geometry.b0_direction)
    return dipole_convolve(longer, grid, pad_voxels=(x // 4, y // 4, z // 4))[..., NECK_SLICES:]


def _cropped(fine: NDArray[np.complex64], shape: tuple[int, int, int]) -> NDArray[np.complex64]:
    """Return an image of the low frequencies alone, those at the ends tapered."""
    spectrum = scipy.fft.fftn(fine, workers=workers())
    for axis, (n, m) in enumerate(zip(fine.shape, shape, strict=True)):
        at = np.fft.fftfreq(m, 1 / m).astype(int)
        outer = (np.abs(at) / (m / 2) - (1 - TAPER)).clip(0, None) / TAPER
        taper = (0.5 * (1 + np.cos(np.pi * outer.clip(0, 1)))).astype(np.float32)
        spectrum = np.take(spectrum, at % n, axis=axis)
        spectrum *= taper.reshape([-1 if a == axis else 1 for a in range(3)])
    image = scipy.fft.ifftn(spectrum, workers=workers(), overwrite_x=True)
    return (image * np.float32(np.prod(shape) / np.prod(fine.shape))).astype(np.complex64)
