"""The field in ppm, its noise and what contradicts it, from the wrapped phase of several echoes.

The phase of echo j is ``initial + w TE_j``, and ``offset`` more in even echoes that were read
backwards; its noise is that of the signal over the magnitude. What grows between the first two
echoes, free of the initial phase, is unwrapped in space. It tells the initial phase, whose smooth
part is taken out of all echoes, and by how many turns each later echo is wrapped; w is the mean
over the echoes, weighted by their precision. What the echoes leave tells the noise.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy.stats import chi

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.local_field.agreement import (
    even_echo_offset,
    require_agreement,
    require_different,
)
from qsm_deploy.runtime.local_field.echoes import Echoes
from qsm_deploy.runtime.local_field.initial_phase import initial_phase
from qsm_deploy.runtime.local_field.unwrapping import TURN, unwrap, wrap
from qsm_deploy.runtime.scan.units import ppm_per_unit


@dataclass(frozen=True)
class FieldMap:
    """A total field, and how far it may be believed.

    Attributes
    ----------
    field_ppm
        (x, y, z), 0 outside the mask; a constant is not determined.
    noise_ppm
        (x, y, z) standard deviation of its noise, 0 outside the mask; ``None`` with one echo,
        which tells none.
    misfit
        (x, y, z) root mean square of what the echoes leave, over the noise of the signal.
    facts
        For a report: signal-to-noise ratio, what even echoes are off by.
    notes
        On what was corrected.
    """

    field_ppm: Volume
    noise_ppm: Volume | None = None
    misfit: Volume | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class FieldMapping(Protocol):
    """What makes a field of echoes; :func:`map_field` does."""

    def __call__(self, echoes: Echoes, mask: Mask) -> FieldMap:
        """Return the field inside a mask."""


def map_field(echoes: Echoes, mask: Mask) -> FieldMap:
    """Return the field that the phase of all echoes tells.

    Parameters
    ----------
    echoes
        At least one.
    mask
        (x, y, z) bool, True where the phase is to be trusted.

    Raises
    ------
    DataError
        If the echo times do not rise, an echo is there twice, or echoes contradict each other.

    References
    ----------
    Robinson et al., NMR Biomed 30:e3601 (2017), for the weights.
    """
    times = np.asarray(echoes.echo_times_s, dtype=np.float32)
    if np.any(np.diff(times) <= 0):
        raise DataError(f"echo times of {[round(1e3 * float(t), 3) for t in times]} ms do not rise")
    phase, magnitude = echoes.phase_rad, echoes.magnitude
    one_second = ppm_per_unit("hz", echo_time_s=None, field_strength_t=echoes.field_strength_t)
    ppm = np.float32(one_second / (2 * math.pi))  # of 1 rad/s
    if len(times) == 1:
        rad_per_s = unwrap(phase[0], mask, magnitude[0]) / times[0]
        note = "one echo does not tell its initial phase: the smooth part of it stays in the field"
        return FieldMap(np.where(mask, ppm * rad_per_s, np.float32(0)), notes=[note])
    require_different(phase)
    growth = unwrap(wrap(phase[1] - phase[0]), mask, magnitude[0], phase[0])
    even, notes, facts = None, [], {}
    if len(times) == 2:
        notes.append("two echoes do not tell whether the readout was bipolar; it must not be")
    else:
        even = even_echo_offset(phase, magnitude, times, growth, mask)
    if even is not None:
        growth -= even
        facts["even_echoes_off_rad"] = size = float(np.abs(even[mask]).mean())
        notes.append(f"bipolar readout: even echoes {size:.2f} rad off, corrected by a plane")
    rad_per_s = growth / (times[1] - times[0])
    raw = wrap(phase[0] - rad_per_s * times[0])
    initial = initial_phase(raw, magnitude[0], mask, echoes.geometry.voxel_size_mm)
    require_agreement(
        wrap(raw - initial), mask, "echo 2 contradicts echo 1 at the time of excitation"
    )
    phase = phase - initial
    if even is not None:
        phase[1::2] -= even
    rad_per_s = _mean_over_echoes(phase, magnitude, times, rad_per_s)
    noise, misfit, found = _noise(phase, magnitude, times, rad_per_s, mask)
    total, noise_ppm, misfit = (
        np.where(mask, part, np.float32(0)) for part in (ppm * rad_per_s, ppm * noise, misfit)
    )
    return FieldMap(total, noise_ppm, misfit, facts | found, notes)


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


def _noise(
    phase_rad: Volume, magnitude: Volume, times: Volume, rad_per_s: Volume, mask: Mask
) -> tuple[Volume, Volume, dict[str, float]]:
    """Return the noise [rad/s] of an angular frequency, the misfit over it, and the signal's noise.

    The noise of the signal is told from what the echoes leave: its root mean square is, with
    n - 1 degrees of freedom, that of a chi distribution in every voxel.
    """
    across, around, precision = (np.zeros_like(rad_per_s) for _ in range(3))
    for phase, signal, time in zip(phase_rad, magnitude, times, strict=True):
        rest = phase - rad_per_s * time
        across += (signal * np.sin(rest)) ** 2
        around += (2 * signal * np.sin(rest / 2)) ** 2
        precision += (signal * time) ** 2
    degrees = len(times) - 1
    sigma = np.float32(np.median(np.sqrt(across[mask])) / chi.median(degrees))
    tiny = np.finfo(np.float32).tiny
    noise: Volume = sigma / np.sqrt(np.maximum(precision, tiny))
    misfit: Volume = np.sqrt(around / len(times)) / np.maximum(sigma, tiny)
    signal = float(magnitude[0][mask].mean())
    found = {"sigma": float(sigma), "snr": signal / max(float(sigma), float(tiny))}
    return noise, misfit, found
