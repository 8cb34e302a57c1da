"""tv-unet: a small residual U-net that corrects the map of total variation, the bundled network.

Beside that map it sees the field, what the map leaves unexplained, and TKD maps of both, which hold
what is linear in the field; a mask and the noise say what to trust. Without bias or normalisation,
and with last convolutions of zeros, it begins as total variation. Next to the magic cone the map
stays that of total variation: networks trained on simulated fields add streaks to real ones there.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.network import (
    ANY_GEOMETRY,
    FIELD_NOISE,
    LOCAL_FIELD,
    MASK,
    VOLUME,
    Choices,
    Network,
)
from qsm_deploy.export.networks.state_sizes import channels_of
from qsm_deploy.runtime.card.card import Anchor, PriorMap, TensorInfo

FIELD_SCALE_PPM = 0.0125
CHI_SCALE_PPM = 0.04
MASK_SCALE = 0.25
NOISE_SCALE_PPM = 0.01
TV_ITERATIONS = 30
PRIORS = (
    PriorMap("tv_chi_ppm", "tv", LOCAL_FIELD.name, TV_ITERATIONS),
    PriorMap("tv_field_ppm", "tv_field", LOCAL_FIELD.name, TV_ITERATIONS),
    PriorMap("tv_residual_ppm", "tv_residual", LOCAL_FIELD.name, TV_ITERATIONS),
    PriorMap("residual_tkd_ppm", "tkd", "tv_residual_ppm", 1, threshold=0.12),
    PriorMap("residual_iterated_tkd_ppm", "tkd", "tv_residual_ppm", 4, threshold=0.1),
    PriorMap("field_iterated_tkd_ppm", "tkd", "tv_field_ppm", 4, threshold=0.1),
)
CHANNELS = len(PRIORS) + 3


class TvUnet(Network):
    """(n, 1, x, y, z) field, prior maps and mask, and the noise, to susceptibility [ppm].

    Parameters
    ----------
    half, quarter
        Feature channels at half and at a quarter of the resolution.
    full
        At the resolution of the map.
    """

    inputs = (
        LOCAL_FIELD,
        *(TensorInfo(prior.name, "ppm", VOLUME) for prior in PRIORS),
        MASK,
        FIELD_NOISE,
    )
    geometry = ANY_GEOMETRY
    priors = PRIORS
    anchor = Anchor("tv_chi_ppm", threshold=0.15)
    divisor = 4

    def __init__(self, half: int = 32, quarter: int = 64, full: int = 12) -> None:
        super().__init__()
        self.stem = _conv(CHANNELS, half, 2)
        self.encoder = _Residual(half)
        self.down = _conv(half, quarter, 2)
        self.bottom = nn.Sequential(_Residual(quarter), _Residual(quarter))
        self.up = nn.ConvTranspose3d(quarter, half, kernel_size=2, stride=2, bias=False)
        self.decoder = _Residual(half)
        self.to_full = nn.ConvTranspose3d(half, full, kernel_size=2, stride=2, bias=False)
        self.join = _conv(full + CHANNELS, full, 3)
        self.last = _conv(full, 1, 3)
        self.linear = _conv(CHANNELS, 1, 3)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.linear.weight)
        self.activation = nn.LeakyReLU(0.1)

    def forward(
        self,
        local_field_ppm: Tensor,
        tv_chi_ppm: Tensor,
        tv_field_ppm: Tensor,
        tv_residual_ppm: Tensor,
        residual_tkd_ppm: Tensor,
        residual_iterated_tkd_ppm: Tensor,
        field_iterated_tkd_ppm: Tensor,
        mask: Tensor,
        field_noise_ppm: Tensor,
    ) -> Tensor:
        """Return ``chi_ppm``."""
        fields = (local_field_ppm, tv_field_ppm, tv_residual_ppm)
        maps = (tv_chi_ppm, residual_tkd_ppm, residual_iterated_tkd_ppm, field_iterated_tkd_ppm)
        v = torch.cat(
            [
                *(field / FIELD_SCALE_PPM for field in fields),
                *(chi / CHI_SCALE_PPM for chi in maps),
                mask * MASK_SCALE,
                mask * (field_noise_ppm / NOISE_SCALE_PPM),
            ],
            dim=1,
        )
        skip = self.encoder(self.stem(v))
        coarse = self.bottom(self.down(skip))
        decoded = self.decoder(self.up(coarse) + skip)
        full = self.activation(self.to_full(self.activation(decoded)))
        correction = self.last(self.activation(self.join(torch.cat([full, v], dim=1))))
        chi: Tensor = tv_chi_ppm + CHI_SCALE_PPM * (correction + self.linear(v))
        return chi


class _Residual(nn.Module):
    """``v`` and two convolutions of it, the second of which begins as zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels, 3)
        self.second = _conv(channels, channels, 3)
        nn.init.zeros_(self.second.weight)
        self.activation = nn.LeakyReLU(0.1)

    def forward(self, v: Tensor) -> Tensor:
        more: Tensor = self.second(self.activation(self.first(self.activation(v))))
        return v + more


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> TvUnet:
    """Build the network that a state dict describes, its widths read off the shapes.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    widths = ("stem.weight", "down.weight", "join.weight")
    require_keys(state, widths, "tv-unet")
    network = TvUnet(*(channels_of(state, key) for key in widths))
    load_strictly(network, state)
    return network.eval()


def _conv(channels_in: int, channels_out: int, size: int) -> nn.Conv3d:
    """Return one of size 3 that keeps the shape, or of size 2 that halves it."""
    step, pad = (1, 1) if size == 3 else (2, 0)
    return nn.Conv3d(channels_in, channels_out, size, step, pad, bias=False)
