"""iLSQR as published: a least-squares map less the streaks that a fast map's edges do not explain.

It stops far from its solution and underestimates, so that its error is larger than that of TKD; it
is here because papers compare with it. On these symmetric systems LSQR's iterates are those of
conjugate gradients on the normal equations, which take half the memory and fewer transforms.
"""

from collections.abc import Callable

import numpy as np
import scipy.fft

from qsm_deploy.kernels.dipole import CONE
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.inversion.gradients import gradient, gradient_adjoint
from qsm_deploy.kernels.inversion.grid import grown, padded_box
from qsm_deploy.kernels.inversion.least_squares import (
    Array,
    Fit,
    Orientations,
    conjugate_gradients,
    multiplied,
)
from qsm_deploy.kernels.threads import workers

ITERATIONS = 50  # of either solution
DATA_PERCENTILES = (60.0, 99.9)  # of |Laplacian f|: full weight below, none above
GRADIENT_PERCENTILES = (50.0, 70.0)  # of |G x_fast|
CONE_POWER, CONE_PERCENTILES = 0.001, (1.0, 30.0)  # of |D|, smoothed below, kept above
BALL_MM = 3.0
TKD_THRESHOLD = 1 / 8
ILL_POSED = 0.1  # |D| below which streaks arise


def ilsqr(
    local_field_ppm: Volume,
    mask: Mask,
    geometry: Geometry,
    *,
    iterations: int = ITERATIONS,
    done: Callable[[], object] = lambda: None,
) -> tuple[Volume, Fit]:
    """Return the iLSQR map.

    Parameters
    ----------
    local_field_ppm
        (x, y, z) field [ppm]; what it holds outside the mask does not matter.
    mask
        (x, y, z) bool.
    geometry
        The grid of both.
    iterations
        At most, of the map and then of its streaks.
    done
        Called after each of them.

    Returns
    -------
    (x, y, z) float32 array, Fit
        Susceptibility [ppm], 0 outside the mask, and how well it fits.

    Raises
    ------
    DataError
        If the mask is empty.

    References
    ----------
    Li et al., NeuroImage 108:111-122 (2015).
    """
    grid = padded_box(mask, geometry)
    system = Orientations(grid, [geometry.b0_direction], [mask], grid.embed_mask(mask))
    (f,) = system.embedded([local_field_ppm])
    chi, taken, left = _least_squares(system, f, iterations, done)
    fast = _fast_map(system, f)
    del f
    squared = _flatness(system, fast)
    del fast
    streaks, more = _streaks(system, chi, squared, iterations, done)
    chi -= streaks
    chi *= system.support
    return grid.restore(chi), Fit(taken + more, left, system.residual(chi, [local_field_ppm]))


def _least_squares(
    system: Orientations, f: Volume, iterations: int, done: Callable[[], object]
) -> tuple[Volume, int, float]:
    """Solve ``D F w F^-1 D X = D F w f`` for X, w small where the field is rough."""
    (kernel,), mask = system.kernels, system.support
    w = _ramp(_laplacian_size(f, mask, system.grid.geometry), DATA_PERCENTILES, mask)
    w *= mask

    def weighted(x: Volume) -> Array:
        x *= w
        spectrum = _spectrum(x)
        return multiplied(spectrum, kernel, spectrum)

    def normal(spectrum: Array) -> Array:
        for _ in range(2):
            d = multiplied(spectrum, kernel, np.empty_like(spectrum))
            spectrum = weighted(system.image(d))
        return spectrum

    def inner(a: Array, b: Array) -> float:
        once = [0] if system.shape[2] % 2 else [0, -1]  # half of a spectrum stands for the whole
        return float(2 * np.vdot(a, b).real - sum(np.vdot(a[..., k], b[..., k]).real for k in once))

    b = weighted(f.copy())
    b = weighted(system.image(multiplied(b, kernel, b)))
    spectrum, taken, left = conjugate_gradients(
        normal, b, iterations=iterations, inner=inner, done=done
    )
    x = system.image(spectrum)
    x *= mask
    return x, taken, left


