"""chi-sepnet: susceptibility parted into paramagnetic and diamagnetic sources by QSMnet's U-net.

This is the authors' version in PyTorch that takes R2'; attribute names are theirs. Kim et al., Hum
Brain Mapp 46:e70136 (2025), doi 10.1002/hbm.70136.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qsm_deploy.export.checkpoints.state import load_strictly
from qsm_deploy.export.networks import separation
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.qsmnet import TORCH, FiveResolutions, sizes_in
from qsm_deploy.export.networks.separation import statistics, undo_z_score, z_score

NUMBERS_FILE = "xsepnet_norm_factor.mat"
RELAXIVITY_HZ_PER_PPM = 114.0
AUTHORS_NUMBERS = {
    "chi": "cosmos_sus_{}",
    "field": "field_{}",
    "r2prime": "r2prime_{}",  # of R2' over the relaxivity
    "chi_positive": "x_pos_{}",
    "chi_negative": "x_neg_{}",
}


class ChiSepnet(FiveResolutions):
    """Local field [ppm], susceptibility [ppm], R2' [Hz] and mask to both sources, in ppm.

    The normalisation holds mean and standard deviation of ``chi``, ``field``, ``r2prime``,
    ``chi_positive`` and ``chi_negative``.
    """

    inputs = separation.INPUTS
    output, further_outputs = separation.OUTPUT, separation.FURTHER_OUTPUTS
    channels_in, channels_out = 3, 2

    def forward(
        self, local_field_ppm: Tensor, chi_ppm: Tensor, r2prime_hz: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return both magnitudes, (n, 1, x, y, z) each, not masked."""
        numbers = self.normalisation
        maps = [
            z_score(chi_ppm, mask, numbers, "chi"),
            z_score(local_field_ppm, mask, numbers, "field"),
            z_score(r2prime_hz / RELAXIVITY_HZ_PER_PPM, mask, numbers, "r2prime"),
        ]
        y = self.unet(torch.cat(maps, dim=1))
        positive = undo_z_score(y[:, :1], numbers, "chi_positive")
        negative = undo_z_score(y[:, 1:], numbers, "chi_negative")
        return torch.relu(positive), torch.relu(negative)


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> ChiSepnet:
    """Build the network that a state dict describes, its widths read off the shapes.

    Parameters
    ----------
    state
        Under the authors' names.
    choices
        With the numbers of their ``.mat`` file as its normalisation.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape, or the normalisation is.
    """
    numbers = statistics(choices.normalisation, AUTHORS_NUMBERS, NUMBERS_FILE)
    network = ChiSepnet(*sizes_in(state, "chi-sepnet"), TORCH, numbers)
    load_strictly(network, state)
    return network.eval()
