"""Where a volume jumps from one voxel to the next, as a wrapped phase does and no field."""

import math

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import UnitsError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.scan.axes import STORED, Axes

JUMP = 0.75  # of a turn; between neighbours a phase that is not wrapped steps by less than half
SURE_JUMP = 0.85  # of the range; less between neighbours in fields, lesions and vessels too
FEWEST_JUMPS = 10
JUMPING_SHARE = 1e-4  # of the voxels in the mask
SPREAD = 0.05  # of the range: median deviation of a phase; of fields 0.03 and less
UNRELATED = 0.2  # mean cosine of the step between neighbours: 0.95 and more in a head


def count_jumps(volume: Volume, least: float, mask: Mask) -> int:
    """Return how many pairs of neighbours in a mask differ by that much."""
    count = 0
    for axis in range(3):
        moved, inside = np.moveaxis(volume, axis, 0), np.moveaxis(mask, axis, 0)
        for n in range(len(moved) - 1):  # plane by plane, which takes little memory
            with np.errstate(invalid="ignore", over="ignore"):  # outside the mask may be anything
                jumps = np.abs(moved[n + 1] - moved[n]) >= least
            count += int(np.count_nonzero(jumps & inside[n] & inside[n + 1]))
    return count


def require_unwrapped(
    field: Volume, mask: Mask, turn: float | None, *, stated: bool = False
) -> None:
    """Refuse a wrapped phase that was given as a field.

    Parameters
    ----------
    field
        (x, y, z), in any unit.
    mask
        (x, y, z) bool, not empty; finite values inside.
    turn
        Of a phase in the field's unit, where it is one. Else the range of the values is taken
        for a turn, which a wrapped phase fills evenly.
    stated
        Whether somebody said that it is a field in a unit of its own: then values that do not fill
        their range are believed to be one, of a lesion with sharp edges.

    Raises
    ------
    UnitsError
        If neighbours differ by about a turn in more than some voxels.
    """
    values = field[mask]
    low, high = float(values.min()), float(values.max())
    span = high - low
    jump = JUMP
    if turn is None:
        turn = span
        with np.errstate(invalid="ignore", over="ignore"):  # a unit of its own is refused later
            even = np.median(np.abs(values - np.median(values))) >= SPREAD * span
        if stated and not even:
            return
        jump = JUMP if even else SURE_JUMP
    if turn == 0 or not JUMP * turn <= span <= 1.01 * turn:
        return
    jumps = count_jumps(field, jump * turn, mask)
    if jumps < max(FEWEST_JUMPS, JUMPING_SHARE * values.size * (jump == JUMP)):
        return
    raise UnitsError(
        f"the field jumps by about its whole range of {span:.4g} between neighbours, at {jumps} "
        "places in the mask: a wrapped phase, not a local field; make one of phase and magnitude "
        "with qsm-run --phase and --magnitude, or unwrap it and remove the background first"
        + ("; if it is a field, state its unit with --units" if jump == SURE_JUMP else "")
    )


def undo_half_turns(phase_rad: NDArray[np.float32], mask: Mask, axes: Axes = STORED) -> list[str]:
    """Correct slices that are half a turn off their neighbours, in place, and return notes.

    Images of a scanner that leaves its complex images unshifted along slices are like that.

    Parameters
    ----------
    phase_rad
        (n, x, y, z) wrapped phase of n echoes or orientations.
    mask
        (x, y, z) bool.
    axes
        How theirs are made of stored ones, which notes name.

    Raises
    ------
    UnitsError
        If neighbours in the first have nothing to do with each other.
    """
    notes = []
    for axis, stored in enumerate(axes.order):
        along = np.moveaxis(phase_rad, axis + 1, 1)
        alike = [_likeness(phase, np.moveaxis(mask, axis, 0)) for phase in along]
        if abs(alike[0]) < UNRELATED:
            raise UnitsError(
                f"neighbours along voxel axis {stored + 1} have unrelated phase (mean cosine of "
                f"the step {alike[0]:.2f} in the mask): noise, no phase at all, or read on a "
                "wrong scale; check the file, its scaling and the mask"
            )
        off = [n for n, cosine in enumerate(alike) if cosine < -UNRELATED]
        for n in off:
            along[n, 1::2] += np.float32(math.pi)
        if off:
            some = f" of echo {', '.join(str(n + 1) for n in off)}" * (len(off) < len(alike))
            notes.append(
                f"the phase of every second slice along voxel axis {stored + 1}{some} was half a "
                "turn off (complex images unshifted along slices, as of GE): corrected"
            )
    return notes


def _likeness(phase_rad: Volume, mask: Mask) -> float:
    """Return the mean cosine of the step between neighbouring planes, 1 if there are none."""
    total, count = 0.0, 0
    for n in range(len(phase_rad) - 1):
        inside = mask[n] & mask[n + 1]
        total += float(np.cos(phase_rad[n + 1][inside] - phase_rad[n][inside]).sum())
        count += int(np.count_nonzero(inside))
    return total / count if count else 1.0
