"""What background removal leaves behind."""

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

from qsm_deploy.calibration.phantom.phantom import dipole_field
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume

SHELL_VOXELS = 6.0  # its sources lie within, 1 to 5 from the mask
SMOOTH_VOXELS = 2.0  # standard deviation; finer sources would not be seen deeper than the edge


def residual_background(
    mask: Mask, geometry: Geometry, *, rms_ppm: float, rng: np.random.Generator
) -> Volume:
    """Return a field that is harmonic in the mask: that of random sources just outside it.

    Parameters
    ----------
    mask
        (x, y, z) bool.
    geometry
        The grid.
    rms_ppm
        Its root mean square in the mask.
    rng
        Draws the sources.

    Returns
    -------
    (x, y, z) float32 array
        Field [ppm], 0 outside the mask.
    """
    across = np.minimum(distance_transform_edt(~mask) / SHELL_VOXELS, 1)
    shell = np.sin(np.pi * across.astype(np.float32)) ** 2  # an edge would ring in the mask
    sources = gaussian_filter(rng.standard_normal(mask.shape, dtype=np.float32), SMOOTH_VOXELS)
    field = dipole_field(sources * shell, geometry) * mask
    field *= np.float32(rms_ppm / np.sqrt(np.mean(np.square(field[mask], dtype=float))))
    return field
