"""The wide residual network that LPCNN, MoDL-QSM and SpiNet-QSM learn as their prior.

Seventeen 3x3x3 convolutions at full resolution and three 1x1x1 ones: an output voxel sees 17
voxels to each side, and patches with that halo equal the whole volume. Attribute names are those
of LPCNN, Lai et al., MICCAI 2020, doi 10.1007/978-3-030-59713-9_13.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import require_keys
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation around a shortcut; keys ``conv1`` to ``bn2``."""

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, channels)
        self.bn1 = nn.BatchNorm3d(channels, eps=epsilon)
        self.conv2 = _conv3(channels, channels)
        self.bn2 = nn.BatchNorm3d(channels, eps=epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, x, y, z) to the same shape."""
        y = nn.functional.relu(self.bn1(self.conv1(x)))
        return nn.functional.relu(self.bn2(self.conv2(y)) + x)


def wide_resnet(
    channels: int,
    width: int = 32,
    blocks: int = 8,
    *,
    epsilon: float = 1e-5,
    last_bias: bool = False,
) -> nn.Sequential:
    """Make a network that maps (n, channels, x, y, z) of any size to the same shape.

    Parameters
    ----------
    channels
        Of its input and output.
    width
        Feature channels.
    blocks
        Residual blocks.
    epsilon
        Added to the variance in batch normalisation, 1e-5 in PyTorch and 1e-3 in Keras.
    last_bias
        Whether the last convolution has a bias; no other has.
    """
    return nn.Sequential(
        _conv3(channels, width),
        nn.ReLU(),
        nn.Sequential(*(ResidualBlock(width, epsilon) for _ in range(blocks))),
        nn.Conv3d(width, width, kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv3d(width, width, kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv3d(width, channels, kernel_size=1, bias=last_bias),
    )


def wide_resnet_like(
    state: Mapping[str, Tensor],
    channels: int,
    name: str,
    *,
    epsilon: float = 1e-5,
    last_bias: bool = False,
) -> nn.Sequential:
    """Make the network whose weights a state dict holds under ``gen.``, without loading them.

    Width and number of blocks are read off the state; ``name`` is the whole network's.

    Raises
    ------
    WeightsError
        If the keys that its size is read from are missing.
    """
    require_keys(state, ["gen.0.weight", "gen.2.0.conv1.weight"], name)
    width, blocks = channels_of(state, "gen.0.weight"), count_parts(state, "gen.2.{}.")
    return wide_resnet(channels, width, blocks, epsilon=epsilon, last_bias=last_bias)


def _conv3(channels_in: int, channels_out: int) -> nn.Conv3d:
    return nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
