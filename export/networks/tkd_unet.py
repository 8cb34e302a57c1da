"""tkd-unet: a small residual U-net that repairs a TKD map, the bundled model.

It sees the field and the TKD map side by side and returns the TKD map plus a correction. Without
bias or normalisation it is positively homogeneous, so it has no preferred field strength; the TKD
map brings the voxel size and the B0 direction, so it serves any geometry.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.network import ANY_GEOMETRY, LOCAL_FIELD, TKD_CHI, Choices, Network
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts
from qsm_deploy.runtime.card.card import TkdSettings

FIELD_SCALE_PPM = 0.0125
CHI_SCALE_PPM = 0.04
TKD_THRESHOLD = 0.12
TKD_PAD_VOXELS = 8


class TkdUnet(Network):
    """(n, 1, x, y, z) local field and TKD map to susceptibility, all in ppm.

    Parameters
    ----------
    channels
        Feature channels of each level, finest first.
    """

    inputs = (LOCAL_FIELD, TKD_CHI)
    pipeline = "tkd+cnn"
    geometry = ANY_GEOMETRY
    tkd = TkdSettings(TKD_THRESHOLD, TKD_PAD_VOXELS, masked=True)

    def __init__(self, channels: Sequence[int] = (8, 16, 32)) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            _two_convs(before, c) for before, c in zip((2, *channels), channels, strict=False)
        )
        coarse_to_fine = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(coarse, fine, kernel_size=2, stride=2, bias=False)
            for coarse, fine in coarse_to_fine
        )
        self.decoder = nn.ModuleList(_two_convs(2 * fine, fine) for _, fine in coarse_to_fine)
        self.last = nn.Conv3d(channels[0], 1, kernel_size=1, bias=False)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(2 ** len(self.up))

    def forward(self, local_field_ppm: Tensor, tkd_chi_ppm: Tensor) -> Tensor:
        """Return ``chi_ppm``."""
        v = torch.cat([local_field_ppm / FIELD_SCALE_PPM, tkd_chi_ppm / CHI_SCALE_PPM], dim=1)
        skips: list[Tensor] = []
        for encode in self.encoder:
            v = encode(nn.functional.avg_pool3d(v, 2) if skips else v)
            skips.append(v)
        for up, decode, skip in zip(self.up, self.decoder, skips[-2::-1], strict=True):
            v = decode(torch.cat([up(v), skip], dim=1))
        correction: Tensor = self.last(v)
        return tkd_chi_ppm + CHI_SCALE_PPM * correction


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> TkdUnet:
    """Build the network that a state dict describes, its widths read off the shapes.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    levels = max(2, count_parts(state, "encoder.{}."))
    widths = [f"encoder.{level}.0.weight" for level in range(levels)]
    require_keys(state, widths, "tkd-unet")
    network = TkdUnet([channels_of(state, key) for key in widths])
    load_strictly(network, state)
    return network.eval()


def _two_convs(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.LeakyReLU(0.1),
        nn.Conv3d(channels_out, channels_out, kernel_size=3, padding=1, bias=False),
        nn.LeakyReLU(0.1),
    )
