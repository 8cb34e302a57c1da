"""Maps of the whole volume that a network starts from.

Total variation gives three: its map, the field without what its sources outside the mask explain,
and what of that its map leaves. TKD of any of these fields, iterated, gives others.
"""

from collections.abc import Callable

import numpy as np

from qsm_deploy.kernels.dipole import dipole_convolve, tkd
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.inversion.total_variation import solved


def iterated_tkd(
    field_ppm: Volume, mask: Mask, geometry: Geometry, *, threshold: float, steps: int
) -> Volume:
    """Return ``x`` after so many steps of ``x += M TKD(M (f - D x))`` from zero.

    The first is a masked TKD map; those after it take up what it does not explain.

    Parameters
    ----------
    field_ppm
        (x, y, z) local field [ppm], 0 outside the mask, on a periodic grid.
    mask
        (x, y, z) bool.
    geometry
        The grid of both.
    threshold
        Smallest |D| divided by, in (0, 2/3].
    steps
        Number of them, positive.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], 0 outside the mask.
    """
    chi = tkd(field_ppm, geometry, threshold=threshold)
    chi *= mask
    for _ in range(steps - 1):
        left = field_ppm - dipole_convolve(chi, geometry)
        left *= mask
        more = tkd(left, geometry, threshold=threshold)
        more *= mask
        chi += more
    return chi


def anchored(
    chi_ppm: Volume, prior_ppm: Volume, mask: Mask, geometry: Geometry, *, threshold: float
) -> Volume:
    """Return a map that keeps what another one has next to the magic cone.

    It is ``p + M (D TKD)^2 M (y - p)``: of what changes, ``min(1, |D| / threshold)^2`` is left.

    Parameters
    ----------
    chi_ppm, prior_ppm
        (x, y, z) y and p [ppm], 0 outside the mask, on a periodic grid.
    mask
        (x, y, z) bool.
    geometry
        The grid of all.
    threshold
        The |D| from which on everything changes, in (0, 2/3].
    """
    change = chi_ppm - prior_ppm
    for _ in range(2):
        change = dipole_convolve(tkd(change, geometry, threshold=threshold), geometry)
    change *= mask
    change += prior_ppm
    return change


def variation_maps(
    field_ppm: Volume,
    mask: Mask,
    geometry: Geometry,
    *,
    alpha_ppm_mm: float,
    iterations: int,
    done: Callable[[], object] = lambda: None,
) -> tuple[Volume, Volume, Volume]:
    """Return the map of total variation, the field of its inner sources and more, and that more.

    With ``x`` its sources, ``x_in = M x``, these are ``x_in``, ``M (f - D (x - x_in))`` and
    ``M (f - D x)``.

    Parameters
    ----------
    field_ppm, mask, geometry, alpha_ppm_mm, iterations, done
        As :func:`..total_variation.total_variation` takes them.

    Returns
    -------
    (x, y, z) float32 arrays
        Susceptibility, field and residual [ppm], 0 outside the mask.
    """
    grid, solver = solved(
        field_ppm,
        mask,
        geometry,
        alpha_ppm_mm=alpha_ppm_mm,
        iterations=iterations,
        done=done,
    )
    inside, chi, field, residual = solver.mask, solver.x, solver.field_ppm, solver.predicted_ppm
    del solver  # the iteration's volumes, which are most of the memory
    np.subtract(field, residual, out=residual)
    residual *= inside
    chi *= inside
    field = dipole_convolve(chi, grid.geometry)
    field *= inside
    field += residual
    return grid.restore(chi), grid.restore(field), grid.restore(residual)
