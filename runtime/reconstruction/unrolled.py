"""The loops of the unrolled networks around their exported prior, on the whole volume.

The prior is the CNN; it runs in patches or whole, which is the same where patches keep its halo.
The Fourier steps are the dipole operator, without padding, as the authors train and run them;
NeXtQSM's are of its own dipole, on a padded grid.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.kernels.threads import workers
from qsm_deploy.runtime.card.card import ModelCard, Pipeline
from qsm_deploy.runtime.scan.scan import Scan

Doubles = NDArray[np.float64]
Numbers = Mapping[str, float]
Prior = Callable[[Volume], Volume]
NEXTQSM_CELL = 64  # that the sides of its grid are multiples of
NEXTQSM_STEP = 100.0
RESIDUAL = 1e-10  # of SpiNet's conjugate gradients, squared norm [ppm^2]
SMALLEST_DIFFERENCE_PPM = 1e-6  # a smaller one would weigh more than any there is


def reconstruct_unrolled(card: ModelCard, scan: Scan, prior: Prior) -> Volume:
    """Return the susceptibility map of the loop that a card names.

    Parameters
    ----------
    card
        With the constants and the normalisation of the method.
    scan
        Local fields [ppm].
    prior
        Maps a normalised (c, x, y, z) volume to another.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], 0 outside the mask.
    """
    return _LOOPS[card.pipeline](scan, prior, card.constants, card.normalisation)


def lpcnn(scan: Scan, prior: Prior, constants: Numbers, normalisation: Numbers) -> Volume:
    """Alternate gradient steps, one orientation after the other, with the prior.

    Lai et al., MICCAI 2020, doi 10.1007/978-3-030-59713-9_13.
    """
    alpha = np.float32(constants["alpha"])
    mean, std = (np.float32(normalisation[name]) for name in ("chi_mean", "chi_std"))
    mask = scan.mask.astype(np.float32)
    grids = [
        Geometry(scan.geometry.shape, scan.geometry.voxel_size_mm, direction)
        for direction in (scan.geometry.b0_direction, *scan.more_b0_directions)
    ]
    projected = [
        alpha * dipole_convolve(field, grid)
        for field, grid in zip(scan.measured, grids, strict=True)
    ]
    z: Volume = np.sum(projected, axis=0)
    for remaining in reversed(range(int(constants["iterations"]))):
        p = prior(((z - mean) / std * mask)[None])[0]
        z = (p * std + mean) * mask
        if remaining:
            for b, grid in zip(projected, grids, strict=True):
                z = z + b - alpha * dipole_convolve(z, grid, power=2)
    return z


def modl(scan: Scan, prior: Prior, constants: Numbers, normalisation: Numbers) -> Volume:
    """Alternate gradient steps on susceptibility and anisotropic field with the prior.

    Feng et al., NeuroImage 240:118376 (2021), doi 10.1016/j.neuroimage.2021.118376.
    """
    step = np.float32(constants["step"])
    mean, std = _two_channels(normalisation)
    grid, mask = scan.geometry, scan.mask.astype(np.float32)
    field = scan.measured[0]

    def adjoint(f: Volume) -> Volume:
        return np.stack([dipole_convolve(f, grid), f])

    y = step * adjoint(field)
    x = y
    for iteration in range(int(constants["iterations"])):
        if iteration:
            predicted = dipole_convolve(x[0], grid) + x[1]
            x = x - step * adjoint(predicted) + y
        x = prior((x - mean) / std * mask) * mask * std + mean
    chi: Volume = x[0] * mask
    return chi


def spinet(scan: Scan, prior: Prior, constants: Numbers, normalisation: Numbers) -> Volume:
    """Alternate the prior with a weighted least-squares step by conjugate gradients.

    The map is complex there, its two parts the channels; both solve the same real system but for
    the weights. Venkatesh et al., Magn Reson Mater Phy 37:411-427 (2024), doi
    10.1007/s10334-024-01158-7.
    """
    weight, p = constants["lambda"], constants["p"]
    mean, std = (np.float32(normalisation[name]) for name in ("chi_mean", "chi_std"))
    grid, mask = scan.geometry, scan.mask.astype(np.float32)
    projected = dipole_convolve(scan.measured[0], grid)
    b = np.stack([projected, np.zeros_like(projected)])
    x = b
    for _ in range(int(constants["iterations"])):
        x = x * mask
        z = prior((x - mean) / std) * std + mean
        distance = np.maximum(np.hypot(*(x - z)), SMALLEST_DIFFERENCE_PPM)
        w2 = weight * distance.astype(np.float64) ** (p - 2)
        solution = _conjugate_gradients(grid, w2, b + w2 * z, int(constants["cg_steps"]))
        x = solution.astype(np.float32) * mask
    chi: Volume = x[0]
    return chi


def nextqsm(scan: Scan, prior: Prior, constants: Numbers, normalisation: Numbers) -> Volume:
    """Step down the misfit of the field and the magnitude of a learned regulariser.

    The misfit counts on the whole padded grid, also outside the mask. ``prior`` is the gradient of
    the regulariser's sum. Cognolato et al., Med Image Anal 84:102700 (2023), doi
    10.1016/j.media.2022.102700.

    Raises
    ------
    DataError
        If the field is 0 everywhere in the mask: steps are relative to it.
    """
    grid, mask = scan.geometry, scan.mask.astype(np.float32)
    lack = [-n % NEXTQSM_CELL for n in grid.shape]
    front = [math.ceil(n / 2) for n in lack]
    around = [(f, n - f) for f, n in zip(front, lack, strict=True)]
    inside = tuple(slice(f, f + n) for f, n in zip(front, grid.shape, strict=True))
    dipole = nextqsm_dipole(tuple(n + more for n, more in zip(grid.shape, lack, strict=True)), grid)

    def field_of(x: Volume) -> Volume:
        spectrum = scipy.fft.fftn(x, workers=workers())
        spectrum *= dipole
        filtered = scipy.fft.ifftn(spectrum, overwrite_x=True, workers=workers()).real
        field: Volume = filtered.copy()  # the imaginary part goes
        return field

    field = np.pad(scan.measured[0] * mask, around)
    norm = np.linalg.norm(field)
    if norm == 0:
        raise DataError("the local field is 0 in the whole mask; nothing to reconstruct")
    x: Volume = field[inside]
    for step in range(1, int(constants["iterations"]) + 1):
        residual = field_of(np.pad(x, around)) - field
        scale = NEXTQSM_STEP / (norm * np.linalg.norm(residual))
        misfit = np.float32(constants[f"lambda_{step}"] * scale) * field_of(residual)[inside]
        x = (x - misfit - prior(x[None])[0] / np.float32(dipole.size)) * mask
    return x


def nextqsm_dipole(shape: tuple[int, ...], grid: Geometry) -> Volume:
    """Return the dipole on the whole k-space grid, DC first; 1/3 at k = 0, unlike elsewhere."""
    along, squared = np.zeros(shape), np.full(shape, float(np.finfo(np.float32).eps))
    for axis, (n, size, b) in enumerate(
        zip(shape, grid.voxel_size_mm, grid.b0_direction, strict=True)
    ):
        k = scipy.fft.fftfreq(n, size).reshape([n if a == axis else 1 for a in range(3)])
        along += b * k
        squared += k**2
    dipole: Volume = (1 / 3 - along**2 / squared).astype(np.float32)
    return dipole


def _conjugate_gradients(grid: Geometry, w2: Doubles, b: Doubles, steps: int) -> Doubles:
    """Return x of ``(D^2 + w2) x = b`` for the (2, x, y, z) parts of a complex map, from 0.

    In double precision, as the authors do: in single the map is off by 2e-5 of its range.
    """
    x = np.zeros_like(b)
    r = direction = b
    squared = float(np.vdot(r, r))
    for _ in range(steps):
        if squared < RESIDUAL:
            break
        image = w2 * direction
        image += [dipole_convolve(part, grid, power=2) for part in direction]
        length = squared / float(np.vdot(direction, image))
        x = x + length * direction
        r = r - length * image
        before, squared = squared, float(np.vdot(r, r))
        direction = r + squared / before * direction
    return x


def _two_channels(normalisation: Numbers) -> tuple[Volume, Volume]:
    """Return mean and standard deviation of susceptibility and field, (2, 1, 1, 1) each."""
    mean, std = (
        np.array([normalisation[f"{name}_{what}"] for name in ("chi", "field")], dtype=np.float32)
        for what in ("mean", "std")
    )
    return mean.reshape(2, 1, 1, 1), std.reshape(2, 1, 1, 1)


_LOOPS: dict[Pipeline, Callable[[Scan, Prior, Numbers, Numbers], Volume]] = {
    "lpcnn": lpcnn,
    "modl": modl,
    "spinet": spinet,
    "nextqsm": nextqsm,
}
