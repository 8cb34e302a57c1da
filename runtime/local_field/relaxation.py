"""R2*, the rate at which the signal of a gradient echo decays."""

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.local_field.echoes import Echoes

FEWEST_ECHOES = 3  # two have no noise to tell, and are off by all of it


def r2_star(echoes: Echoes, mask: Mask) -> Volume:
    """Return the decay of the magnitude, by a line through its logarithm.

    Echoes weigh as their signal squared, which is the precision of its logarithm.

    Parameters
    ----------
    echoes
        Three or more.
    mask
        (x, y, z) bool.

    Returns
    -------
    (x, y, z) float32 array
        [1/s], not negative; 0 outside the mask.

    Raises
    ------
    DataError
        If there are fewer echoes.
    """
    if len(echoes.echo_times_s) < FEWEST_ECHOES:
        raise DataError(
            f"R2* needs {FEWEST_ECHOES} echoes, got {len(echoes.echo_times_s)}; drop --r2star"
        )
    n, t, tt, y, ty = (np.zeros(mask.shape, dtype=np.float32) for _ in range(5))
    first = np.float32(echoes.echo_times_s[0])
    for time, magnitude in zip(echoes.echo_times_s, echoes.magnitude, strict=True):
        signal = np.asarray(magnitude, dtype=np.float32)
        since = np.float32(time) - first
        weight = np.where(mask, signal**2, np.float32(0))
        log = np.log(np.where(weight > 0, signal, np.float32(1)))
        n += weight
        t += weight * since
        tt += weight * since**2
        y += weight * log
        ty += weight * since * log
    spread = n * tt - t * t
    slope = np.divide(n * ty - t * y, spread, out=np.zeros_like(n), where=spread > 0)
    rate: Volume = np.maximum(-slope, np.float32(0))
    return rate
