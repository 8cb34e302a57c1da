"""COSMOS: one map from fields that were measured with the head in several orientations.

What one orientation lets nothing through of, near its magic cone, the others see. Weighting by the
masks and seeking sources just outside them too makes three orientations 25 degrees apart as good
as five in the closed form, and what background removal left behind does little harm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.fft

from qsm_deploy.kernels.dipole import dipole_kernel, half_dipole_kernel
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.inversion.grid import SUPPORT_MM, padded_box
from qsm_deploy.kernels.inversion.least_squares import Fit, Vector, masked_least_squares
from qsm_deploy.kernels.threads import workers

ITERATIONS, TOLERANCE = 10, 1e-2
SEEN = 0.01  # mean squared D below which a frequency is hardly seen by any orientation


@dataclass(frozen=True)
class Coverage:
    """How well orientations see all frequencies together.

    Attributes
    ----------
    weakest
        The least root mean square of D over the orientations.
    unseen
        Share of the frequencies whose mean squared D is below 0.01; above 5 % streaks stay.
    """

    weakest: float
    unseen: float


def cosmos(
    fields_ppm: Sequence[Volume],
    weights: Sequence[Volume | Mask],
    b0_directions: Sequence[Vector],
    geometry: Geometry,
    *,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    lam: float = 0.0,
    done: Callable[[], object] = lambda: None,
) -> tuple[Volume, Fit]:
    """Return ``argmin sum_i |W_i (D_i x - f_i)|^2 + lam |x|^2``, 0 outside the union of the masks.

    Parameters, returned values and errors are those of
    :func:`~qsm_deploy.kernels.inversion.least_squares.masked_least_squares`.

    References
    ----------
    Liu et al., Magn Reson Med 61:196-204 (2009), weighted and masked.
    """
    _require_several(b0_directions)
    return masked_least_squares(
        fields_ppm,
        weights,
        b0_directions,
        geometry,
        iterations=iterations,
        lam=lam,
        tolerance=tolerance,
        support_mm=SUPPORT_MM,
        done=done,
    )


def closed_form_cosmos(
    fields_ppm: Sequence[Volume],
    mask: Mask,
    b0_directions: Sequence[Vector],
    geometry: Geometry,
) -> Volume:
    """Return ``F^-1 [sum D_i F f_i / sum D_i^2]`` of fields that are taken to be 0 outside a mask.

    Parameters
    ----------
    fields_ppm
        (x, y, z) each [ppm].
    mask
        (x, y, z) bool, where all were measured.
    b0_directions
        Of each field, in voxel axes.
    geometry
        The grid.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], 0 outside the mask.

    Raises
    ------
    UsageError
        If there is only one field.

    References
    ----------
    Liu et al., Magn Reson Med 61:196-204 (2009), equation 8.
    """
    _require_several(b0_directions)
    grid = padded_box(mask, geometry)
    inside = grid.embed_mask(mask)
    shape = grid.geometry.shape
    numerator = np.zeros((*shape[:2], shape[2] // 2 + 1), np.complex64)
    denominator = np.zeros(numerator.shape, np.float32)
    for field, b in zip(fields_ppm, b0_directions, strict=True):
        kernel = half_dipole_kernel(replace(grid.geometry, b0_direction=b))
        f = grid.embed(field)
        f[~inside] = 0
        numerator += kernel * scipy.fft.rfftn(f, workers=workers())
        denominator += kernel * kernel
    numerator /= np.maximum(denominator, np.finfo(np.float32).tiny)
    chi: Volume = scipy.fft.irfftn(numerator, s=shape, workers=workers(), overwrite_x=True)
    chi *= inside
    return grid.restore(chi)


def coverage(b0_directions: Sequence[Vector], geometry: Geometry) -> Coverage:
    """Return how well orientations see the frequencies of a grid."""
    squared = np.zeros(geometry.shape, np.float32)
    for b in b0_directions:
        squared += dipole_kernel(replace(geometry, b0_direction=b)) ** 2
    mean = squared.ravel()[1:] / len(b0_directions)  # the zero frequency no field shows
    return Coverage(float(np.sqrt(mean.min())), float((mean < SEEN).mean()))


def _require_several(b0_directions: Sequence[Vector]) -> None:
    if len(b0_directions) < 2:
        raise UsageError(
            f"COSMOS needs two orientations or more, got {len(b0_directions)}; "
            "pass the field of each, or use another method"
        )
