"""How far a lower precision is from FP32, on a sample of the volume at hand."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.runtime.patches import plan_patches
from qsm_deploy.runtime.pipeline import run_patch
from qsm_deploy.runtime.session import Session

SAMPLE_VOXELS = 64


def precision_error(
    session: Session,
    reference: Session,
    inputs: Mapping[str, NDArray[np.float32]],
    mask: NDArray[np.bool_],
) -> dict[str, float]:
    """Return the error of a session against one in FP32, on the fullest of all patches.

    Parameters
    ----------
    session, reference
        The same network twice, in the precision to judge and in FP32.
    inputs
        (x, y, z) volumes by input name.
    mask
        (x, y, z) bool, True inside.

    Returns
    -------
    dict
        ``max_abs_error_ppb`` and ``relative_error`` (norm of the difference by norm), in the mask.
    """
    divisor = session.card.divisor
    size = divisor * math.ceil(SAMPLE_VOXELS / divisor)
    fullest = max(
        plan_patches(mask, divisor, size, 0, "crop"), key=lambda p: int(mask[p.inside].sum())
    )
    sample = {name: fullest.gather(volume) for name, volume in inputs.items()}
    inside = mask[fullest.inside]
    exact = run_patch(reference, sample)[fullest.own][inside]
    error = run_patch(session, sample)[fullest.own][inside] - exact
    return {
        "max_abs_error_ppb": 1000 * float(np.abs(error).max()),
        "relative_error": float(np.linalg.norm(error) / np.linalg.norm(exact)),
    }
