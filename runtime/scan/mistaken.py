"""What is handed over in place of a field or a truth by mistake, told from its values."""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError

MOST_LABELS = 64  # a field in whole ppb has more values
LARGEST_TRUTH_PPM = 10.0  # 99th percentile; of bone, calcification and blood it stays within 3
CHI = ("chi [", "susceptibility")  # in the header of maps that this package and others wrote


def refuse_other_than_field(values: NDArray[np.float32], description: str = "") -> None:
    """Refuse values that are no local field in any unit.

    Parameters
    ----------
    values
        (voxels,) inside the mask, finite.
    description
        Of the file's header.

    Raises
    ------
    DataError
        If they are a susceptibility map by the header, or look like a mask, labels or a magnitude.
    """
    if any(words in description.lower() for words in CHI):
        raise DataError(
            f"a susceptibility map by its header ({description!r}), not a field; pass the local "
            "field that it was made of"
        )
    if values.any() and (few := few_whole_numbers(values)):
        raise DataError(
            f"{few} different whole numbers inside the mask, as of a mask or labels; pass the "
            "local field as FIELD and the mask with -m"
        )
    low, high = float(values.min()), float(values.max())
    if low < high and not low < 0 < high:
        sign = "negative" if low >= 0 else "positive"
        raise DataError(
            f"nowhere {sign} inside the mask ({low:.4g} to {high:.4g}), as of a magnitude or of an "
            "offset; a local field has both signs, because its background was removed"
        )


def refuse_other_than_truth(values: NDArray[np.float32], flag: str = "--truth") -> None:
    """Refuse values that are no susceptibility [ppm].

    Parameters
    ----------
    values
        (voxels,) inside the mask, finite.
    flag
        What they were passed with.

    Raises
    ------
    DataError
        If they look like labels, or like another unit.
    """
    if (few := few_whole_numbers(values)) > 2:
        raise DataError(
            f"{few} different whole numbers inside the mask, as of labels; pass the "
            f"susceptibility [ppm] with {flag}, and regions with --labels"
        )
    p99 = float(np.percentile(np.abs(values), 99))
    if p99 > LARGEST_TRUTH_PPM:
        raise DataError(
            f"its 99th percentile is {p99:.3g}, too much for a susceptibility in ppm; is it in ppb?"
        )


def few_whole_numbers(values: NDArray[np.float32]) -> int:
    """Return how many different values there are if they are whole and few, else 0."""
    if not np.array_equal(values, np.rint(values)):
        return 0
    count = int(np.unique(values).size)
    return count if count <= MOST_LABELS else 0
