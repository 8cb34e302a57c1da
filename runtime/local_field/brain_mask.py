"""A brain mask of the magnitude, by deepbet.

It was trained on T1-weighted images of healthy adults and not on gradient echoes; a mask of one's
own stays the first choice.

References
----------
Fisch et al., Comput Biol Med 179:108845 (2024).
"""

import importlib.util
import warnings

import numpy as np

from qsm_deploy.kernels.errors import DataError, MissingDependencyError
from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.kernels.threads import workers
from qsm_deploy.runtime.local_field.quality_mask import largest_part

LIBRARY, EXTRA, LIKELY = "deepbet", "mask", 0.5
DEEPBET_BYTES = 1.1e9  # with PyTorch, as measured on heads of 1 mm


def has_deepbet() -> bool:
    """Return whether the library is installed."""
    return importlib.util.find_spec(LIBRARY) is not None


def brain_mask(magnitude: Volume) -> Mask:
    """Return the brain on a magnitude image: one connected part without holes.

    Parameters
    ----------
    magnitude
        (x, y, z) signal of the first echo, in canonical axes (to the right, to the front, up).

    Raises
    ------
    MissingDependencyError
        Without deepbet.
    DataError
        If it finds no brain. What merely gives signal is no substitute, so none is made.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library loads what torch deprecates
            likely = _likely_brain(magnitude)
    except ImportError as error:
        raise MissingDependencyError(LIBRARY, EXTRA, "a brain mask of the magnitude") from error
    except (AssertionError, ValueError):  # nothing that could be a brain
        likely = np.zeros_like(magnitude)
    mask = largest_part(likely > LIKELY)
    if not mask.any():
        raise DataError(
            "deepbet finds no brain on the magnitude of the first echo, which must show a head in "
            "its right orientation; pass a brain mask with -m"
        )
    return mask


def _likely_brain(magnitude: Volume) -> Volume:
    """Return how likely a voxel is brain, computed by as many threads as everything else."""
    from deepbet import BrainExtraction
    from deepbet.utils import torch

    before = torch.get_num_threads()
    torch.set_num_threads(workers())
    try:
        network = BrainExtraction(no_gpu=True)
        likely: Volume = network.run_model(np.array(magnitude, dtype=np.float32))
    finally:
        torch.set_num_threads(before)
    return likely
