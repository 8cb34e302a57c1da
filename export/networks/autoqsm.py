"""AutoQSM: total field of the whole head to susceptibility, without a mask.

The authors run it on blocks of 64 voxels a side, keep the middle of each, and fade one into the
next.

Wei et al., NeuroImage 202:116064 (2019), doi 10.1016/j.neuroimage.2019.116064.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool3d

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.network import TOTAL_FIELD, Choices, Network
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts
from qsm_deploy.runtime.card.card import GeometryLimits, Tiles

CONVENTIONS = {"field_sign": -1.0, "unmasked": 1.0}
WEIGHTS, OPTIMISER = "model_weights/", "optimizer_weights/"
LAYER = re.compile(r"(?:model_weights/)?(conv3d|conv3d_transpose)_(\d+)/.*")


class AutoQSM(Network):
    """Total field, of the opposite sign and not masked, to susceptibility, both in ppm.

    Parameters
    ----------
    widths
        Channels of the resolutions, finest first.
    """

    inputs = (TOTAL_FIELD,)
    geometry = GeometryLimits(None, None, (0.0, 0.0, 1.0), 2.0)
    why_whole = "its authors run it on blocks of one size, whose rims count"
    tiles = Tiles((64,) * 3, (32,) * 3, (24,) * 3, "edge", "ramp")
    constants = CONVENTIONS

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(_Pair(*two) for two in pairwise((1, *widths)))
        steps = list(pairwise(widths[::-1]))
        self.up = nn.ModuleList(nn.ConvTranspose3d(*two, kernel_size=2, stride=2) for two in steps)
        self.decoder = nn.ModuleList(_Pair(2 * c, c) for _, c in steps)
        self.out = nn.Conv3d(widths[0], 1, kernel_size=1)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(2 ** len(self.up))

    def forward(self, total_field_ppm: Tensor) -> Tensor:
        """Return ``chi_ppm``, which is less than 1 on both sides."""
        features = [self.encoder[0](total_field_ppm)]
        for encode in self.encoder[1:]:
            features.append(encode(max_pool3d(features[-1], 2)))
        v = features.pop()
        for up, decode in zip(self.up, self.decoder, strict=True):
            v = decode(torch.cat([up(v), features.pop()], dim=1))
        return torch.tanh(self.out(v))


class _Pair(nn.Sequential):
    """Two convolutions under the keys ``0`` and ``1``, each rectified."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1),
            nn.Conv3d(channels_out, channels_out, kernel_size=3, padding=1),
        )

    def forward(self, v: Tensor) -> Tensor:
        for conv in self:
            v = torch.relu(conv(v))
        return v


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> AutoQSM:
    """Build the network that a Keras file describes, its size read off names and shapes.

    Parameters
    ----------
    state
        Under the names in the authors' ``.hdf5``, whose optimiser's state is left out, or ours.
    choices
        None matters here.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    authors_keys = dict(_keras_keys(state))
    ours = {theirs: key for key, theirs in authors_keys.items()}
    own_state = {
        ours.get(key, key): value.permute(4, 3, 0, 1, 2) if ours and value.ndim == 5 else value
        for key, value in state.items()
        if not key.startswith(OPTIMISER)
    }
    depth = count_parts(own_state, "encoder.{}.")
    kernels = [f"encoder.{level}.0.weight" for level in range(max(1, depth))]
    require_keys(state, [authors_keys.get(key, key) for key in kernels], "autoqsm")
    network = AutoQSM(tuple(channels_of(own_state, key) for key in kernels))
    load_strictly(network, own_state, authors_keys=authors_keys)
    return network.eval()


def our_layers(pools: int) -> dict[str, list[str]]:
    """Return our names of the layers, by their kind in Keras, in the order of their making."""
    encoders = [f"encoder.{level}.{n}" for level in range(pools + 1) for n in (0, 1)]
    decoders = [f"decoder.{level}.{n}" for level in range(pools) for n in (0, 1)]
    ups = [f"up.{level}" for level in range(pools)]
    return {"conv3d": [*encoders, *decoders, "out"], "conv3d_transpose": ups}


def _keras_keys(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Give our name of each tensor in a file of Keras, and its place there.

    Keras counts the layers of a session, so that only the order of their numbers says anything.
    """
    found = [match.groups() for key in state if (match := LAYER.fullmatch(key))]
    within = WEIGHTS if any(key.startswith(WEIGHTS) for key in state) else ""
    pools = len({number for kind, number in found if kind == "conv3d_transpose"})
    for kind, layers in our_layers(pools).items():
        numbers = sorted({int(number) for k, number in found if k == kind})
        for layer, number in zip(layers, numbers, strict=False):
            theirs = f"{kind}_{number}"
            for what, name in (("weight", "kernel"), ("bias", "bias")):
                yield f"{layer}.{what}", f"{within}{theirs}/{theirs}/{name}:0"
