"""Where a magnitude has edges, which cost nothing in the map (MEDI).

References
----------
Liu et al., Magn Reson Med 66:777-783 (2011).
"""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.inversion.gradients import gradient

EDGE_SHARE = 0.3  # of the differences along the axes, those of the mask's voxels


def edges_of_magnitude(magnitude: Volume, mask: Mask, geometry: Geometry) -> NDArray[np.bool_]:
    """Return where differences of the map are penalised, along each axis.

    Parameters
    ----------
    magnitude
        (x, y, z) signal, of any scale.
    mask
        (x, y, z) bool, True inside.
    geometry
        The grid of both.

    Returns
    -------
    (3, x, y, z) bool array
        False at the steepest differences of the magnitude in the mask, to the next voxel along each
        axis, 30 % of them at most.

    Raises
    ------
    DataError
        If the magnitude is the same everywhere.
    """
    if np.ptp(magnitude[mask]) == 0:
        raise DataError("the magnitude is the same everywhere in the mask; pass one with contrast")
    signal = np.where(mask, magnitude, np.float32(0))
    steep = np.stack([np.abs(gradient(signal, geometry, axis)) for axis in range(3)])
    both = np.stack([mask & np.roll(mask, -1, axis) for axis in range(3)])
    known = steep[both]
    penalised: NDArray[np.bool_] = ~both
    penalised[both] = known <= np.quantile(known, 1 - EDGE_SHARE) if known.size else True
    return penalised
