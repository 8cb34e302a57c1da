"""The shapes that an engine is built for: smallest, typical and largest."""

import math
import re
from dataclasses import dataclass

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Shape, shape_text

# of a small patch, of a head at 1 mm, and of the largest matrix that is common
DEFAULT_SIZES = (16, 160, 256)
MOST_PATCHES_AT_ONCE = 4


@dataclass(frozen=True)
class Profile:
    """Smallest, typical and largest spatial shape, and number of volumes at once."""

    shapes: tuple[Shape, Shape, Shape]
    batches: tuple[int, int, int]

    def __str__(self) -> str:
        """Return the shapes as they are typed."""
        return ",".join(map(shape_text, self.shapes))


def profile_from(text: str | None, divisor: int, *, patchable: bool) -> Profile:
    """Return the profile that ``--shapes`` asks for, or the default one.

    Parameters
    ----------
    text
        ``MIN,OPT,MAX``, each a size ``N`` of a cube or ``XxYxZ``.
    divisor
        Every size must be a multiple of it; default ones are rounded up to one.
    patchable
        Whether several patches may run at once.

    Raises
    ------
    UsageError
        If they are no three shapes that grow and that the divisor divides.
    """
    batches = (1, 1, MOST_PATCHES_AT_ONCE if patchable else 1)
    if text is None:
        small, typical, large = (divisor * math.ceil(n / divisor) for n in DEFAULT_SIZES)
        return Profile(((small,) * 3, (typical,) * 3, (large,) * 3), batches)
    parts = text.split(",")
    if len(parts) != 3 or not all(re.fullmatch(r"\d+(x\d+x\d+)?", part) for part in parts):
        raise UsageError(f"--shapes {text}: expected MIN,OPT,MAX, each as 64 or 64x96x80")
    smallest, typical_shape, largest = map(_shape, parts)
    for axis in zip(smallest, typical_shape, largest, strict=True):
        if list(axis) != sorted(axis) or axis[0] < 1:
            raise UsageError(f"--shapes {text}: sizes must grow from MIN over OPT to MAX")
        if wrong := [n for n in axis if n % divisor]:
            raise UsageError(
                f"--shapes {text}: {wrong[0]} is no multiple of {divisor}, as this network needs"
            )
    return Profile((smallest, typical_shape, largest), batches)


def _shape(text: str) -> Shape:
    sizes = [int(n) for n in text.split("x")]
    x, y, z = sizes * 3 if len(sizes) == 1 else sizes
    return x, y, z
