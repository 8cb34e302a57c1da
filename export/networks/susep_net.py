"""SUSEP-Net: susceptibility parted into paramagnetic and diamagnetic sources.

One encoder sees all three maps; the susceptibility alone guides how its deepest features are
parted, the diamagnetic ones after the paramagnetic ones. Each source has a decoder of its own. The
features that training contrasts are left out. Attribute names are the authors'.

Li et al., arXiv 2506.13293 (2025), doi 10.48550/arXiv.2506.13293.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool3d

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks import separation
from qsm_deploy.export.networks.blocks import ConvBlock
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.separation import statistics, undo_z_score, z_score
from qsm_deploy.export.networks.state_sizes import channels_of

NUMBERS_FILE = "all_mean_std.mat"
AUTHORS_NUMBERS = {
    "chi": "all_mean_std.qsm.{}",
    "field": "all_mean_std.lfs.{}",
    "r2prime": "all_mean_std.r2_prime.{}",
    "chi_positive": "all_mean_std.chi_pos.{}",
    "chi_negative": "all_mean_std.chi_neg.{}",
}


class SusepNet(Network):
    """Local field [ppm], susceptibility [ppm], R2' [Hz] and mask to both sources, in ppm.

    A decoder gives nothing below zero, so no source in the mask is less than its mean.

    Parameters
    ----------
    base
        Channels of the finest resolution; each further one has twice those of the one before.
    normalisation
        Mean and standard deviation of ``chi``, ``field``, ``r2prime`` [Hz], ``chi_positive`` and
        ``chi_negative``.
    """

    inputs = separation.INPUTS
    output, further_outputs = separation.OUTPUT, separation.FURTHER_OUTPUTS
    pad_front = "none"
    divisor = 8

    def __init__(self, base: int, normalisation: Mapping[str, float]) -> None:
        super().__init__()
        self.normalisation = dict(normalisation)
        deepest = 4 * base
        self.Unet_encoder = _Encoder(base)
        self.QSM_encoder = nn.ModuleDict({"fc_pos": _guide(base), "fc_neg": _guide(base)})
        self.CascadeInteractionModule3D = _Interaction(deepest)
        self.bottleneck_pos = ConvBlock(deepest, 2 * deepest)
        self.bottleneck_neg = ConvBlock(deepest, 2 * deepest)
        self.decoder_pos = _Decoder(base)
        self.decoder_neg = _Decoder(base)

    def forward(
        self, local_field_ppm: Tensor, chi_ppm: Tensor, r2prime_hz: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return both magnitudes, (n, 1, x, y, z) each, not masked."""
        numbers = self.normalisation
        chi = z_score(chi_ppm, mask, numbers, "chi")
        r2prime = z_score(r2prime_hz, mask, numbers, "r2prime")
        field = z_score(local_field_ppm, mask, numbers, "field")
        deep, skips = self.Unet_encoder(torch.cat([chi, r2prime, field], dim=1))
        guides = self.QSM_encoder["fc_pos"](chi), self.QSM_encoder["fc_neg"](chi)
        positive, negative = self.CascadeInteractionModule3D(deep, *guides)
        y_positive = self.decoder_pos(self.bottleneck_pos(positive), skips)
        y_negative = self.decoder_neg(self.bottleneck_neg(negative), skips)
        return (
            undo_z_score(y_positive, numbers, "chi_positive"),
            undo_z_score(y_negative, numbers, "chi_negative"),
        )


class _Encoder(nn.Module):
    """Three maps to the deepest features, and those before each pooling, finest first."""

    def __init__(self, base: int) -> None:
        super().__init__()
        self.enc1 = ConvBlock(3, base)
        self.enc2 = ConvBlock(base, 2 * base)
        self.enc3 = ConvBlock(2 * base, 4 * base)

    def forward(self, maps: Tensor) -> tuple[Tensor, list[Tensor]]:
        v, skips = maps, []
        for encode in (self.enc1, self.enc2, self.enc3):
            skips.append(encode(v))
            v = max_pool3d(skips[-1], 2)
        return v, skips


def _guide(base: int) -> nn.Sequential:
    """Return what maps the susceptibility to as many features as the encoder's deepest."""
    widths = (1, base, 2 * base, 4 * base)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [ConvBlock(before, after), nn.MaxPool3d(2)]
    return nn.Sequential(*layers)


class _Interaction(nn.Module):
    """The encoder's features parted in two, the second after what became of the first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.interaction_groups_pos = nn.ModuleList(_Group(channels) for _ in range(2))
        self.concat_conv = nn.Conv3d(2 * channels, channels, kernel_size=1)
        self.interaction_groups_neg = nn.ModuleList(_Group(channels) for _ in range(2))

    def forward(
        self, deep: Tensor, guide_positive: Tensor, guide_negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        positive = deep
        for group in self.interaction_groups_pos:
            positive = group(positive, guide_positive)
        negative = self.concat_conv(torch.cat([deep, positive], dim=1))
        for group in self.interaction_groups_neg:
            negative = group(negative, guide_negative)
        return positive, negative


class _Group(nn.Module):
    """Features that a guide replaces in part, and two residual steps on them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        gates = {name: ConvBlock(channels, channels) for name in ("update_gate", "out_gate")}
        self.SRU = nn.ModuleDict(gates)
        self.leff_blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(channels, channels, kernel_size=1),
                nn.ReLU(),
                nn.Conv3d(channels, channels, kernel_size=3, padding=1),
            )
            for _ in range(2)
        )

    def forward(self, v: Tensor, guide: Tensor) -> Tensor:
        share = torch.sigmoid(self.SRU["update_gate"](guide))
        v = v * (1 - share) + torch.tanh(self.SRU["out_gate"](guide)) * share
        for block in self.leff_blocks:
            v = v + block(v)
        return v


class _Decoder(nn.Module):
    """The features of a source up to its map, of no value below zero."""

    def __init__(self, base: int) -> None:
        super().__init__()
        for level, after in ((3, 4 * base), (2, 2 * base), (1, base)):
            up = nn.ConvTranspose3d(2 * after, after, kernel_size=2, stride=2)
            self.add_module(f"upconv{level}", up)
            self.add_module(f"dec{level}", ConvBlock(2 * after, after))
        self.conv_last = nn.Conv3d(base, 1, kernel_size=1)

    def forward(self, v: Tensor, skips: list[Tensor]) -> Tensor:
        for level, skip in zip((3, 2, 1), reversed(skips), strict=True):
            up = self.get_submodule(f"upconv{level}")(v)
            v = self.get_submodule(f"dec{level}")(torch.cat([up, skip], dim=1))
        return torch.relu(self.conv_last(v))


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> SusepNet:
    """Build the network that a state dict describes, its width read off the shapes.

    Parameters
    ----------
    state
        Under the authors' names.
    choices
        With the numbers of ``all_mean_std.mat`` as its normalisation.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape, or the normalisation is.
    """
    first = "Unet_encoder.enc1.conv.0.weight"
    require_keys(state, [first], "susep-net")
    numbers = statistics(choices.normalisation, AUTHORS_NUMBERS, NUMBERS_FILE)
    network = SusepNet(channels_of(state, first), numbers)
    load_strictly(network, state)
    return network.eval()
