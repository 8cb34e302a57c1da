"""The residual dense network that refines susceptibility in AFTER-QSM.

It keeps the resolution throughout and has no normalisation; the only activations are the ReLUs of
its dense layers. Attribute names are the authors'.

Xiong et al., arXiv 2211.13942 (2022), doi 10.48550/arXiv.2211.13942.
"""

import torch
from torch import Tensor, nn


class ResidualDenseNet(nn.Module):
    """(n, 1, x, y, z) to the same shape, any size.

    Parameters
    ----------
    features
        Channels between the blocks.
    growth
        Channels that each dense layer appends.
    blocks, layers
        Dense blocks, and dense layers in each.
    last
        Channels before the last convolution.
    """

    def __init__(self, features: int, growth: int, blocks: int, layers: int, last: int) -> None:
        super().__init__()
        self.feature_extraction1 = _conv(1, features)
        self.feature_extraction2 = _conv(features, features)
        self.blocks = nn.ModuleList(DenseBlock(features, growth, layers) for _ in range(blocks))
        self.feature_fusion_global = nn.Sequential(
            nn.Conv3d(blocks * features, features, kernel_size=1), _conv(features, features)
        )
        self.conv = _conv(features, last)
        self.output = nn.Conv3d(last, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 1, x, y, z) to (n, 1, x, y, z)."""
        shallow = self.feature_extraction1(x)
        v = self.feature_extraction2(shallow)
        outputs = []
        for block in self.blocks:
            v = block(v)
            outputs.append(v)
        fused = self.feature_fusion_global(torch.cat(outputs, dim=1))
        y: Tensor = self.output(self.conv(fused + shallow))
        return y


class DenseBlock(nn.Module):
    """Dense layers, their channels fused by a 1x1x1 convolution, added to the input."""

    def __init__(self, features: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DenseLayer(features + layer * growth, growth) for layer in range(layers)
        )
        self.feature_fusion_local = nn.Conv3d(features + layers * growth, features, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, features, x, y, z) to the same shape."""
        v = x
        for layer in self.layers:
            v = layer(v)
        y: Tensor = self.feature_fusion_local(v) + x
        return y


class DenseLayer(nn.Module):
    """Append the rectified features of a convolution to its input."""

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.conv = _conv(channels_in, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, x, y, z) to (n, c + growth, x, y, z)."""
        return torch.cat([x, torch.relu(self.conv(x))], dim=1)


def _conv(channels_in: int, channels_out: int) -> nn.Conv3d:
    return nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1)
