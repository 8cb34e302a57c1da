"""Masked least squares of the dipole, for fields of one or several orientations.

``min_x sum_i |W_i (D_i x - f_i)|^2 + lam |M (x - x0)|^2``, x = 0 outside a support around the mask
M, by conjugate gradients on the normal equations from x0. One orientation with a map x0 is data
consistency, several without one are COSMOS.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from qsm_deploy.kernels.dipole import half_dipole_kernel
from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume
from qsm_deploy.kernels.inversion.grid import PaddedBox, each_slab, grown, padded_box
from qsm_deploy.kernels.threads import workers

ROUNDING = 1e-6  # a gradient this much smaller than the first is solved in float32

Array = NDArray[Any]
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Fit:
    """How far a least-squares solution came.

    Attributes
    ----------
    iterations
        That were taken.
    gradient
        What is left of the objective's gradient, relative to the first one.
    fitted_residual
        ``|W (D x - f)| / |W f|``, sources outside the mask included; 0 for a zero field.
    """

    iterations: int
    gradient: float
    fitted_residual: float


def masked_least_squares(
    fields_ppm: Sequence[Volume],
    weights: Sequence[Volume | Mask],
    b0_directions: Sequence[Vector],
    geometry: Geometry,
    *,
    iterations: int,
    start_ppm: Volume | None = None,
    lam: float = 0.0,
    tolerance: float = ROUNDING,
    support_mm: float = 0.0,
    done: Callable[[], object] = lambda: None,
) -> tuple[Volume, Fit]:
    """Return the map that explains registered fields best, 0 where no weight is positive.

    Parameters
    ----------
    fields_ppm
        (x, y, z) each [ppm]; what they hold where their weight is 0 does not matter.
    weights
        (x, y, z) each, W: a mask, or floats that are 0 outside it.
    b0_directions
        Of each field, in voxel axes.
    geometry
        The grid of all.
    iterations
        Number of steps at most, positive.
    start_ppm
        x0, the map to start from and stay near to; 0 if there is none.
    lam
        Weight of that nearness, not negative. Sources outside the mask are free of it.
    tolerance
        Of the relative gradient, where the steps end.
    support_mm
        How far outside the mask sources may lie, not negative [mm].
    done
        Called after each iteration.

    Returns
    -------
    (x, y, z) float32 array, Fit
        Susceptibility [ppm], and how well it fits.

    Raises
    ------
    UsageError
        If ``iterations`` is not positive, or the fields, weights and directions differ in number.
    GeometryError
        If a volume is not of that grid.
    DataError
        If no weight is positive.
    """
    if iterations < 1:
        raise UsageError(f"the number of iterations must be positive, got {iterations}")
    if not len(fields_ppm) == len(weights) == len(b0_directions):
        raise UsageError(
            "each field has a mask and a direction of B0, got "
            f"{len(fields_ppm)}, {len(weights)} and {len(b0_directions)}"
        )
    for volume in (*fields_ppm, *weights, *(() if start_ppm is None else (start_ppm,))):
        if volume.shape != geometry.shape:
            raise GeometryError(
                f"a volume has shape {volume.shape}, the geometry says {geometry.shape}; "
                "pass volumes of one grid, and its geometry"
            )
    mask: Mask = reduce(np.logical_or, (w > 0 for w in weights))
    grid = padded_box(mask, geometry, around_mm=support_mm)
    inside = grid.embed_mask(mask)
    support = grown(inside, grid.geometry, support_mm) if support_mm else inside
    system = Orientations(grid, b0_directions, weights, support)
    x0 = None if start_ppm is None else grid.embed(start_ppm) * inside
    misfits = system.embedded(fields_ppm)
    if x0 is not None:
        misfits = (f - d for f, d in zip(misfits, system.fields(x0), strict=True))

    def normal(x: Volume) -> Volume:
        image = system.adjoint(system.fields(x))

        def hold(rows: slice) -> None:
            image[rows] += np.float32(lam) * inside[rows] * x[rows]

        if lam:
            each_slab(hold, x.shape)
        return image

    x, taken, left = conjugate_gradients(
        normal, system.adjoint(misfits), iterations=iterations, tolerance=tolerance, done=done
    )
    if x0 is not None:
        x += x0
    fit = Fit(taken, left, system.residual(x, fields_ppm))
    x[~inside] = 0
    return grid.restore(x), fit


class Orientations:
    """``W_i D_i`` on a padded grid, for sources in a support.

    Parameters
    ----------
    grid
        Where they work.
    b0_directions
        Of each, in voxel axes.
    weights
        (x, y, z) each, of the volume.
    support
        Where sources may lie, on the padded grid, or how strong they are.
    """

    def __init__(
        self,
        grid: PaddedBox,
        b0_directions: Sequence[Vector],
        weights: Sequence[Volume | Mask],
        support: Array,
    ) -> None:
        self.grid, self.support, self.shape = grid, support, grid.geometry.shape
        self.kernels = [
            half_dipole_kernel(replace(grid.geometry, b0_direction=b)) for b in b0_directions
        ]
        self.squared = [
            grid.embed_mask(w > 0)
            if w.dtype == np.bool_
            else np.square(grid.embed(np.asarray(w, dtype=np.float32)))
            for w in weights
        ]

    def embedded(self, volumes: Iterable[Volume]) -> Iterator[Volume]:
        """Yield measured volumes on the padded grid, 0 where their weight is."""
        for volume, weight in zip(volumes, self.squared, strict=True):
            padded = self.grid.embed(volume)
            padded[weight == 0] = 0
            yield padded

    def image(self, spectrum: Array) -> Volume:
        """Return what a spectrum is of, which is overwritten."""
        # as irfftn, which would take another volume
        lines = scipy.fft.ifftn(spectrum, axes=(0, 1), workers=workers(), overwrite_x=True)
        x: Array = scipy.fft.irfft(lines, n=self.shape[2], axis=2, workers=workers())
        return x

    def fields(self, x: Volume) -> Iterator[Volume]:
        """Yield ``D_i x``."""
        spectrum = scipy.fft.rfftn(x, workers=workers())
        for kernel in self.kernels:
            yield self.image(multiplied(spectrum, kernel, np.empty_like(spectrum)))

    def adjoint(self, fields: Iterable[Volume]) -> Volume:
        """Return ``S sum_i D_i W_i^2 f_i``; the fields are overwritten."""
        total: Array | None = None
        for field, squared, kernel in zip(fields, self.squared, self.kernels, strict=True):
            field *= squared
            spectrum = scipy.fft.rfftn(field, workers=workers())
            multiplied(spectrum, kernel, spectrum)
            if total is None:
                total = spectrum
            else:
                total += spectrum
        assert total is not None
        image = self.image(total)
        image *= self.support
        return image

    def residual(self, x: Volume, volumes: Sequence[Volume]) -> float:
        """Return ``|W (D x - f)| / |W f|`` over all fields."""
        misfit = norm = 0.0
        for f, d, squared in zip(self.embedded(volumes), self.fields(x), self.squared, strict=True):
            norm += float(np.vdot(squared * f, f))
            f -= d
            misfit += float(np.vdot(squared * f, f))
        return math.sqrt(misfit / norm) if norm else 0.0


def conjugate_gradients(
    normal: Callable[[Array], Array],
    b: Array,
    *,
    iterations: int,
    tolerance: float = ROUNDING,
    inner: Callable[[Array, Array], Any] = np.vdot,
    done: Callable[[], object] = lambda: None,
) -> tuple[Array, int, float]:
    """Solve ``normal(x) = b`` from x = 0; b is overwritten.

    Parameters
    ----------
    normal
        Symmetric and not negative in the inner product.
    b
        In the range of ``normal``.
    iterations
        Number of steps at most.
    tolerance
        Of ``|b - normal(x)| / |b|``, where they end.
    inner
        Real product of two such arrays.
    done
        Called after each step.

    Returns
    -------
    array, int, float
        x, the steps taken, and ``|b - normal(x)| / |b|``.
    """
    x, r, direction = np.zeros_like(b), b, b.copy()
    squared = first = float(inner(r, r))
    taken = 0
    while taken < iterations and squared > tolerance**2 * first:
        image = normal(direction)
        length = squared / float(inner(direction, image))
        combine(length, direction, 1, x)
        combine(-length, image, 1, r)
        del image
        before, squared = squared, float(inner(r, r))
        combine(1, r, squared / before, direction)
        taken += 1
        done()
    return x, taken, math.sqrt(squared / first) if first else 0.0


def product(x: Array, y: Array) -> float:
    """Return the inner product of two real volumes, the same on any number of threads."""
    parts: list[float] = []

    def each(rows: slice) -> None:
        parts.append(float(np.sum(x[rows] * y[rows], dtype=np.float64)))

    each_slab(each, x.shape)
    return math.fsum(parts)


def combine(a: float, x: Array, b: float, y: Array) -> None:
    """Turn y into ``a x + b y``."""

    def each(rows: slice) -> None:
        y[rows] *= np.float32(b)
        y[rows] += np.float32(a) * x[rows]

    each_slab(each, y.shape)


def multiplied(spectrum: Array, kernel: Array, out: Array) -> Array:
    """Return the product of a spectrum and what is known of each frequency, in ``out``."""

    def multiply(rows: slice) -> None:
        np.multiply(spectrum[rows], kernel[rows], out=out[rows])

    each_slab(multiply, spectrum.shape)
    return out
