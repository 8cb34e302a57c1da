"""Whether echoes agree, and what those that were read out in the other direction are off by."""

import itertools

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.local_field.unwrapping import TURN, wrap

NOTICEABLE_RAD = 0.1  # mean size of an offset; eddy currents of a unipolar readout stay below
# medians of what is left where echoes agree: little, or no more than noise makes of neighbours
AGREE_RAD, MOST_OF_NOISE, MOST_RAD = 0.25, 1.5, 1.0
AGREE_AT_EXCITATION_RAD = 0.15  # what a polynomial leaves, which explains much that is wrong
FITS = 3


def require_different(phase_rad: Volume) -> None:
    """Refuse an echo that is there twice.

    Parameters
    ----------
    phase_rad
        (n, x, y, z) phase of n echoes.

    Raises
    ------
    DataError
        If two in a row are the same.
    """
    for n, (one, other) in enumerate(itertools.pairwise(phase_rad)):
        if np.array_equal(one, other):
            raise DataError(f"echoes {n + 1} and {n + 2} hold the same phase; give each its own")


def require_agreement(
    rest_rad: Volume,
    mask: Mask,
    what: str,
    agree_rad: float = AGREE_RAD,
    most_rad: float = MOST_RAD,
) -> None:
    """Refuse echoes of which something other than noise is left.

    Parameters
    ----------
    rest_rad
        (x, y, z) wrapped phase without everything that explains it.
    mask
        (x, y, z) bool, not empty.
    what
        Of the echoes, for the message.
    agree_rad, most_rad
        Median that is left at most, if noise does not explain more, and whatever explains it.

    Raises
    ------
    DataError
        If half of the mask is far off, and neighbours are less so.
    """
    left = float(np.median(np.abs(rest_rad[mask])))
    steps = np.concatenate(
        [wrap(np.diff(rest_rad, axis=axis))[_both(mask, axis)] for axis in range(3)]
    )
    noise = float(np.median(np.abs(steps))) / np.sqrt(2) if steps.size else left
    if left > most_rad or left > max(agree_rad, MOST_OF_NOISE * noise):
        raise DataError(
            f"{what}: half of the mask is {left:.2f} rad and more off, neighbours "
            f"{noise:.2f}; check scale, sign and echo time of each, and the mask"
        )


def even_echo_offset(
    phase_rad: Volume, magnitude: Volume, times: Volume, growth: Volume, mask: Mask
) -> tuple[Volume, bool]:
    """Return the plane that even echoes are off by, and whether it is more than little.

    With ``growth = w (t2 - t1) + offset`` the third echo, extrapolated from the first two, is off
    by ``-ratio offset``. That tells the offset but for turns over the ratio, which a fourth echo
    tells.

    Parameters
    ----------
    phase_rad, magnitude
        (n, x, y, z) of three echoes or more.
    times
        Of each.
    growth
        (x, y, z) unwrapped phase between the first two.
    mask
        (x, y, z) bool, not empty.

    Raises
    ------
    DataError
        If the third echo contradicts the first two.
    """
    ratios = (times - times[0]) / (times[1] - times[0])
    ratio = ratios[2]
    excess = wrap(phase_rad[2] - phase_rad[0] - ratio * growth)
    plane = plane_in(excess, magnitude[2] * mask, mask)
    require_agreement(wrap(excess - plane), mask, "echo 3 contradicts echoes 1 and 2")
    offsets = [-(plane + turns * TURN) / ratio for turns in (0, 1, -1)]
    if len(times) > 3:
        seen = phase_rad[3] - phase_rad[0] - ratios[3] * growth
        misfits = [
            float(np.median(np.abs(wrap(seen - (1 - ratios[3]) * offset)[mask])))
            for offset in offsets
        ]
        if min(misfits) < misfits[0] / 2:
            offsets.insert(0, offsets[int(np.argmin(misfits))])
    offset = offsets[0]
    return offset, float(np.abs(offset[mask]).mean() * ratio) > NOTICEABLE_RAD


def plane_in(phase_rad: Volume, weight: Volume, mask: Mask) -> Volume:
    """Return the plane that fits a wrapped phase best.

    Parameters
    ----------
    phase_rad
        (x, y, z).
    weight
        (x, y, z), 0 outside the mask.
    mask
        (x, y, z) bool, not empty.
    """
    at = [
        np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, n in enumerate(mask.shape)
    ]
    plane = np.zeros_like(phase_rad)
    for axis in range(3):
        plane = plane + _slope(phase_rad, weight, axis) * (mask.shape[axis] - 1) / 2 * at[axis]
    columns = np.stack(
        [np.broadcast_to(c, mask.shape)[mask] for c in (np.ones((1, 1, 1), np.float32), *at)]
    )
    weighted = columns * weight[mask]
    for _ in range(FITS):
        rest = wrap(phase_rad - plane)
        centre = _direction(rest, weight)
        rest = wrap(rest - centre)[mask]
        one, *slopes = np.linalg.lstsq(weighted @ columns.T, weighted @ rest, rcond=None)[0]
        plane = plane + np.float32(centre + one)
        for slope, position in zip(slopes, at, strict=True):
            plane += np.float32(slope) * position
    return plane


def _both(mask: Mask, axis: int) -> Mask:
    """Return which pairs of neighbours along an axis lie in a mask."""
    moved = np.moveaxis(mask, axis, 0)
    both: Mask = np.moveaxis(moved[1:] & moved[:-1], 0, axis)
    return both


def _slope(phase_rad: Volume, weight: Volume, axis: int) -> float:
    """Return the mean step from voxel to voxel along an axis."""
    phase, signal = np.moveaxis(phase_rad, axis, 0), np.moveaxis(weight, axis, 0)
    return _direction(phase[1:] - phase[:-1], signal[1:] * signal[:-1])


def _direction(phase_rad: Volume, weight: Volume) -> float:
    """Return the angle of the mean direction."""
    real, imaginary = ((weight * part(phase_rad)).sum() for part in (np.cos, np.sin))
    return float(np.arctan2(imaginary, real))
