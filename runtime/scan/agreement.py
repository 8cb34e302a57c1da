"""How well two sets of samples agree: the line through them and the error in per cent."""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError

Samples = NDArray[np.float64]


def linear_fit(x: Samples, y: Samples) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line ``y = slope x + intercept``.

    The slope is 0 where ``x`` is constant and so determines none.
    """
    slope = 0.0
    if varies(x):
        centred = x - x.mean()
        slope = float(centred @ y / (centred @ centred))
    return slope, float(y.mean() - slope * x.mean())


def nrmse_percent(r: Samples, t: Samples) -> float:
    """Return ``100 ||r - t|| / ||t||`` after both were demeaned.

    Raises
    ------
    DataError
        If ``t`` is constant.
    """
    require_variation(t)
    t = t - t.mean()
    return float(100 * np.linalg.norm(r - r.mean() - t) / np.linalg.norm(t))


def detrended_nrmse_percent(r: Samples, t: Samples) -> float:
    """Return the NRMSE of ``(r - i) / s``, with ``r = s t + i`` fitted by least squares.

    It does not depend on scale (of either sign) and offset of ``r``. A constant ``r`` has no
    slope to divide by and gets its plain NRMSE, 100 %.

    Raises
    ------
    DataError
        If ``t`` is constant.
    """
    slope, intercept = linear_fit(t, r)
    if slope == 0 or not varies(r):
        return nrmse_percent(r, t)
    return nrmse_percent((r - intercept) / slope, t)


def varies(samples: Samples) -> bool:
    """Tell whether at least two samples differ."""
    return samples.size > 1 and bool(samples.min() < samples.max())


def require_variation(t: Samples) -> None:
    """Refuse a constant truth, to which no error is relative.

    Raises
    ------
    DataError
        If all samples are equal.
    """
    if not varies(t):
        raise DataError(
            f"the truth is constant ({t.mean():.4g} ppm, {t.size} voxels) where it is compared, "
            "expected one that varies; check the truth and the mask"
        )
