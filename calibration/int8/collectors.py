"""Range collectors: how far INT8 reaches, from the histogram of a tensor's magnitudes.

What lies beyond the range is clipped to it; a smaller range has finer steps for all the rest. The
histogram is made in one pass, without knowing the largest magnitude beforehand.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError

BINS = 4096
LEVELS = 128
Collector = Literal["max", "percentile-99.9", "percentile-99.99", "entropy", "mse"]
CANDIDATES = 200  # ranges that mse compares
SMALLEST = 1e-12  # probability where clipping leaves none
STRIDE = 16  # bins from one range that entropy compares to the next
Counts = NDArray[np.float64]


class Histogram:
    """Counts of magnitudes in equal bins from 0.

    A larger value than before doubles the bins' width, which joins them in pairs. At least half
    of the bins lie below the largest value.

    Attributes
    ----------
    counts
        (4096,) how many magnitudes lie in each bin; zeros are not among them.
    zeros
        How many are exactly 0, as after a ReLU.
    width
        Of a bin.
    largest
        The largest magnitude.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.zeros = 0
        self.width = 0.0
        self.largest = 0.0

    @property
    def total(self) -> int:
        """How many values were added."""
        return int(self.counts.sum()) + self.zeros

    @property
    def centres(self) -> NDArray[np.float64]:
        """(4096,) the middle of every bin."""
        return np.linspace(0.5, BINS - 0.5, BINS) * self.width

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the magnitudes of finite values of any shape."""
        size = np.abs(values).ravel()
        largest = float(size.max(initial=0))
        self.largest = max(self.largest, largest)
        positive = size[size > 0]
        self.zeros += size.size - positive.size
        if not positive.size:
            return
        if self.width == 0:
            self.width = largest / BINS
        while largest > self.width * BINS:
            self.counts = np.append(self.counts.reshape(-1, 2).sum(axis=1), self._no_counts)
            self.width *= 2
        index = np.minimum(positive / np.float32(self.width), BINS - 1).astype(np.int64)
        self.counts += np.bincount(index, minlength=BINS)

    @property
    def _no_counts(self) -> NDArray[np.int64]:
        return np.zeros(BINS // 2, dtype=np.int64)


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
