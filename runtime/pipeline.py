"""From a local field to a susceptibility map, whole or in patches."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.dipole import tkd
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card import ModelCard
from qsm_deploy.runtime.patches import PatchPlan
from qsm_deploy.runtime.scan import Scan
from qsm_deploy.runtime.session import Session
from qsm_deploy.runtime.stages import Stages

Volume = NDArray[np.float32]


def network_inputs(card: ModelCard, scan: Scan) -> dict[str, Volume]:
    """Return the (x, y, z) volumes that a network takes, by input name [ppm].

    The TKD map is made of the whole volume, so that patches of it equal the whole.
    """
    inputs = {"local_field_ppm": scan.local_field_ppm}
    if card.tkd is not None:
        chi = tkd(
            scan.local_field_ppm,
            scan.geometry,
            threshold=card.tkd.threshold,
            pad_voxels=card.tkd.pad_voxels,
        )
        if card.tkd.masked:
            chi *= scan.mask
        inputs["tkd_chi_ppm"] = chi
    return inputs


def reconstruct(
    session: Session,
    scan: Scan,
    plan: PatchPlan,
    stages: Stages,
    done: Callable[[], object] = lambda: None,
) -> Volume:
    """Return the susceptibility map of one acquisition.

    Parameters
    ----------
    session
        The network.
    scan
        The acquisition, on a geometry the network may be used for.
    plan
        Whole volume or patches, made for the scan's mask.
    stages
        Takes the time and memory of the stages ``prepare`` and ``inference``.
    done
        Called after each patch.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], 0 outside the mask.

    Raises
    ------
    EngineError
        If the backend fails, or the result is not finite.
    """
    with stages("prepare"):
        inputs = network_inputs(session.card, scan)
    with stages("inference"):
        chi = plan.run(
            lambda patches: run_patch(session, dict(zip(inputs, patches, strict=True))),
            list(inputs.values()),
            scan.mask,
            done,
        )
        chi *= scan.mask
    if bad := int(np.count_nonzero(~np.isfinite(chi))):
        raise EngineError(
            f"the network returned {bad} NaN or Inf voxels; check the field, or try another "
            "backend or precision"
        )
    return chi


def run_patch(session: Session, patch: Mapping[str, Volume]) -> Volume:
    """Return the network's (x, y, z) output of one patch."""
    output: Volume = session.run({name: p[None, None] for name, p in patch.items()})[0, 0]
    return output
