"""What a scanner measures of a phantom, for tests of what is made of it."""

import math

import numpy as np

from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.local_field.echoes import Echoes

GEOMETRY = Geometry((64, 72, 64), (2.4, 2.4, 2.4), (0.2, 0.1, 1.0))
TESLA, MEGAHERTZ_PER_TESLA = 3.0, 42.577
RAD_PER_S_PER_PPM = 2 * math.pi * MEGAHERTZ_PER_TESLA * TESLA
NOISE = 0.03  # of the signal, its real and imaginary part together
R2_STAR = 25.0


def axes_of(shape):
    """Return x, y and z from -1 to 1 across a grid."""
    return np.ix_(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape))


def echoes_of(
    field_ppm, mask, times_s, initial_rad=0.0, *, noise=NOISE, geometry=GEOMETRY, in_air=0.02
):
    """Return what a scanner would measure."""
    rng = np.random.default_rng(8)
    phase, magnitude = [], []
    for time in times_s:
        angle = initial_rad + RAD_PER_S_PER_PPM * time * field_ppm
        signal = np.where(mask, math.exp(-time * R2_STAR), in_air) * np.exp(1j * angle)
        parts = rng.standard_normal((2, *mask.shape)) * noise / math.sqrt(2)
        signal = signal + parts[0] + 1j * parts[1]
        phase.append(np.angle(signal).astype(np.float32))
        magnitude.append(np.abs(signal).astype(np.float32))
    return Echoes(np.stack(phase), np.stack(magnitude), times_s, TESLA, geometry)


def nrmse(result, truth, mask):
    """Return the error that is left of a field in a mask, but for a constant."""
    error = (result - truth)[mask]
    reference = truth[mask] - truth[mask].mean()
    return float(np.linalg.norm(error - error.mean()) / np.linalg.norm(reference))
