"""QSMGAN: local field to susceptibility by the U-net that was the generator of a GAN.

The authors run it on blocks of 64 voxels a side and keep the middle of each; a whole volume gives
other numbers, since every convolution pads at the rim of a block. Attribute names are theirs.

Chen et al., NeuroImage 207:116389 (2020), doi 10.1016/j.neuroimage.2019.116389.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d

from qsm_deploy.export.checkpoints.normalisation import number_from
from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts
from qsm_deploy.kernels.errors import WeightsError
from qsm_deploy.runtime.card.card import GeometryLimits, Tiles

SLOPE = 0.1
LARGEST_TANH = 0.999999  # rounding makes 1 of what is larger, and no map of that
INPUT_SCALE, OUTPUT_SCALE = 100.0, 10.0
CONFIG = "config.json"
CONVENTIONS = {"field_sign": -1.0}


class QSMGAN(Network):
    """Local field, of the opposite sign, to susceptibility, both (n, 1, x, y, z) in ppm.

    It was trained to give ``tanh(output_scale * chi_ppm)``. The hyperbolic tangent at its end and
    the inverse of it cancel, but for the limit of what either may be.

    Parameters
    ----------
    channels
        Of the finest resolution; each further one has twice those of the one before.
    pools
        Times that the resolution is halved.
    input_scale, output_scale
        What field and susceptibility are multiplied by.
    """

    geometry = GeometryLimits((0.8, 0.8, 0.8), 0.1, (0.0, 0.0, 1.0), 2.0)
    why_whole = "its authors run it on blocks of one size, whose rims count"
    tiles = Tiles((64,) * 3, (48,) * 3, (48,) * 3, "zero", "none")
    constants = CONVENTIONS

    def __init__(
        self,
        channels: int = 16,
        pools: int = 4,
        input_scale: float = INPUT_SCALE,
        output_scale: float = OUTPUT_SCALE,
    ) -> None:
        super().__init__()
        self.input_scale, self.output_scale = input_scale, output_scale
        widths = [channels * 2**level for level in range(pools)]
        self.down_sample_layers = nn.ModuleList(
            _Block(before, after) for before, after in pairwise((1, *widths))
        )
        self.conv = _Block(widths[-1], widths[-1])
        self.conv_transpose_layers = nn.ModuleList(
            nn.ConvTranspose3d(c, c, kernel_size=2, stride=2) for c in widths[::-1]
        )
        self.up_sample_layers = nn.ModuleList(
            _Block(2 * c, after)
            for c, after in zip(widths[::-1], [*widths[-2::-1], channels], strict=True)
        )
        self.conv2 = nn.Sequential(nn.Conv3d(channels, 1, 1), nn.Conv3d(1, 1, 1))

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(2 ** len(self.down_sample_layers))

    def forward(self, local_field_ppm: Tensor) -> Tensor:
        """Return ``chi_ppm``."""
        v = self.input_scale * local_field_ppm
        skips = []
        for down in self.down_sample_layers:
            skips.append(down(v))
            v = avg_pool3d(skips[-1], 2)
        v = self.conv(v)
        for up, block in zip(self.conv_transpose_layers, self.up_sample_layers, strict=True):
            v = block(torch.cat([up(v), skips.pop()], dim=1))
        most = math.atanh(LARGEST_TANH)
        chi: Tensor = self.conv2(v).clamp(-most, most) / self.output_scale
        return chi


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (channels_in, channels_out):
            layers += [
                nn.Conv3d(before, channels_out, kernel_size=3, padding=1),
                nn.BatchNorm3d(channels_out),
                nn.LeakyReLU(SLOPE),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, v: Tensor) -> Tensor:
        y: Tensor = self.layers(v)
        return y


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> QSMGAN:
    """Build the generator that a state dict describes, its width and depth read off the shapes.

    Parameters
    ----------
    state
        Under the authors' names.
    choices
        Optionally the settings of ``config.json``, which lies beside their weights.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape, or the settings are of a network that
        does not give a hyperbolic tangent.
    """
    first = "down_sample_layers.0.layers.0.weight"
    require_keys(state, [first], "qsmgan")
    pools = count_parts(state, "down_sample_layers.{}.")
    network = QSMGAN(channels_of(state, first), pools, *_scales(choices.normalisation))
    load_strictly(network, state)
    return network.eval()


def _scales(given: Mapping[str, NDArray[Any]]) -> tuple[float, float]:
    """Return the scales that were passed, or else the published ones."""
    if not given:
        return INPUT_SCALE, OUTPUT_SCALE
    ends = {"netG_args.tanh": "True", "dset_args.output_transform": "tanh"}
    for name, expected in ends.items():
        if name in given and (seen := str(given[name])) != expected:
            raise WeightsError(
                f"{name} is {seen} in {CONFIG}, expected {expected}; pass the files of the "
                "published network"
            )
    scale_in, scale_out = (
        number_from(given, f"dset_args.{name}_scale", CONFIG, positive=True)
        for name in ("input", "output")
    )
    return scale_in, scale_out