def _fast_map(system: Orientations, f: Volume) -> Volume:
    """Return ``sign(D) F f``, smoothed near the cone, with TKD's scale and offset."""
    (kernel,), mask = system.kernels, system.support
    size = np.abs(kernel)
    inverse = np.where(size < CONE, np.float32(0), np.sign(kernel))
    trust = _trust(size, system.grid.geometry)
    measured = _spectrum(f)
    spectrum = measured * inverse
    for _ in range(2):
        x = system.image(multiplied(spectrum, trust, spectrum))
        x *= mask
        spectrum = _spectrum(x)
    inverse /= np.maximum(size, np.float32(TKD_THRESHOLD))
    tkd = system.image(multiplied(measured, inverse, measured))[mask]
    seen = x[mask]
    offset = seen.mean(dtype=np.float64)
    variation = seen - offset
    scale = np.vdot(variation, tkd) / max(np.vdot(variation, variation), 1e-30)
    x -= np.float32(offset)
    x *= np.float32(scale)
    x += tkd.mean()
    x *= mask
    return x


def _trust(size: Volume, geometry: Geometry) -> Volume:
    """Return what multiplies a spectrum to smooth it where |D| is small."""
    low, high = np.percentile(size, CONE_PERCENTILES) ** CONE_POWER
    trust: Volume = ((size**CONE_POWER - low) / (high - low)).clip(0, 1).astype(np.float32)
    centre = np.zeros(geometry.shape, dtype=np.bool_)
    centre[0, 0, 0] = True
    ball = grown(centre, geometry, BALL_MM)
    smooth = _spectrum(ball.astype(np.float32)).real
    smooth /= np.float32(np.count_nonzero(ball))
    trust += (1 - trust) * smooth
    return trust


def _flatness(system: Orientations, fast: Volume) -> list[Volume]:
    """Return squared weights, small at the edges of the fast map, along each axis."""
    squared = []
    for axis in range(3):
        known = system.support & np.roll(system.support, -1, axis)
        size = np.abs(gradient(fast, system.grid.geometry, axis))
        weight = _ramp(size, GRADIENT_PERCENTILES, known)
        weight *= weight
        weight *= known
        squared.append(weight)
    return squared


def _streaks(
    system: Orientations,
    chi: Volume,
    squared: list[Volume],
    iterations: int,
    done: Callable[[], object],
) -> tuple[Volume, int]:
    """Return what near the cone alone explains the map's gradients where the fast map is flat."""
    geometry = system.grid.geometry
    near_cone = np.abs(system.kernels[0]) < ILL_POSED

    def normal(x: Volume) -> Volume:
        total = np.zeros_like(x)
        for axis, weight in enumerate(squared):
            v = gradient(x, geometry, axis)
            v *= weight
            total += gradient_adjoint(v, geometry, axis)
        spectrum = _spectrum(total)
        return system.image(multiplied(spectrum, near_cone, spectrum))

    x, taken, _ = conjugate_gradients(normal, normal(chi), iterations=iterations, done=done)
    return x, taken


def _laplacian_size(f: Volume, mask: Mask, geometry: Geometry) -> Volume:
    """Return |Laplacian| of the axes along which both neighbours are in the mask."""
    total = np.zeros_like(f)
    for axis, h in enumerate(geometry.voxel_size_mm):
        second = np.roll(f, 1, axis)
        second += np.roll(f, -1, axis)
        second -= 2 * f
        second *= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
        second /= np.float32(h * h)
        total += second
    return np.abs(total, out=total)


def _ramp(v: Volume, percentiles: tuple[float, float], mask: Mask) -> Volume:
    """Return 1 up to the first percentile in the mask, 0 from the second, linear between."""
    if not mask.any():
        return np.zeros_like(v)
    low, high = np.percentile(v[mask], percentiles)
    ramp: Volume = (np.float32(high) - v) / np.float32(max(high - low, 1e-30))
    return ramp.clip(0, 1)


def _spectrum(x: Volume) -> Array:
    spectrum: Array = scipy.fft.rfftn(x, workers=workers())
    return spectrum
