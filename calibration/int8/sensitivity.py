"""What one layer in INT8 does to its own output."""

import numpy as np
from numpy.typing import NDArray


def sqnr_db(exact: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Return signal power over that of the quantisation error [dB], infinite without an error."""
    signal = float(np.sum(np.square(exact, dtype=np.float64)))
    noise = float(np.sum(np.square(got.astype(np.float64) - exact)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.divide(signal, noise)))
