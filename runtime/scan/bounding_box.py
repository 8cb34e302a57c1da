"""The smallest box of a grid that holds a mask."""

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError

Box = tuple[slice, slice, slice]


def bounding_box(mask: NDArray[np.bool_], *, margin: int = 0) -> Box:
    """Return the smallest box around a mask, grown and clipped to the grid.

    Parameters
    ----------
    mask
        (x, y, z) bool, True inside.
    margin
        Voxels added on both sides of each axis, as far as the grid reaches.

    Returns
    -------
    three slices
        Index of the box: ``volume[bounding_box(mask)]``.

    Raises
    ------
    DataError
        If the mask is empty.
    """
    found = scipy.ndimage.find_objects(mask.view(np.uint8), max_label=1)
    if found[0] is None:
        raise DataError("the mask is empty; pass one that is non-zero inside the brain")
    x, y, z = (
        slice(max(0, side.start - margin), min(n, side.stop + margin))
        for side, n in zip(found[0], mask.shape, strict=True)
    )
    return x, y, z
