"""One step from a network's map towards the measured field, on the whole volume.

``chi = argmin |M (D chi - f)|^2 + lam |M (chi - chi_net)|^2``. Dipole inversion is not local, so
what a network loses first when it runs in patches is slow drift; this brings back what the field
says of it, least along the magic cone, where the field says nothing. As lam falls the map becomes
Tikhonov's, noise included.
"""

from collections.abc import Callable

import numpy as np

from qsm_deploy.kernels.dipole import dipole_filter, require_lam, tikhonov
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.inversion.grid import SUPPORT_MM
from qsm_deploy.kernels.inversion.least_squares import Fit, masked_least_squares


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
    mask: Mask,
    geometry: Geometry,
    *,
    lam: float,
    iterations: int,
    support_mm: float = SUPPORT_MM,
    done: Callable[[], object] = lambda: None,
) -> tuple[Volume, Fit]:
    """Return the map after some conjugate-gradient steps from the network's, M the mask.

    The field outside the mask is unknown, not zero; the closed form gets that wrong. Sources just
    outside the mask are sought too, free of any weight: they take up what background removal left
    behind, which the map would have to explain otherwise. It holds those inside. Parameters as in
    :func:`data_consistency`.

    Parameters
    ----------
    mask
        (x, y, z) bool, True where the field was measured.
    iterations
        Number of steps at most, positive.
    support_mm
        How far outside the mask sources are sought, not negative [mm].
    done
        Called after each step.

    Returns
    -------
    (x, y, z) float32 array, Fit
        Susceptibility [ppm], 0 outside the mask, and how well it fits with those outside.

    Raises
    ------
    UsageError
        If ``lam`` is not positive and finite, or ``iterations`` not positive.
    GeometryError
        If a volume is not of that grid.
    DataError
        If the mask is empty.
    """
    require_lam(lam)
    return masked_least_squares(
        [local_field_ppm],
        [mask],
        [geometry.b0_direction],
        geometry,
        start_ppm=chi_ppm,
        lam=lam,
        iterations=iterations,
        support_mm=support_mm,
        done=done,
    )
