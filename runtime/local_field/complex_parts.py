"""Whether a real and an imaginary part are on one scale, told from the noise in air."""

from collections.abc import Sequence

import numpy as np

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Volume

CORNER = 8  # a corner block has this fraction of each edge
LEAST_NOISE = 50  # voxels that are not zero, to tell anything of noise
MOST_RATIO = 1.4  # of the noise of the two parts
MOST_MEAN = 0.7  # of the noise: what its mean may be off zero
WHITE = 0.7  # of the mean square step of uncorrelated neighbours, twice the variance


def require_parts_of_one(names: Sequence[str], parts: Sequence[Volume]) -> None:
    """Refuse parts of which one was shifted or scaled, as by a stale slope or intercept.

    In air both are white noise around 0 of the same size. Where the corners hold something else
    nothing is told but that not both may be positive.

    Parameters
    ----------
    names
        Of the files of the real and of the imaginary part, for messages.
    parts
        (x, y, z) of each, finite.

    Raises
    ------
    DataError
        If they are not of one complex image.
    """
    check = "check the scaling (scl_slope, scl_inter) of both headers"
    if min(part.min() for part in parts) >= 0:
        raise DataError(
            f"{names[0]} and {names[1]} are nowhere negative; real and imaginary parts lie around "
            f"0: {check}"
        )
    corners = [_corners(part) for part in parts]
    if not all(map(_is_white_noise, corners)):
        return
    sizes = [float(np.std(noise)) for noise in corners]
    if max(sizes) > MOST_RATIO * min(sizes):
        raise DataError(
            f"{names[0]} and {names[1]} have noise of {sizes[0]:.3g} and {sizes[1]:.3g} in the "
            f"corners, of one complex image it is the same: {check}"
        )
    for name, noise, size in zip(names, corners, sizes, strict=True):
        if abs(float(noise.mean())) > MOST_MEAN * size:
            raise DataError(
                f"{name} is {noise.mean():.3g} in the corners, where noise lies around 0: {check}"
            )


def _corners(volume: Volume) -> Volume:
    """Return the values in the eight corners of a volume."""
    for axis, n in enumerate(volume.shape):
        edge = max(1, n // CORNER)
        volume = np.take(volume, [*range(edge), *range(n - edge, n)], axis=axis)
    return volume


def _is_white_noise(values: Volume) -> bool:
    """Return whether neighbours differ as much as any two voxels do."""
    if np.count_nonzero(values) < LEAST_NOISE:
        return False
    steps = [np.mean(np.diff(values, axis=axis) ** 2) for axis in range(3)]
    return bool(min(steps) > WHITE * 2 * np.var(values))
