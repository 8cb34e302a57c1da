"""How far a lower precision is from FP32, on a sample of the volume at hand."""

import math

import numpy as np

from qsm_deploy.runtime.metrics.difference import difference_ppb
from qsm_deploy.runtime.reconstruction.memory import SAMPLE_VOXELS
from qsm_deploy.runtime.reconstruction.patches import plan_patches
from qsm_deploy.runtime.reconstruction.pipeline import network_outputs
from qsm_deploy.runtime.reconstruction.prior_maps import prior_maps
from qsm_deploy.runtime.reconstruction.tiles import plan_for
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.units import PPB_PER_PPM
from qsm_deploy.runtime.sessions.session import Session


def precision_error(session: Session, reference: Session, scan: Scan) -> dict[str, float]:
    """Return the error of a session against one in FP32, on the fullest part of a scan.

    Parameters
    ----------
    session, reference
        The same network twice, in the precision to judge and in FP32.
    scan
        The acquisition; a box of it is reconstructed by both.

    Returns
    -------
    dict
        ``max_abs_error_ppb`` and ``relative_error`` (norm of the difference by norm), in the mask.
    """
    card = session.card
    divisor, front = card.divisor, card.pad_front
    least = max(SAMPLE_VOXELS, *card.tiles.size) if card.tiles else SAMPLE_VOXELS
    size = divisor * math.ceil(least / divisor)
    fullest = max(
        plan_patches(scan.mask, divisor, size, 0, "crop", front),
        key=lambda p: int(scan.mask[p.inside].sum()),
    )
    sample = scan.cut(fullest.inside)
    plan = plan_for(card, sample.mask.shape)
    made = prior_maps(card.priors, sample)
    exact, got = (network_outputs(s, sample, plan, made=made) for s in (reference, session))
    error_ppb = difference_ppb(got, exact, sample.mask)
    norm_ppb = PPB_PER_PPM * float(np.linalg.norm(exact[:, sample.mask]))
    return {
        "max_abs_error_ppb": float(np.abs(error_ppb).max()),
        "relative_error": float(np.linalg.norm(error_ppb)) / norm_ppb,
    }
