"""Even echoes that were read out in the other direction: what they are off by, linear in space."""

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.local_field.unwrapping import wrap

NOTICEABLE_RAD = 0.1  # mean size of the offset; eddy currents of a unipolar readout stay below
CONTRADICTION_RAD = 0.7  # median of what is left: 0.5 at a signal of three times the noise, else less
FITS = 3


def even_echo_offset(excess_rad: Volume, magnitude: Volume, mask: Mask) -> Volume | None:
    """Return the plane that lies in a wrapped phase, if it is more than little.

    Parameters
    ----------
    excess_rad
        (x, y, z) phase of an odd echo without what an odd and an even one before it predict.
    magnitude
        (x, y, z) signal of that echo.
    mask
        (x, y, z) bool, not empty.

    Raises
    ------
    DataError
        If the excess is no plane: the echoes contradict each other.
    """
    weight = magnitude * mask
    at = [
        np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, n in enumerate(mask.shape)
    ]
    plane = np.zeros_like(excess_rad)
    for axis in range(3):
        plane = plane + _slope(excess_rad, weight, axis) * (mask.shape[axis] - 1) / 2 * at[axis]
    for _ in range(FITS):
        rest = wrap(excess_rad - plane)
        centre = _direction(rest, weight)
        rest = wrap(rest - centre)
        columns = np.stack(
            [np.broadcast_to(c, mask.shape)[mask] for c in (np.ones((1, 1, 1), np.float32), *at)]
        )
        weights = weight[mask]
        normal = (columns * weights) @ columns.T
        one, *slopes = np.linalg.lstsq(normal, (columns * weights) @ rest[mask], rcond=None)[0]
        plane = plane + np.float32(centre + one)
        for slope, position in zip(slopes, at, strict=True):
            plane += np.float32(slope) * position
    left = float(np.median(np.abs(wrap(excess_rad - plane)[mask])))
    if left > CONTRADICTION_RAD:
        raise DataError(
            f"echo 3 contradicts echoes 1 and 2: half of the mask is {left:.1f} rad and more off "
            "what they predict; check scale, sign and echo time of each, and the mask"
        )
    return plane if float(np.abs(plane[mask]).mean()) > NOTICEABLE_RAD else None


def _slope(phase_rad: Volume, weight: Volume, axis: int) -> float:
    """Return the mean step from voxel to voxel along an axis."""
    phase, signal = np.moveaxis(phase_rad, axis, 0), np.moveaxis(weight, axis, 0)
    return _direction(phase[1:] - phase[:-1], signal[1:] * signal[:-1])


def _direction(phase_rad: Volume, weight: Volume) -> float:
    """Return the angle of the mean direction."""
    return float(np.arctan2((weight * np.sin(phase_rad)).sum(), (weight * np.cos(phase_rad)).sum()))
