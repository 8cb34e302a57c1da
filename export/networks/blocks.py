"""Building blocks whose attribute names match those of several published networks."""

from torch import Tensor, nn


class ConvBlock(nn.Module):
    """3x3x3 convolution, batch normalisation (eps 1e-5), ReLU; keys ``conv.0`` and ``conv.1``."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1),
            nn.BatchNorm3d(channels_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c_in, x, y, z) to (n, c_out, x, y, z)."""
        y: Tensor = self.conv(x)
        return y


class UpBlock(nn.Module):
    """2x2x2 transposed convolution of stride 2, batch normalisation, ReLU; keys ``deconv.*``."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.deconv = nn.Sequential(
            nn.ConvTranspose3d(channels_in, channels_out, kernel_size=2, stride=2),
            nn.BatchNorm3d(channels_out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c_in, x, y, z) to (n, c_out, 2x, 2y, 2z)."""
        y: Tensor = self.deconv(x)
        return y
