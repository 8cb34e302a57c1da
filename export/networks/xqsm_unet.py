"""xqsm-unet: the plain U-net that xQSM was compared with. No global residual.

Gao et al., NMR Biomed 34:e4461 (2021), doi 10.1002/nbm.4461.
"""

from collections.abc import Mapping

from torch import Tensor

from qsm_deploy.export.checkpoints.state import load_strictly
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder, encoder_decoder_size
from qsm_deploy.export.networks.network import Choices, Network


class XqsmUnet(EncoderDecoder, Network):
    """Local field to susceptibility, both (n, 1, x, y, z) in ppm.

    Parameters
    ----------
    base
        Channels of the finest level; each further level has twice those of the level before.
    depth
        Levels, each of which halves the resolution.
    """

    def __init__(self, base: int = 64, depth: int = 2) -> None:
        super().__init__(1, base, depth)

    def forward(self, local_field_ppm: Tensor) -> Tensor:
        """Return ``chi_ppm`` of a (n, 1, x, y, z) field."""
        return super().forward(local_field_ppm)


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> XqsmUnet:
    """Build the network that a state dict describes, its width and depth read off the shapes.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    _, base, depth = encoder_decoder_size(state, "xqsm-unet")
    network = XqsmUnet(base, depth)
    load_strictly(network, state)
    return network.eval()
