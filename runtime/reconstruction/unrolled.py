"""The loops of the unrolled networks around their exported prior, on the whole volume.

The prior is the CNN; it runs in patches or whole, which is the same where patches keep its halo.
The Fourier steps are the dipole operator, without padding, as the authors train and run them.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.card.card import ModelCard, Pipeline
from qsm_deploy.runtime.scan.scan import Scan

Doubles = NDArray[np.float64]
Numbers = Mapping[str, float]
Prior = Callable[[Volume], Volume]
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
}
