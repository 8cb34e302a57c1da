"""Building blocks of several published networks: layers in the order their keys count them."""

from torch import Tensor, nn


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
