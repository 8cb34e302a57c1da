"""The two CNNs of AFTER-QSM: a U-net that reconstructs, a residual dense network that refines.

Before the first one the field is turned until B0 is the third axis, and resampled; what it returns
is turned back for the second one. That is no part of the graphs. The published checkpoint holds
both states by name, and each network here finds its own half of it, key by key.

Xiong et al., arXiv 2211.13942 (2022), doi 10.48550/arXiv.2211.13942.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.blocks import conv_norm_relu, up_norm_relu
from qsm_deploy.export.networks.network import ANY_GEOMETRY, VOLUME, Choices, Network
from qsm_deploy.export.networks.residual_dense import ResidualDenseNet
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts
from qsm_deploy.runtime.card.card import TensorInfo

ROUGH_CHI = TensorInfo("rough_chi_ppm", "ppm", VOLUME)
RECON = "recon_model_state."
REFINE = "refine_model_state."


class AfterRecon(Network):
    """Local field with B0 along the third axis to a rough susceptibility, (n, 1, x, y, z) in ppm.

    Parameters
    ----------
    base
        Channels of the finest level; each further level has twice those of the level before.
    depth
        Times that the resolution is halved.
    """

    pipeline = "after"
    geometry = ANY_GEOMETRY

    def __init__(self, base: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.depth = depth
        self.recon_model_state = ReconUnet(base, depth)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(2**self.depth)

    def forward(self, local_field_ppm: Tensor) -> Tensor:
        """Return the rough ``chi_ppm`` of a (n, 1, x, y, z) field."""
        chi: Tensor = self.recon_model_state(local_field_ppm)
        return chi


class AfterRefine(Network):
    """Rough susceptibility to a refined one, both (n, 1, x, y, z) in ppm.

    Parameters
    ----------
    features, growth, blocks, layers, last
        Sizes of the :class:`ResidualDenseNet`.
    """

    inputs = (ROUGH_CHI,)
    pipeline = "after"
    geometry = ANY_GEOMETRY

    def __init__(
        self,
        features: int = 64,
        growth: int = 64,
        blocks: int = 4,
        layers: int = 3,
        last: int = 128,
    ) -> None:
        super().__init__()
        self.refine_model_state = ResidualDenseNet(features, growth, blocks, layers, last)

    @property
    def divisor(self) -> int:
        """Any spatial size will do."""
        return 1

    def forward(self, rough_chi_ppm: Tensor) -> Tensor:
        """Return the refined ``chi_ppm``."""
        chi: Tensor = self.refine_model_state(rough_chi_ppm)
        return chi


class ReconUnet(nn.Module):
    """The U-net of the first part, without a residual; a skip is taken before each pooling."""

    def __init__(self, base: int, depth: int) -> None:
        super().__init__()
        widths = [base * 2**level for level in range(depth + 1)]
        steps = list(pairwise(widths))
        self._input = _TwoConvs(1, base)
        self._encoders = nn.ModuleList(
            nn.Sequential(nn.MaxPool3d(2), _TwoConvs(fine, coarse)) for fine, coarse in steps
        )
        self._decoders = nn.ModuleList(_DecoderLevel(coarse, fine) for fine, coarse in steps[::-1])
        self._output = nn.Conv3d(base, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 1, x, y, z) to (n, 1, x, y, z)."""
        features = [self._input(x)]
        for encode in self._encoders:
            features.append(encode(features[-1]))
        v = features.pop()
        for decode in self._decoders:
            v = decode(v, features.pop())
        y: Tensor = self._output(v)
        return y


class _TwoConvs(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self._input = conv_norm_relu(channels_in, channels_out)
        self._output = conv_norm_relu(channels_out, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._output(self._input(x))
        return y


class _DecoderLevel(nn.Module):
    """Double the resolution and halve the channels, append the skip, convolve twice."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self._input = up_norm_relu(channels_in, channels_out)
        self._mid = conv_norm_relu(2 * channels_out, channels_out)
        self._output = conv_norm_relu(channels_out, channels_out)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        y: Tensor = self._output(self._mid(torch.cat([self._input(coarse), skip], dim=1)))
        return y


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> Network:
    """Build one of the two networks of a checkpoint, its size read off the shapes.

    Parameters
    ----------
    state
        Both halves, under the prefixes that the checkpoint gives them; the other one may lack.
    choices
        The option ``part`` is ``recon`` or ``refine``.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    refine = choices.options["part"] == "refine"
    network = _refine_from_shapes(state) if refine else _recon_from_shapes(state)
    other = RECON if refine else REFINE
    load_strictly(network, state, {key for key in state if key.startswith(other)})
    return network.eval()


def _recon_from_shapes(state: Mapping[str, Tensor]) -> Network:
    first = f"{RECON}_input._input.0.weight"
    require_keys(state, [first, f"{RECON}_encoders.0.1._input.0.weight"], "after-qsm, part recon")
    return AfterRecon(channels_of(state, first), count_parts(state, RECON + "_encoders.{}."))


def _refine_from_shapes(state: Mapping[str, Tensor]) -> Network:
    first, last = f"{REFINE}feature_extraction1.weight", f"{REFINE}conv.weight"
    dense = f"{REFINE}blocks.0.layers.0.conv.weight"
    require_keys(state, [first, last, dense], "after-qsm, part refine")
    return AfterRefine(
        features=channels_of(state, first),
        growth=channels_of(state, dense),
        blocks=count_parts(state, REFINE + "blocks.{}."),
        layers=count_parts(state, REFINE + "blocks.0.layers.{}."),
        last=channels_of(state, last),
    )
