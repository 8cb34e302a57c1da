"""Susceptibility as whole ppb in int16, which takes less room than float32."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.scan.units import PPB_PER_PPM

MOST = 32767  # of int16, and of its negatives


def step_ppb(volumes_ppm: Iterable[Volume]) -> int:
    """Return the fewest ppb, at least 1, in whose multiples int16 holds all of some maps [ppm]."""
    largest_ppm = max(max(float(v.max()), -float(v.min())) for v in volumes_ppm)
    return max(1, math.ceil(PPB_PER_PPM * largest_ppm / MOST))


def step_note(step: int) -> str:
    """Return what to say of a map that needs a larger step than 1 ppb."""
    return (
        f"the map goes beyond {MOST / PPB_PER_PPM} ppm, the most of int16 in whole ppb: it is "
        f"stored in steps of {step} ppb; --out-dtype float32 keeps all of it"
    )


def in_steps(volume_ppm: Volume, step: int) -> NDArray[np.int16]:
    """Return the multiples of a step [ppb] that are nearest to a map [ppm]."""
    steps: Volume = volume_ppm * np.float32(PPB_PER_PPM / step)
    return np.rint(steps, out=steps).astype(np.int16)
