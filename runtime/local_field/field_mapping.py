"""The field in ppm from the wrapped phase of one or several echoes.

With several echoes the phase that grows between the first two, free of the phase at excitation,
is unwrapped in space. It tells what that initial phase is, whose smooth part is taken out of all
echoes, and by how many turns each later echo is wrapped; the field is the mean over the echoes,
weighted by their precision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from scipy.ndimage import gaussian_filter

from qsm_deploy.kernels.errors import DataError, MemoryLimitError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.local_field.agreement import (
    even_echo_offset,
    plane_in,
    require_agreement,
    require_different,
)
from qsm_deploy.runtime.local_field.unwrapping import TURN, unwrap, wrap
from qsm_deploy.runtime.scan.axes import Axes
from qsm_deploy.runtime.scan.units import ppm_per_unit

BYTES_PER_VOXEL = 16  # of an echo: phase, signal, phase without its initial part, one on the way
OFFSET_SMOOTHING_MM = 8.0  # standard deviation; what varies faster is no property of the coils


@dataclass(frozen=True)
class Echoes:
    """A multi-echo gradient echo.

    Attributes
    ----------
    phase_rad, magnitude
        (n, x, y, z) float32, wrapped phase and signal of each echo.
    echo_times_s
        Of each echo, rising.
    field_strength_t
        Of B0.
    voxel_size_mm
        Edge lengths of a voxel.
    """

    phase_rad: Volume
    magnitude: Volume
    echo_times_s: Sequence[float]
    field_strength_t: float
    voxel_size_mm: tuple[float, float, float]

    def turned(self, axes: Axes) -> "Echoes":
        """Return the echoes in axes that are made of theirs."""
        return replace(
            self,
            phase_rad=axes.turn(self.phase_rad),
            magnitude=axes.turn(self.magnitude),
            voxel_size_mm=axes.sizes(self.voxel_size_mm),
        )

    @property
    def signal(self) -> Volume:
        """(x, y, z) magnitude of all echoes together."""
        signal: Volume = np.sqrt(np.einsum("n...,n...", self.magnitude, self.magnitude))
        return signal


def require_echo_memory(count: int, voxels: int, limit_bytes: float) -> None:
    """Refuse more echoes than the memory holds.

    Raises
    ------
    MemoryLimitError
        If it does not.
    """
    needed = BYTES_PER_VOXEL * count * voxels
    if needed > limit_bytes:
        raise MemoryLimitError(
            f"{count} echoes would take {memory_text(needed)}, {memory_text(limit_bytes)} are "
            "left; give fewer"
        )


class FieldMapping(Protocol):
    """What makes a field [ppm] of echoes; :func:`map_field` does."""

    def __call__(self, echoes: Echoes, mask: Mask) -> tuple[Volume, list[str]]:
        """Return the (x, y, z) field [ppm], 0 outside the mask, and notes."""


def map_field(echoes: Echoes, mask: Mask) -> tuple[Volume, list[str]]:
    """Return the field that the phase of all echoes tells.

    Parameters
    ----------
    echoes
        At least one.
    mask
        (x, y, z) bool, True where the phase is to be trusted.

    Returns
    -------
    (x, y, z) float32 array, list of str
        Field [ppm], 0 outside the mask, of which a constant is not determined; notes on what was
        corrected.

    Raises
    ------
    DataError
        If the echo times do not rise, an echo is there twice, or echoes contradict each other.

    References
    ----------
    Robinson et al., NMR Biomed 30:e3601 (2017), for weights; Eckstein et al., Magn Reson Med
    79:2996-3006 (2018), for the initial phase.
    """
    times = np.asarray(echoes.echo_times_s, dtype=np.float32)
    if np.any(np.diff(times) <= 0):
        raise DataError(f"echo times of {[round(1e3 * float(t), 3) for t in times]} ms do not rise")
    phase, magnitude = echoes.phase_rad, echoes.magnitude
    notes: list[str] = []
    if len(times) == 1:
        rad_per_s = unwrap(phase[0], mask, magnitude[0]) / times[0]
    else:
        require_different(phase)
        growth = unwrap(wrap(phase[1] - phase[0]), mask, magnitude[0], phase[0])
        even = None
        if len(times) == 2:
            notes.append("two echoes do not tell whether the readout was bipolar; it must not be")
        else:
            even = even_echo_offset(phase, magnitude, times, growth, mask)
        if even is not None:
            growth -= even
            size = float(np.abs(even[mask]).mean())
            notes.append(f"bipolar readout: even echoes {size:.2f} rad off, corrected by a plane")
        rad_per_s = growth / (times[1] - times[0])
        initial = _initial(wrap(phase[0] - rad_per_s * times[0]), magnitude[0], mask, echoes)
        phase = phase - initial
        if even is not None:
            phase[1::2] -= even
        rad_per_s = _mean_over_echoes(phase, magnitude, times, rad_per_s)
    one_second = ppm_per_unit("hz", echo_time_s=None, field_strength_t=echoes.field_strength_t)
    field: Volume = np.where(mask, rad_per_s, 0) * np.float32(one_second / (2 * math.pi))
    return field, notes


def _initial(raw_rad: Volume, magnitude: Volume, mask: Mask, echoes: Echoes) -> Volume:
    """Return the smooth phase at excitation: a plane, and what is smooth of the rest."""
    weight = magnitude * mask
    plane = plane_in(raw_rad, weight, mask)
    smooth = _smooth(wrap(raw_rad - plane), weight, echoes)
    rest = wrap(raw_rad - plane - smooth)
    require_agreement(rest, mask, "echo 2 contradicts echo 1 at the time of excitation")
    initial: Volume = plane + smooth
    return initial


def _smooth(phase_rad: Volume, weight: Volume, echoes: Echoes) -> Volume:
    """Return a wrapped phase smoothed as the direction of complex numbers."""
    sigma = [OFFSET_SMOOTHING_MM / v for v in echoes.voxel_size_mm]
    real, imaginary = (
        gaussian_filter(weight * part(phase_rad), sigma, truncate=2.5) for part in (np.cos, np.sin)
    )
    angle: Volume = np.arctan2(imaginary, real)
    return angle


def _mean_over_echoes(
    phase_rad: Volume, magnitude: Volume, times: Volume, rad_per_s: Volume
) -> Volume:
    """Return the angular frequency from wrapped phases, given a first estimate of it.

    Each echo in turn is unwrapped by what the earlier ones predict, which is better the more of
    them there are.
    """
    weights = np.zeros_like(rad_per_s)
    total = np.zeros_like(rad_per_s)
    for phase, signal, time in zip(phase_rad, magnitude, times, strict=True):
        predicted = rad_per_s * time
        unwrapped = phase + TURN * np.rint((predicted - phase) / TURN)
        weight = (signal * time) ** 2
        total += weight * (unwrapped / time)
        weights += weight
        known = weights > 0
        np.divide(total, weights, out=rad_per_s, where=known)
    return rad_per_s
