"""How often each magnitude occurs, in one pass and without knowing the largest beforehand."""

import numpy as np
from numpy.typing import NDArray

BINS = 4096


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
