"""The plain U-net that xqsm-unet and iQSM share: it differs between them only in its size.

It is a part, not a deployable network: what surrounds it (the layer before it, a residual, a
scale) is another's. Its attribute names are the authors', so that their checkpoints load key by
key: ``EncodeConvs.{i}.EncodeConv``, ``MidConv1.MidConv``, ``DecodeConvs.{i}.{up,DecodeConv}``,
``FinalConv``.

Gao et al., NMR Biomed 34:e4461 (2021), doi 10.1002/nbm.4461.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import require_keys
from qsm_deploy.export.networks.blocks import conv_norm_relu, up_norm_relu
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts


class EncoderDecoder(nn.Module):
    """(n, channels_in, x, y, z) to (n, 1, x, y, z), without a residual.

    Level i of ``depth`` has ``base * 2**i`` channels. The bottleneck doubles those of the coarsest
    level and returns to them; each up-sampling keeps the channels, and the second convolution of
    each decoder level halves them, but for the finest, which keeps ``base``.

    Parameters
    ----------
    channels_in
        Input channels: 1 for xqsm-unet and iQSM v1, 16 for iQSM v2.
    base
        Channels of the finest level: 64 for xqsm-unet, 16 for iQSM.
    depth
        Levels, each of which halves the resolution: 2 for xqsm-unet, 4 for iQSM.
    """

    def __init__(self, channels_in: int, base: int, depth: int) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(depth)]
        coarsest = widths[-1]
        self.EncodeConvs = nn.ModuleList(
            _named("EncodeConv", _two_convs(before, c, c))
            for before, c in zip([channels_in, *widths], widths, strict=False)
        )
        self.MidConv1 = _named("MidConv", _two_convs(coarsest, 2 * coarsest, coarsest))
        self.DecodeConvs = nn.ModuleList(
            DecoderLevel(c, after)
            for c, after in zip(widths[::-1], [*widths[-2::-1], base], strict=True)
        )
        self.FinalConv = nn.Conv3d(base, 1, kernel_size=1)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(2 ** len(self.EncodeConvs))

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, channels_in, x, y, z) to (n, 1, x, y, z)."""
        v = features
        skips = []
        for encode in self.EncodeConvs:
            skips.append(encode(v))
            v = nn.functional.max_pool3d(skips[-1], 2)
        v = self.MidConv1(v)
        for decode, skip in zip(self.DecodeConvs, reversed(skips), strict=True):
            v = decode(v, skip)
        y: Tensor = self.FinalConv(v)
        return y


class DecoderLevel(nn.Module):
    """Double the resolution at the same channels, append the skip, convolve twice."""

    def __init__(self, channels: int, channels_out: int) -> None:
        super().__init__()
        self.up = up_norm_relu(channels, channels)
        self.DecodeConv = _two_convs(2 * channels, channels, channels_out)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        """Map (n, c, x, y, z) and a skip (n, c, 2x, 2y, 2z) to (n, c_out, 2x, 2y, 2z)."""
        y: Tensor = self.DecodeConv(torch.cat([self.up(coarse), skip], dim=1))
        return y


def encoder_decoder_size(state: Mapping[str, Tensor], name: str) -> tuple[int, int, int]:
    """Return ``channels_in``, ``base`` and ``depth`` of the U-net that a state dict describes.

    Parameters
    ----------
    state
        Its keys as they stand in this module, without a prefix.
    name
        Of the network, for the message.

    Raises
    ------
    WeightsError
        If the first layer is missing or has no channels.
    """
    first = "EncodeConvs.0.EncodeConv.0.weight"
    require_keys(state, [first], name)
    channels_in, base = channels_of(state, first, axis=1), channels_of(state, first)
    return channels_in, base, count_parts(state, "EncodeConvs.{}.")


def _named(key: str, module: nn.Module) -> nn.Sequential:
    """Give a module one more level of naming."""
    return nn.Sequential(OrderedDict({key: module}))


def _two_convs(channels_in: int, channels_mid: int, channels_out: int) -> nn.Sequential:
    """Two convolution blocks whose layers are numbered straight through, 0 to 5."""
    return nn.Sequential(
        *conv_norm_relu(channels_in, channels_mid), *conv_norm_relu(channels_mid, channels_out)
    )
