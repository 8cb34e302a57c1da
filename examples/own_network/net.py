"""A small U-net of three levels, as anyone may have one: plain PyTorch, nothing of qsm_deploy."""

import torch
from torch import Tensor, nn

WIDTHS = (8, 16, 32)


class SmallUnet(nn.Module):
    """(n, 1, x, y, z) normalised field to the normalised map, sizes multiples of 4."""

    def __init__(self, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        first, second, third = widths
        self.encode1 = _double(1, first)
        self.encode2 = _double(first, second)
        self.bottom = _double(second, third)
        self.up2 = nn.ConvTranspose3d(third, second, kernel_size=2, stride=2)
        self.decode2 = _double(2 * second, second)
        self.up1 = nn.ConvTranspose3d(second, first, kernel_size=2, stride=2)
        self.decode1 = _double(2 * first, first)
        self.last = nn.Conv3d(first, 1, kernel_size=1)
        self.pool = nn.MaxPool3d(2)

    def forward(self, local_field_ppm: Tensor) -> Tensor:
        """Return the map, of the field's shape."""
        full = self.encode1(local_field_ppm)
        half = self.encode2(self.pool(full))
        quarter = self.bottom(self.pool(half))
        half = self.decode2(torch.cat([self.up2(quarter), half], dim=1))
        full = self.decode1(torch.cat([self.up1(half), full], dim=1))
        chi: Tensor = self.last(full)
        return chi


def _double(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return two convolutions, each with batch normalisation and a ReLU."""
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1),
        nn.BatchNorm3d(channels_out),
        nn.ReLU(),
        nn.Conv3d(channels_out, channels_out, kernel_size=3, padding=1),
        nn.BatchNorm3d(channels_out),
        nn.ReLU(),
    )


def build() -> nn.Module:
    """Return the network without its weights: what ``--module net.py:build`` calls."""
    return SmallUnet()
