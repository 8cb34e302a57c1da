"""SpiNet-QSM: a prior on the complex map, between weighted least-squares steps.

The prior is exported; the steps are conjugate gradients whose number depends on the data, so the
runtime runs them. Venkatesh et al., Magn Reson Mater Phy 37:411-427 (2024), doi
10.1007/s10334-024-01158-7.
"""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.normalisation import number_from
from qsm_deploy.export.checkpoints.state import load_strictly
from qsm_deploy.export.networks.modl_qsm import ISOTROPIC_1MM
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.unrolled import Prior
from qsm_deploy.export.networks.wide_resnet import wide_resnet_like

CHANNELS = 2  # real and imaginary part
ITERATIONS, CG_STEPS = 3, 25
# of the training susceptibility [ppm]
PUBLISHED = {"chi_mean": -0.0027030049823, "chi_std": 0.0289272423834}


class SpinetWeights(nn.Module):
    """What the authors' file holds: the prior, the weight of its term and the norm's power."""

    def __init__(self, gen: nn.Sequential) -> None:
        super().__init__()
        self.lambda_val = nn.Parameter(torch.zeros(1))
        self.p = nn.Parameter(torch.zeros(1))
        self.gen = gen


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> Prior:
    """Build the prior that a state dict describes, its widths read off the shapes.

    Parameters
    ----------
    state
        Under the authors' names.
    choices
        Optionally ``out_mean`` and ``out_std``.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape, or the normalisation is.
    """
    weights = SpinetWeights(wide_resnet_like(state, CHANNELS, "spinet-qsm"))
    load_strictly(weights, state)
    constants = {
        "lambda": weights.lambda_val.item(),
        "p": weights.p.item(),
        "iterations": ITERATIONS,
        "cg_steps": CG_STEPS,
    }
    normalisation = _normalisation(choices.normalisation)
    return Prior(weights.gen, CHANNELS, "spinet", ISOTROPIC_1MM, normalisation, constants).eval()


def _normalisation(given: Mapping[str, NDArray[Any]]) -> Mapping[str, float]:
    """Return the numbers that were passed, or else the published ones."""
    if not given:
        return PUBLISHED
    return {
        "chi_mean": number_from(given, "out_mean", "tr-stats.mat"),
        "chi_std": number_from(given, "out_std", "tr-stats.mat", positive=True),
    }
