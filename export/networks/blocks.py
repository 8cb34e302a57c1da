"""Building blocks of several published networks: layers in the order their keys count them."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def conv_norm_relu(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3x3 convolution, batch normalisation (eps 1e-5), ReLU; keys ``0`` and ``1``."""
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1),
        nn.BatchNorm3d(channels_out),
        nn.ReLU(),
    )


def up_norm_relu(channels_in: int, channels_out: int) -> nn.Sequential:
    """2x2x2 transposed convolution of stride 2, batch normalisation, ReLU; keys ``0`` and ``1``."""
    return nn.Sequential(
        nn.ConvTranspose3d(channels_in, channels_out, kernel_size=2, stride=2),
        nn.BatchNorm3d(channels_out),
        nn.ReLU(),
    )


class ConvBlock(nn.Module):
    """:func:`conv_norm_relu` under the keys ``conv.0`` and ``conv.1``."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = conv_norm_relu(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c_in, x, y, z) to (n, c_out, x, y, z)."""
        y: Tensor = self.conv(x)
        return y


class UpBlock(nn.Module):
    """:func:`up_norm_relu` under the keys ``deconv.0`` and ``deconv.1``."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.deconv = up_norm_relu(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c_in, x, y, z) to (n, c_out, 2x, 2y, 2z)."""
        y: Tensor = self.deconv(x)
        return y


def fold_batch_norm(network: nn.Module) -> None:
    """Put each batch normalisation that directly follows a convolution into it, in place.

    The exporter does so by itself, but not where a network calls the same layers repeatedly.
    Only for networks that call such neighbours one after the other.
    """
    for module in network.eval().modules():
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
