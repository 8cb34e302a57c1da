"""Octave convolutions: features in two bands, full resolution and half, that exchange.

In a convolution each branch is normalised by itself before the branches of a band are added and
rectified; from the low to the high band the order is convolution, up-sampling, normalisation.
Attribute names are those of the xQSM authors, so that their checkpoints load key by key.

Gao et al., NMR Biomed 34:e4461 (2021), doi 10.1002/nbm.4461.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, batch_norm, max_pool3d

# (n, c, x, y, z) and (n, c, x/2, y/2, z/2)
Bands = tuple[Tensor, Tensor]


class OctaveInput(nn.Module):
    """A volume to two bands; its average over 2x2x2 voxels feeds the low one.

    Parameters
    ----------
    channels_in
        Of the volume.
    channels_out
        Of each band.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.convHH = _conv(channels_in, channels_out)
        self.convHL = _conv(channels_in, channels_out)
        self.BN_HH = nn.BatchNorm3d(channels_out)
        self.BN_HL = nn.BatchNorm3d(channels_out)

    def forward(self, x: Tensor) -> Bands:
        """Map (n, c_in, x, y, z) to two bands of c_out channels."""
        high = torch.relu(self.BN_HH(self.convHH(x)))
        low = torch.relu(self.BN_HL(self.convHL(avg_pool3d(x, 2))))
        return high, low


class OctaveConv(nn.Module):
    """Two bands to two bands.

    Parameters
    ----------
    channels_in, channels_out
        Of each band.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.convHH = _conv(channels_in, channels_out)
        self.convLL = _conv(channels_in, channels_out)
        self.convHL = _conv(channels_in, channels_out)
        self.convLH = _conv(channels_in, channels_out)
        self.up = _up(channels_out)
        self.BN_HH = nn.BatchNorm3d(channels_out)
        self.BN_LH = nn.BatchNorm3d(channels_out)
        self.BN_LL = nn.BatchNorm3d(channels_out)
        self.BN_HL = nn.BatchNorm3d(channels_out)

    def forward(self, bands: Bands) -> Bands:
        """Map two bands of c_in channels to two of c_out."""
        high, low = bands
        to_high = self.BN_HH(self.convHH(high)) + self.BN_LH(self.up(self.convLH(low)))
        to_low = self.BN_LL(self.convLL(low)) + self.BN_HL(self.convHL(avg_pool3d(high, 2)))
        return torch.relu(to_high), torch.relu(to_low)


class OctaveOutput(nn.Module):
    """Two bands to one volume.

    Parameters
    ----------
    channels_in
        Of each band.
    channels_mid
        Of the volume before the last 1x1x1 convolution.
    """

    def __init__(self, channels_in: int, channels_mid: int) -> None:
        super().__init__()
        self.convHH = _conv(channels_in, channels_mid)
        self.convLH = _conv(channels_in, channels_mid)
        self.up = _up(channels_mid)
        self.BN_HH = nn.BatchNorm3d(channels_mid)
        self.BN_LH = nn.BatchNorm3d(channels_mid)
        self.FinalConv = nn.Conv3d(channels_mid, 1, kernel_size=1)

    def forward(self, bands: Bands) -> Tensor:
        """Map two bands to (n, 1, x, y, z)."""
        high, low = bands
        v = torch.relu(self.BN_HH(self.convHH(high)) + self.BN_LH(self.up(self.convLH(low))))
        y: Tensor = self.FinalConv(v)
        return y


class OctaveUp(nn.Module):
    """Double the resolution of both bands, whose channels stay. Inference only.

    The high band of the input has the resolution of the low band of the output, so that one needs
    no up-sampling on that way, and a factor of 4 on the opposite one. Here, unlike elsewhere, the
    branches are normalised after they are added. With fixed statistics that equals normalising one
    and scaling the other, and so both fold into the convolutions when exported.

    Parameters
    ----------
    channels
        Of each band.
    """

    zero: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up_HH = _up(channels)
        self.up_LH = nn.ConvTranspose3d(channels, channels, kernel_size=4, stride=4)
        self.BN_H = nn.BatchNorm3d(channels)
        self.up_LL = _up(channels)
        self.up_HL = _conv(channels, channels)
        self.BN_L = nn.BatchNorm3d(channels)
        self.register_buffer("zero", torch.zeros(channels), persistent=False)

    def forward(self, bands: Bands) -> Bands:
        """Map two bands to two of twice the resolution."""
        high, low = bands
        to_high = self.BN_H(self.up_HH(high)) + self._scale(self.up_LH(low), self.BN_H)
        to_low = self.BN_L(self.up_LL(low)) + self._scale(self.up_HL(high), self.BN_L)
        return torch.relu(to_high), torch.relu(to_low)

    def _scale(self, x: Tensor, norm: nn.BatchNorm3d) -> Tensor:
        """Multiply by the factor of a normalisation, without its offset."""
        return batch_norm(x, self.zero, norm.running_var, norm.weight, self.zero, eps=norm.eps)


class OctaveDecoder(nn.Module):
    """Double the resolution at the same channels, append the skip, convolve twice."""

    def __init__(self, channels: int, channels_out: int) -> None:
        super().__init__()
        self.up = OctaveUp(channels)
        self.DecodeConv1 = OctaveConv(2 * channels, channels)
        self.DecodeConv2 = OctaveConv(channels, channels_out)

    def forward(self, coarse: Bands, skip: Bands) -> Bands:
        """Map bands and a skip of twice their resolution to bands of the skip's."""
        bands: Bands = self.DecodeConv2(self.DecodeConv1(concatenate(self.up(coarse), skip)))
        return bands


def through_levels(
    bands: Bands, encoders: nn.ModuleList, middle: nn.Module, decoders: nn.ModuleList
) -> Bands:
    """Run a U-net: down with a skip before each pooling, through the middle, and up again."""
    skips: list[Bands] = []
    for encode in encoders:
        skips.append(encode(bands))
        bands = pool(skips[-1])
    bands = middle(bands)
    for decode, skip in zip(decoders, reversed(skips), strict=True):
        bands = decode(bands, skip)
    return bands


def pool(bands: Bands) -> Bands:
    """Halve the resolution of both bands by the maximum."""
    return max_pool3d(bands[0], 2), max_pool3d(bands[1], 2)


def concatenate(first: Bands, second: Bands) -> Bands:
    """Join the channels of two pairs of bands, band by band."""
    return torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]], dim=1)


def _conv(channels_in: int, channels_out: int) -> nn.Conv3d:
    return nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1)


def _up(channels: int) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(channels, channels, kernel_size=2, stride=2)
