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
from scipy.special import gammaincinv

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.local_field.agreement import (
    AGREE_AT_EXCITATION_RAD,
    even_echo_offset,
    require_agreement,
    require_different,
)
from qsm_deploy.runtime.local_field.echoes import Echoes
from qsm_deploy.runtime.local_field.initial_phase import followed, initial_phase
from qsm_deploy.runtime.local_field.unwrapping import TURN, unwrap, wrap
from qsm_deploy.runtime.scan.units import PPB_PER_PPM, ppm_per_unit

MOST_MISFIT, MOST_NOISE_PPM = 4.0, 0.010  # of a voxel whose field is to be believed
EXCESS = 1.5  # misfit that noise alone makes in 3 % of voxels
MOST_DOUBTFUL_PERCENT = 3.0
ROUNDING_RAD = math.tau / 4096 / math.sqrt(12)  # of a phase that scanners store
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class FieldMap:
    """A total field, and how far it may be believed.

    Attributes
    ----------
    field_ppm
        (x, y, z), 0 outside the mask; a constant is not determined.
    noise_ppm
        (x, y, z) standard deviation of its noise, more where the echoes leave more than that of the
        signal makes; 0 outside the mask. ``None`` with one echo, which tells none.
    misfit
        (x, y, z) root mean square of what the echoes leave, over the noise of the signal.
    facts
        For a report, numbers with their unit in the name: noise and ratio of the signal, of the
        field, share of doubtful voxels, what even echoes are off by.
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
        If an echo is there twice, or echoes contradict each other.

    References
    ----------
    Robinson et al., NMR Biomed 30:e3601 (2017), for the weights.
    """
    times = np.asarray(echoes.echo_times_s, dtype=np.float32)
    box = bounding_box(mask)
    inside = mask[box]
    phase = echoes.phase_rad[(..., *box)].astype(np.float32)  # a copy, which is changed below
    magnitude = np.asarray(echoes.magnitude[(..., *box)], dtype=np.float32)
    one_second = ppm_per_unit("hz", echo_time_s=None, field_strength_t=echoes.field_strength_t)
    ppm = np.float32(one_second / (2 * math.pi))  # of 1 rad/s

    def whole(part: Volume) -> Volume:
        volume = np.zeros(mask.shape, dtype=np.float32)
        volume[mask] = part[inside]
        return volume

    if len(times) == 1:
        rad_per_s = unwrap(phase[0], inside, magnitude[0]) / times[0]
        note = "one echo does not tell its initial phase: the smooth part of it stays in the field"
        return FieldMap(whole(ppm * rad_per_s), notes=[note])
    require_different(phase)
    growth = unwrap(wrap(phase[1] - phase[0]), inside, magnitude[0], phase[0])
    notes: list[str] = []
    facts: dict[str, Any] = {}
    if len(times) == 2:
        notes.append("two echoes do not tell whether the readout was bipolar; it must not be")
    else:
        even, bipolar = even_echo_offset(phase, magnitude, times, growth, inside)
        size = float(np.abs(even[inside]).mean())
        facts |= {"even_echoes_off_rad": size, "even_echoes_corrected": bipolar}
        if bipolar:
            growth -= even
            phase[1::2] -= even
            notes.append(f"bipolar readout: even echoes {size:.2f} rad off, corrected by a plane")
    rad_per_s = growth / (times[1] - times[0])
    raw = wrap(phase[0] - rad_per_s * times[0])
    seen = raw, magnitude[0], inside, echoes.geometry.voxel_size_mm
    initial = initial_phase(*seen)
    what = "echo 2 contradicts echo 1 at the time of excitation"
    require_agreement(wrap(raw - initial), inside, what, AGREE_AT_EXCITATION_RAD)
    initial, rough = followed(initial, *seen)
    initial[rough], precision = _line(
        phase[:, rough], magnitude[:, rough], times[:, None], raw[rough], rad_per_s[rough]
    )
    facts["initial_phase_rough_percent"] = share = 100 * float(rough.sum() / inside.sum())
    if share:
        notes.append(
            f"the phase at excitation is not smooth in {share:.1f} % of the mask, as at poles that "
            "combining coils leaves: each voxel tells its own there, with more noise"
        )
    phase -= initial
    rad_per_s, weight = _mean_over_echoes(phase, magnitude, times, rad_per_s, inside)
    weight[rough] = precision
    noise, misfit, sigma = _noise(phase, magnitude, times, rad_per_s, weight, inside)
    doubtful = _percent_over(MOST_MISFIT, misfit[inside])
    if doubtful > MOST_DOUBTFUL_PERCENT:
        notes.append(
            f"the echoes contradict each other in {doubtful:.0f} % of the mask, usually in less "
            "than 1, as after motion or with wrong echo times: check these, the mask and --quality"
        )
    noise *= ppm * np.maximum(1, misfit / EXCESS)
    ppb = PPB_PER_PPM * noise[inside]
    facts |= {
        "sigma": sigma,
        "snr": float(magnitude[0][inside].mean()) / sigma,
        "noise_median_ppb": float(np.median(ppb)),
        "noise_p95_ppb": float(np.percentile(ppb, 95)),
        f"noise_over_{PPB_PER_PPM * MOST_NOISE_PPM:g}_ppb_percent": _percent_over(
            MOST_NOISE_PPM, noise[inside]
        ),
        f"misfit_over_{MOST_MISFIT:g}_percent": doubtful,
    }
    return FieldMap(whole(ppm * rad_per_s), whole(noise), whole(misfit), facts, notes)


