"""A brain mask of the magnitude, by deepbet.

It was trained on T1-weighted images of healthy adults and not on gradient echoes; a mask of one's
own stays the first choice.

References
----------
Fisch et al., Comput Biol Med 179:108845 (2024).
"""

import importlib.util

import numpy as np

from qsm_deploy.kernels.errors import DataError, MissingDependencyError
from qsm_deploy.kernels.geometry import Mask, Volume

LIBRARY, EXTRA, LIKELY = "deepbet", "mask", 0.5


def has_deepbet() -> bool:
    """Return whether the library is installed."""
    return importlib.util.find_spec(LIBRARY) is not None


def brain_mask(magnitude: Volume) -> Mask:
    """Return the brain on a magnitude image.

    Parameters
    ----------
    magnitude
        (x, y, z) signal of the first echo, in canonical axes (left to right, back to front, up).

    Raises
    ------
    MissingDependencyError
        Without deepbet.
    DataError
        If it finds no brain.
    """
    if not has_deepbet():
        raise MissingDependencyError(LIBRARY, EXTRA, "a brain mask of the magnitude")
    from deepbet import BrainExtraction

    network = BrainExtraction(no_gpu=True)
    try:
        likely = network.run_model(np.array(magnitude, dtype=np.float32))
        brain = network.postprocess(likely > LIKELY)
    except (AssertionError, ValueError) as error:  # nothing that could be a brain
        raise DataError("deepbet finds no brain on the magnitude; pass a mask") from error
    mask: Mask = np.asarray(brain, dtype=bool)
    if not mask.any():
        raise DataError("deepbet finds no brain on the magnitude; pass a mask")
    return mask
