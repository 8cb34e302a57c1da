"""Range collectors: how far INT8 reaches, from the histogram of a tensor's magnitudes.

What lies beyond the range is clipped to it; a smaller range has finer steps for all the rest.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.calibration.int8.histogram import Histogram
from qsm_deploy.kernels.errors import DataError

LEVELS = 128
Collector = Literal["max", "percentile-99.9", "percentile-99.99", "entropy", "mse"]
CANDIDATES = 200  # ranges that mse compares
SMALLEST = 1e-12  # probability where clipping leaves none
STRIDE = 16  # bins from one range that entropy compares to the next
Counts = NDArray[np.float64]


def collect_range(histogram: Histogram, collector: Collector) -> float:
    """Return the range ``amax`` of a symmetric INT8 tensor, positive.

    Parameters
    ----------
    histogram
        Of the tensor's magnitudes.
    collector
        ``max``; a percentile of all values; ``entropy``: the least Kullback-Leibler divergence
        between the magnitudes that occur and those that INT8 knows; ``mse``: the least mean
        squared error of rounding and clipping.

    Raises
    ------
    DataError
        If nothing but zeros was seen.
    """
    if not histogram.largest > 0:
        raise DataError(
            "a layer of this network returns nothing but zeros on the calibration data; pass maps "
            "of whole heads"
        )
    return min(_COLLECTORS[collector](histogram), histogram.largest)


def _percentile(percent: float) -> Callable[[Histogram], float]:
    def found(histogram: Histogram) -> float:
        below = histogram.zeros + np.cumsum(histogram.counts)
        at = int(np.searchsorted(below, percent / 100 * histogram.total))
        return float((at + 1) * histogram.width)

    return found


def _mse(histogram: Histogram) -> float:
    x, counts = histogram.centres, histogram.counts.astype(np.float64)
    amax = histogram.largest * np.linspace(1, 0, CANDIDATES, endpoint=False)
    errors = [_squared_error(x, counts, float(a)) for a in amax]
    return float(amax[int(np.argmin(errors))])


def _squared_error(x: Counts, counts: Counts, amax: float) -> float:
    """Return the sum of squares of rounding and clipping, bins being finer than steps or not."""
    step = amax / (LEVELS - 1)
    error = np.full(x.shape, step**2 / 12)
    error = np.where(x < step / 2, x**2, error)
    error = np.where(x > amax, (x - amax) ** 2, error)
    return float(counts @ error)


def _entropy(histogram: Histogram) -> float:
    counts = histogram.counts.astype(np.float64)
    last = int(np.flatnonzero(counts)[-1]) + 1
    ends: list[int] = [*range(min(LEVELS, last), last, STRIDE), last]
    divergences = [_divergence(counts, end) for end in ends]
    return ends[int(np.argmin(divergences))] * histogram.width


def _divergence(counts: Counts, end: int) -> float:
    """Return the divergence of what 128 levels below a bin know of the magnitudes."""
    reference = counts[:end].copy()
    reference[-1] += counts[end:].sum()
    level = np.arange(end) * LEVELS // end
    occupied = counts[:end] > 0
    sums = np.bincount(level, weights=counts[:end], minlength=LEVELS)
    bins = np.bincount(level, weights=occupied, minlength=LEVELS)
    spread = np.where(occupied, (sums / np.maximum(bins, 1))[level], 0.0)
    if not spread.any():
        return np.inf
    p, q = reference / reference.sum(), spread / spread.sum()
    inside = p > 0
    ratio = np.log(p[inside] / np.maximum(q[inside], SMALLEST))
    return float(np.sum(p[inside] * ratio))


_COLLECTORS: Mapping[Collector, Callable[[Histogram], float]] = {
    "max": lambda histogram: histogram.largest,
    "percentile-99.9": _percentile(99.9),
    "percentile-99.99": _percentile(99.99),
    "entropy": _entropy,
    "mse": _mse,
}