def _percent_over(most: float, values: Volume) -> float:
    return 100 * float(np.mean(values > most))


def _line(
    phase_rad: Volume, magnitude: Volume, times: Volume, initial: Volume, rad_per_s: Volume
) -> tuple[Volume, Volume]:
    """Return where the line through the echoes of each voxel starts, and its slope's precision.

    Arrays are (echoes, voxels), but for the first estimate of the line.
    """
    for n in range(2, len(times) + 1):
        time, weight = times[:n], np.maximum(magnitude[:n] ** 2, TINY)
        predicted = initial + rad_per_s * time
        unwrapped = phase_rad[:n] + TURN * np.rint((predicted - phase_rad[:n]) / TURN)
        share = weight / weight.sum(axis=0)
        mean_time = (share * time).sum(axis=0)
        spread = weight * (time - mean_time)
        precision = (spread * time).sum(axis=0)
        rad_per_s = (spread * unwrapped).sum(axis=0) / np.maximum(precision, TINY)
        initial = (share * unwrapped).sum(axis=0) - rad_per_s * mean_time
    return initial, precision


def _mean_over_echoes(
    phase_rad: Volume, magnitude: Volume, times: Volume, rad_per_s: Volume, mask: Mask
) -> tuple[Volume, Volume]:
    """Return the angular frequency from wrapped phases, and its weight, given a first estimate.

    Each echo in turn is unwrapped by what the earlier ones predict, which is better the more of
    them there are, and must agree with it. The weight is the precision where the noise of the
    signal is 1.
    """
    weights = np.zeros_like(rad_per_s)
    total = np.zeros_like(rad_per_s)
    for n, (phase, signal, time) in enumerate(zip(phase_rad, magnitude, times, strict=True)):
        rest = wrap(phase - rad_per_s * time)
        if n > 1:  # the first two made the estimate
            what = f"echo {n + 1} contradicts echoes 1 to {n}"
            require_agreement(rest, mask, what, most_rad=math.inf)
        unwrapped = rad_per_s * time + rest
        weight = (signal * time) ** 2
        total += weight * (unwrapped / time)
        weights += weight
        known = weights > 0
        np.divide(total, weights, out=rad_per_s, where=known)
    return rad_per_s, weights


def _noise(
    phase_rad: Volume,
    magnitude: Volume,
    times: Volume,
    rad_per_s: Volume,
    weight: Volume,
    mask: Mask,
) -> tuple[Volume, Volume, float]:
    """Return the noise [rad/s] of an angular frequency, the misfit over it, and the signal's noise.

    The noise of the signal is told from what the echoes leave: its root mean square is, with
    n - 1 degrees of freedom, that of a chi distribution in every voxel. No angular frequency is
    noisier than one of which the first two echoes tell nothing.
    """
    across, around = np.zeros_like(rad_per_s), np.zeros_like(rad_per_s)
    for phase, signal, time in zip(phase_rad, magnitude, times, strict=True):
        rest = phase - rad_per_s * time
        across += (signal * np.sin(rest)) ** 2
        around += (2 * signal * np.sin(rest / 2)) ** 2
    degrees = len(times) - 1
    median_of_chi = math.sqrt(2 * gammaincinv(degrees / 2, 0.5))
    left = float(np.median(np.sqrt(across[mask]))) / median_of_chi
    rounding = ROUNDING_RAD * float(magnitude[0][mask].mean())
    sigma = max(left, rounding, TINY)
    nothing = np.float32(TURN / math.sqrt(12) / (times[1] - times[0]))
    noise: Volume = (sigma / np.sqrt(np.maximum(weight, TINY))).astype(np.float32)
    misfit: Volume = (np.sqrt(around / len(times)) / sigma).astype(np.float32)
    return np.minimum(noise, nothing), misfit, sigma
