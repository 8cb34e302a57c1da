"""What lies inside a mask, by one rule for every file, image and array that is given as one."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask

ROUNDING = 1e-3  # that interpolation may leave a probability outside of 0 to 1
HALF = 0.5  # a probability above it is inside
SOFT_VALUES = 16  # whole numbers, most of them the largest: probabilities in per cent or bytes
MOST_LABELS = 256  # an image has more values, an atlas hardly
USUAL_SHARE = 0.6  # of a volume; more than this is no brain


def mask_from_values(values: NDArray[Any], name: str) -> tuple[Mask, list[str]]:
    """Return where a mask is inside, and notes.

    Of whole numbers all above zero are inside: masks, labels, and masks with -1 outside. Of
    probabilities from 0 to 1 those above a half are.

    Parameters
    ----------
    values
        (x, y, z), of any real type.
    name
        Of the mask, for messages.

    Raises
    ------
    DataError
        If it holds NaN or Inf, nothing is inside, or it is an image or a field and no mask.
    """
    if values.dtype == bool:
        return _judged(values.astype(bool), name)
    if bad := int(np.count_nonzero(~np.isfinite(values))):
        raise DataError(f"{name}: {bad} voxels of the mask are NaN or Inf; use 0 and 1")
    low, high = float(values.min()), float(values.max())
    if low == high == 0:
        return _judged(values != 0, name)
    if np.array_equal(values, np.rint(values)):
        found = np.unique(values)
        if np.count_nonzero(found < 0) > 1 or found.size > MOST_LABELS:
            raise _no_mask(name, f"{found.size} whole numbers from {low:g} to {high:g}")
        if found.size >= SOFT_VALUES and low == 0 and np.mean(values[values > 0] == high) > HALF:
            note = f"{name}: {_list(found)}, most of them {high:g}; above {high / 2:g} is inside"
            return _judged(values > high / 2, name, [note])
        usual = found.size == 1 or (found.size == 2 and found[0] == 0)
        notes = [] if usual else [f"{name}: {_list(found)}; above 0 is inside"]
        return _judged(values > 0, name, notes)
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise _no_mask(name, f"fractions from {low:.4g} to {high:.4g}")
    note = f"{name}: fractions from {low:.4g} to {high:.4g}; above {HALF:g} is inside"
    return _judged(values > HALF, name, [note])


def _share_note(mask: Mask, name: str) -> list[str]:
    """Return a note where more of the volume is inside than a brain fills."""
    share = float(mask.mean())
    if share <= USUAL_SHARE:
        return []
    return [f"{name}: {100 * share:.0f} % of the volume is inside; is it a mask of the brain?"]


def _judged(mask: Mask, name: str, notes: list[str] | None = None) -> tuple[Mask, list[str]]:
    if not mask.any():
        raise DataError(
            f"{name}: the mask is empty, nothing is above 0 (above {HALF:g} for fractions); pass "
            "one that is 1 inside the brain"
        )
    if notes:
        notes = [f"{notes[0]}, {100 * mask.mean():.0f} % of the volume"]
    return mask, (notes or []) + _share_note(mask, name)


def _no_mask(name: str, seen: str) -> DataError:
    return DataError(
        f"{name}: {seen}: a field or an image, not a mask; pass one that is 1 inside the brain and "
        "0 outside"
    )


def _list(found: NDArray[Any]) -> str:
    values = ", ".join(f"{v:g}" for v in found[:4])
    return f"values {values}" + (f" ... {found[-1]:g}" if found.size > 4 else "")
