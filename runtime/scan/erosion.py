"""Keeping off the edge of a mask, as some networks were trained to."""

from dataclasses import replace

import numpy as np
from scipy.ndimage import distance_transform_edt

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.scan.scan import Scan


def erode_mask(scan: Scan, radius_voxels: float) -> Scan:
    """Return a scan whose mask has lost all voxels within a radius of its outside.

    What was measured there stays, for the neighbours that look at it.

    Raises
    ------
    DataError
        If nothing is left.
    """
    # a frame of background: beyond the volume nothing was measured
    distance = distance_transform_edt(np.pad(scan.mask, 1))[1:-1, 1:-1, 1:-1]
    mask = distance > radius_voxels
    kept = np.count_nonzero(mask) / np.count_nonzero(scan.mask)
    if not mask.any():
        raise DataError(
            f"the network needs the mask eroded by {radius_voxels:g} voxels, which leaves nothing; "
            "pass a larger mask"
        )
    note = f"the mask was eroded by {radius_voxels:g} voxels, {100 * kept:.0f} % of it is left"
    return replace(scan, mask=mask, notes=[*scan.notes, note])
