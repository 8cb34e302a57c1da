"""A multi-echo gradient-echo acquisition of a head: magnitude and wrapped phase of every echo."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.calibration.phantom.contrast import Contrast
from qsm_deploy.calibration.phantom.head_frame import HeadFrame
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.runtime.local_field.echoes import Echoes
from qsm_deploy.runtime.scan.units import ppm_per_unit

R2_STAR_POWER = 0.9  # of the field strength
BIPOLAR_RAD, BIPOLAR_SLOPE_RAD = 0.15, 0.35  # at the centre, and over the field of view


@dataclass(frozen=True)
class GradientEcho:
    """How a head is measured.

    Attributes
    ----------
    echo_times_s
        Of each echo, rising.
    field_strength_t
        Of B0.
    snr
        Mean signal of the first echo in the brain, over the noise of real and imaginary part.
    bipolar
        Whether every second echo is read backwards, along the first axis.

    Raises
    ------
    UsageError
        If the echo times do not rise, or ``snr`` is not positive.
    UnitsError
        If a time or the field strength is none of a scanner.
    """

    echo_times_s: tuple[float, ...]
    field_strength_t: float = 3.0
    snr: float = 40.0
    bipolar: bool = False

    def __post_init__(self) -> None:
        if not self.echo_times_s or np.any(np.diff(self.echo_times_s) <= 0):
            raise UsageError(f"echo times must rise, got {self.echo_times_s} s")
        if not self.snr > 0:
            raise UsageError(f"the signal-to-noise ratio must be positive, got {self.snr}")
        for echo in range(len(self.echo_times_s)):
            self.rad_per_ppm(echo)

    def rad_per_ppm(self, echo: int) -> float:
        """Return the phase that 1 ppm of field makes until an echo, counted from 0."""
        seconds, tesla = self.echo_times_s[echo], self.field_strength_t
        return 1 / ppm_per_unit("rad", echo_time_s=seconds, field_strength_t=tesla)


def acquire(
    sequence: GradientEcho,
    contrast: Contrast,
    total_field_ppm: Volume,
    mask: Mask,
    geometry: Geometry,
    rng: np.random.Generator,
) -> Echoes:
    """Measure a head.

    Parameters
    ----------
    sequence
        How.
    contrast
        Of its tissues.
    total_field_ppm
        (x, y, z) field of all sources, without noise.
    mask
        (x, y, z) bool, where ``sequence.snr`` holds.
    geometry
        The grid.
    rng
        Draws the noise.
    """
    signals = echo_signals(sequence, contrast, total_field_ppm, geometry)
    return receive(signals, sequence, mask, geometry, rng)


def echo_signals(
    sequence: GradientEcho, contrast: Contrast, total_field_ppm: Volume, geometry: Geometry
) -> Iterator[NDArray[np.complex64]]:
    """Yield the (x, y, z) signal of one echo after the other, without noise."""
    offset, readout = excitation_phase(geometry), readout_offset(geometry)
    r2_star = contrast.r2_star_3t * np.float32(r2_star_factor(sequence.field_strength_t))
    for echo, seconds in enumerate(sequence.echo_times_s):
        angle = offset + sequence.rad_per_ppm(echo) * total_field_ppm
        if sequence.bipolar:
            angle += (-1) ** echo * readout
        signal = contrast.m0 * np.exp(1j * angle - seconds * r2_star)
        yield signal.astype(np.complex64, copy=False)


def receive(
    signals: Iterable[NDArray[np.complex64]],
    sequence: GradientEcho,
    mask: Mask,
    geometry: Geometry,
    rng: np.random.Generator,
) -> Echoes:
    """Return phase and magnitude of signals, with noise.

    Parameters
    ----------
    signals
        (x, y, z) of each echo.
    sequence
        How they were made.
    mask
        (x, y, z) bool, where ``sequence.snr`` holds.
    geometry
        The grid.
    rng
        Draws the noise.
    """
    times, strength = sequence.echo_times_s, sequence.field_strength_t
    phase, magnitude = np.empty((2, len(times), *geometry.shape), dtype=np.float32)
    sigma = 0.0
    for echo, signal in enumerate(signals):
        sigma = sigma or float(np.abs(signal[mask]).mean()) / sequence.snr
        real, imaginary = rng.standard_normal((2, *geometry.shape), dtype=np.float32)
        noisy = signal + sigma * (real + 1j * imaginary)
        phase[echo], magnitude[echo] = np.angle(noisy), np.abs(noisy)
    return Echoes(phase, magnitude, times, strength, geometry)


def readout_offset(geometry: Geometry) -> Volume:
    """Return the (x, 1, 1) phase [rad] by which echoes are off that are read forwards."""
    readout = np.linspace(-0.5, 0.5, geometry.shape[0], dtype=np.float32)[:, None, None]
    offset: Volume = BIPOLAR_RAD + BIPOLAR_SLOPE_RAD * readout
    return offset


def r2_star_factor(field_strength_t: float) -> float:
    """Return the decay at a field strength over that at 3 T."""
    return float((field_strength_t / 3) ** R2_STAR_POWER)


def excitation_phase(geometry: Geometry) -> Volume:
    """Return the (x, y, z) phase at no echo time [rad], that of transmit and receive coils."""
    x, y, z = np.ix_(*(axis / 100 for axis in HeadFrame(geometry).axes))
    linear = 1 + 2.2 * x - 1.6 * y + 1.2 * z
    phase = linear + 1.5 * x * z - 1.2 * y * y + 0.8 * x * y * z + 0.6 * x**3
    return np.asarray(phase, dtype=np.float32)
