"""The dipole operator ``y = F^-1 [E(k) F x]`` and its regularised inverses, on the CPU.

The multiplier is ``E(k) = (g(D(k)) + g(D(-k))) / 2`` on the index grid, with the unit dipole
``D(k) = 1/3 - (k.b)^2 / |k|^2`` and ``g`` its power or regularised inverse. The symmetrisation
changes only the Nyquist planes of even axes; it makes the operator real, so that the
real-to-complex transform computes the same as the complex one.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import numpy as np
import scipy.fft
from numpy.typing import DTypeLike, NDArray

from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.kernels.threads import workers

Multiplier = Callable[[NDArray[np.float32]], NDArray[np.float32]]

SLAB_VOXELS = 1 << 17  # of the multiplier at a time: 512 KiB, which stay in the cache
CONE = 1e-6  # below it D is zero within float32 rounding, and its sign would be noise


def dipole_kernel(geometry: Geometry) -> Volume:
    """Return the unit dipole on the whole k-space grid, DC first.

    Parameters
    ----------
    geometry
        Grid shape (x, y, z), voxel size [mm], B0 direction (unit vector, voxel axes).

    Returns
    -------
    (x, y, z) float32 array
        Dimensionless, in [-2/3, 1/3]; 0 at k = 0; real and even under index negation.

    References
    ----------
    Marques & Bowtell, Concepts Magn Reson B 25:65-78 (2005).
    """
    multiplier = _Multiplier(lambda d: d, geometry, half=False)
    return multiplier.slab(slice(None))


def half_dipole_kernel(geometry: Geometry) -> Volume:
    """Return the unit dipole on the half of k-space that ``rfftn`` keeps, (x, y, z // 2 + 1)."""
    x, y, z = geometry.shape
    multiplier = _Multiplier(lambda d: d, geometry, half=True)
    kernel = np.empty((x, y, z // 2 + 1), dtype=np.float32)
    for rows in slabs(kernel.shape):
        kernel[rows] = multiplier.slab(rows)
    return kernel


def slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield some planes of a volume after the other, as many as stay in the cache."""
    at_once = max(1, SLAB_VOXELS // math.prod(shape[1:]))
    for start in range(0, shape[0], at_once):
        yield slice(start, min(start + at_once, shape[0]))


def dipole_convolve(
    chi_ppm: Volume,
    geometry: Geometry,
    *,
    pad_voxels: int | tuple[int, int, int] = 0,
    power: Literal[1, 2] = 1,
) -> Volume:
    """Return the field of a susceptibility map, or with ``power=2`` the adjoint of that field.

    Parameters
    ----------
    chi_ppm
        (x, y, z) susceptibility [ppm]; float64 is computed in double precision.
    geometry
        The grid of ``chi_ppm``.
    pad_voxels
        Zeros added on both sides of each axis before the transform and cropped afterwards;
        half the shape makes wrap-around negligible.
    power
        Of the unit dipole. The square is symmetrised after squaring, so that on even axes with
        an oblique B0 it is not the operator applied twice.

    Returns
    -------
    (x, y, z) float32 array
        Field [ppm], zero-mean when not padded.
    """
    g: Multiplier = (lambda d: d * d) if power == 2 else (lambda d: d)
    return dipole_filter(chi_ppm, geometry, g, pad_voxels=pad_voxels)


def tkd(
    local_field_ppm: Volume,
    geometry: Geometry,
    *,
    threshold: float,
    pad_voxels: int | tuple[int, int, int] = 0,
) -> Volume:
    """Invert the dipole by thresholded k-space division, ``sign(D) / max(|D|, threshold)``.

    On the magic cone, where D vanishes, the inverse is 0.

    Parameters
    ----------
    local_field_ppm
        (x, y, z) field [ppm].
    geometry
        The grid of the field.
    threshold
        Smallest |D| divided by, in (0, 2/3].
    pad_voxels
        As in :func:`dipole_convolve`.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm].

    Raises
    ------
    UsageError
        If the threshold is outside its range.

    References
    ----------
    Shmueli et al., Magn Reson Med 62:1510-1522 (2009).
    """
    require_threshold(threshold)
    t = np.float32(threshold)

    def inverse(d: Volume) -> Volume:
        size = np.abs(d)
        return cast(Volume, np.where(size < CONE, 0, np.sign(d)) / np.maximum(size, t))

    return dipole_filter(local_field_ppm, geometry, inverse, pad_voxels=pad_voxels)


def tikhonov(
    local_field_ppm: Volume,
    geometry: Geometry,
    *,
    lam: float,
    pad_voxels: int | tuple[int, int, int] = 0,
) -> Volume:
    """Invert the dipole with Tikhonov's regularisation, ``D / (D^2 + lam)``.

    Parameters
    ----------
    local_field_ppm
        (x, y, z) field [ppm].
    geometry
        The grid of the field.
    lam
        Weight of ``|chi|^2``, positive.
    pad_voxels
        As in :func:`dipole_convolve`.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm].

    Raises
    ------
    UsageError
        If ``lam`` is not positive and finite.
    """
    require_lam(lam)
    weight = np.float32(lam)
    return dipole_filter(
        local_field_ppm, geometry, lambda d: d / (d * d + weight), pad_voxels=pad_voxels
    )


def require_threshold(threshold: float) -> None:
    """Raise a UsageError unless a threshold of TKD lies in (0, 2/3]."""
    if not 0 < threshold <= 2 / 3:
        raise UsageError(f"the TKD threshold must lie in (0, 2/3], got {threshold}")


def require_lam(lam: float) -> None:
    """Raise a UsageError unless Tikhonov's weight is positive and finite."""
    if not 0 < lam < np.inf:
        raise UsageError(f"Tikhonov's lam must be positive and finite, got {lam}")


def dipole_filter(
    volume: Volume,
    geometry: Geometry,
    g: Multiplier,
    *,
    pad_voxels: int | tuple[int, int, int] = 0,
) -> Volume:
    """Return ``F^-1 [E F volume]`` of the zero-padded volume, cropped back.

    Parameters
    ----------
    volume
        (x, y, z); float64 is computed in double precision.
    geometry
        Its grid.
    g
        Maps D(k), in [-2/3, 1/3], to what is multiplied with, element by element.
    pad_voxels
        As in :func:`dipole_convolve`.

    Raises
    ------
    GeometryError
        If the volume is not of that grid.
    """
    if volume.shape != geometry.shape:
        raise GeometryError(
            f"the volume has shape {volume.shape}, its geometry says {geometry.shape}; "
            "pass the geometry of this volume"
        )
    dtype: DTypeLike = np.float64 if volume.dtype == np.float64 else np.float32
    padded = geometry.padded(pad_voxels)
    low = tuple((p - n) // 2 for p, n in zip(padded.shape, geometry.shape, strict=True))
    inner = tuple(slice(o, o + n) for o, n in zip(low, geometry.shape, strict=True))
    if padded.shape == geometry.shape:
        x: NDArray[Any] = np.asarray(volume, dtype=dtype)
    else:
        x = np.zeros(padded.shape, dtype=dtype)
        x[inner] = volume
    spectrum: NDArray[Any] = scipy.fft.rfftn(x, workers=workers())
    del x
    multiplier = _Multiplier(g, padded, half=True)

    for rows in slabs(spectrum.shape):
        spectrum[rows] *= multiplier.slab(rows)
    y: Volume = scipy.fft.irfftn(spectrum, s=padded.shape, workers=workers(), overwrite_x=True)
    return np.ascontiguousarray(y[inner])


class _Multiplier:
    """The symmetrised multiplier E, some (y, z) planes of k-space at a time.

    These and what is made on the way stay in the processor's cache, so that E costs little more
    than reading a stored one.

    Parameters
    ----------
    g
        Power or regularised inverse.
    geometry
        The grid.
    half
        Whether to keep the non-negative frequencies of the last axis only, as ``rfftn`` does.
    """

    def __init__(self, g: Multiplier, geometry: Geometry, *, half: bool) -> None:
        self._g = g
        self._b = geometry.b0_direction
        self._k = [
            np.fft.fftfreq(n, d).astype(np.float32)
            for n, d in zip(geometry.shape, geometry.voxel_size_mm, strict=True)
        ]
        minus_k = [np.roll(axis[::-1], 1) for axis in self._k]  # the frequency at index -i modulo n
        if half:
            keep = slice(geometry.shape[2] // 2 + 1)
            self._k[2], minus_k[2] = self._k[2][keep], minus_k[2][keep]
        # D(-k) differs from D(k) only where an even axis has its Nyquist frequency
        self._nyquist: list[tuple[int, int, Volume]] = []
        for axis, (f, minus_f) in enumerate(zip(self._k, minus_k, strict=True)):
            for n in np.flatnonzero((f == minus_f) & (f != 0)).tolist():
                at_n = ([*k[:axis], k[axis][[n]], *k[axis + 1 :]] for k in (self._k, minus_k))
                one, other = (g(_dipole(k, self._b)) for k in at_n)
                e: Volume = (one + other) * np.float32(0.5)
                self._nyquist.append((axis, n, e.squeeze(axis)))

    def slab(self, rows: slice) -> Volume:
        """Return E at some frequencies of the first axis, (rows, y, z)."""
        kx, ky, kz = self._k
        e = self._g(_dipole([kx[rows], ky, kz], self._b))
        for axis, n, stored in self._nyquist:
            if axis == 1:
                e[:, n] = stored[rows]
            elif axis == 2:
                e[:, :, n] = stored[rows]
            else:
                e[np.arange(len(kx))[rows] == n] = stored
        return e


def _dipole(
    k: list[NDArray[np.float32]], b0_direction: tuple[float, float, float]
) -> NDArray[np.float32]:
    """Return D on the outer grid of three frequency axes, 0 at the origin."""
    kx, ky, kz = np.ix_(*k)
    bx, by, bz = (np.float32(b) for b in b0_direction)
    k_squared = kx * kx + ky * ky + kz * kz
    along_b = kx * bx + ky * by + kz * bz
    from_origin = all(axis[0] == 0 for axis in k)  # the zero comes first where there is one
    if from_origin:
        k_squared[0, 0, 0] = 1
    along_b *= along_b
    along_b /= k_squared
    d: NDArray[np.float32] = np.subtract(np.float32(1 / 3), along_b, out=along_b)
    if from_origin:
        d[0, 0, 0] = 0
    return d
