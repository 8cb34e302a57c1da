"""One step from a network's map towards the measured field, on the whole volume.

``chi = argmin |M (D chi - f)|^2 + lam |chi - chi_net|^2``. Dipole inversion is not local, so what a
network loses first when it runs in patches is slow drift; this brings back what the field says of
it, least along the magic cone, where the field says nothing. As lam falls the map becomes
Tikhonov's, noise included.
"""

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.dipole import dipole_convolve, dipole_filter, require_lam, tikhonov
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry, Volume

ROUNDING = 1e-6  # a residual this much smaller than the first is solved in float32


def data_consistency(
    chi_ppm: Volume,
    local_field_ppm: Volume,
    geometry: Geometry,
    *,
    lam: float,
    pad_voxels: int = 0,
) -> Volume:
    """Return the minimiser with M = 1, ``F^-1 [(D F f + lam F chi) / (D^2 + lam)]``.

    Parameters
    ----------
    chi_ppm
        (x, y, z) map of a network [ppm].
    local_field_ppm
        (x, y, z) field that was measured [ppm].
    geometry
        The grid of both.
    lam
        Weight of the map against the field, positive.
    pad_voxels
        Zeros added on both sides of each axis before the transforms.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], not masked.

    Raises
    ------
    UsageError
        If ``lam`` is not positive and finite.
    GeometryError
        If a volume is not of that grid.
    """
    require_lam(lam)
    weight = np.float32(lam)
    chi = dipole_filter(
        chi_ppm, geometry, lambda d: weight / (d * d + weight), pad_voxels=pad_voxels
    )
    chi += tikhonov(local_field_ppm, geometry, lam=lam, pad_voxels=pad_voxels)
    return chi


def masked_data_consistency(
    chi_ppm: Volume,
    local_field_ppm: Volume,
    mask: NDArray[np.bool_],
    geometry: Geometry,
    *,
    lam: float,
    iterations: int,
    pad_voxels: int = 0,
) -> Volume:
    """Return the map after some conjugate-gradient steps from the network's, M the mask.

    The field outside the mask is unknown, not zero, and a local field has no sources there; the
    closed form gets both wrong. So the map is sought inside the mask: left free outside, it
    explains noise by sources that no one sees. Parameters as in :func:`data_consistency`.

    Parameters
    ----------
    mask
        (x, y, z) bool, True where the field was measured and its sources lie.
    iterations
        Number of steps at most, positive.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], 0 outside the mask.

    Raises
    ------
    UsageError
        If ``lam`` is not positive and finite, or ``iterations`` not positive.
    GeometryError
        If a volume is not of that grid.
    """
    require_lam(lam)
    weight = np.float32(lam)
    if iterations < 1:
        raise UsageError(f"the number of iterations must be positive, got {iterations}")

    def masked_dipole(x: Volume) -> Volume:
        return mask * dipole_convolve(x, geometry, pad_voxels=pad_voxels)

    chi = mask * chi_ppm
    r = masked_dipole(mask * local_field_ppm - masked_dipole(chi))
    direction = r.copy()
    squared = first = float(np.vdot(r, r))
    for _ in range(iterations):
        if squared <= ROUNDING**2 * first:
            break
        image = masked_dipole(masked_dipole(direction))
        image += weight * direction
        length = np.float32(squared / float(np.vdot(direction, image)))
        chi += length * direction
        r -= length * image
        before, squared = squared, float(np.vdot(r, r))
        direction *= np.float32(squared / before)
        direction += r
    return chi
