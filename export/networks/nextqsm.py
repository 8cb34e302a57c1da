"""NeXtQSM: total field to local field by one U-net, and to susceptibility by a loop around another.

The loop steps down the misfit of the field and the mean magnitude of the second U-net's output. It
runs in the runtime, since its norms and Fourier steps are those of the whole padded volume; what it
needs of the network is the gradient of that magnitude, and the graph computes it: backwards through
the U-net by hand, which leaves plain convolutions for any backend.

Cognolato et al., Med Image Anal 84:102700 (2023), doi 10.1016/j.media.2022.102700.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, conv_transpose3d, pad

from qsm_deploy.export.checkpoints.normalisation import numbers_from
from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.network import (
    ANY_GEOMETRY,
    LOCAL_FIELD,
    TOTAL_FIELD,
    VOLUME,
    Choices,
    Network,
)
from qsm_deploy.export.networks.state_sizes import channels_of
from qsm_deploy.runtime.card.card import TensorInfo

LEVELS = {"bf": 7, "vn": 6}
ITERATIONS = 6
LAMBDAS = "zdir_calc-HR-vn-lambdas"


class Unet(nn.Module):
    """(n, 1, x, y, z) to the same shape, by convolutions of stride 2 and back.

    TensorFlow puts the odd zero of a convolution of stride 2 behind, and its transpose drops what
    falls on it.

    Parameters
    ----------
    widths
        Channels of the resolutions, finest first.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            nn.Conv3d(before, after, 3, stride=2 if level else 1, padding=0 if level else 1)
            for level, (before, after) in enumerate(pairwise((1, *widths)))
        )
        self.decoder = nn.ModuleList(
            nn.ConvTranspose3d(before if first else 2 * before, after, 3, stride=2)
            for first, (before, after) in zip(
                (True, *[False] * len(widths)), pairwise(widths[::-1]), strict=False
            )
        )
        self.last_conv = nn.Conv3d(2 * widths[0], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, 1, x, y, z) to the same shape."""
        return self._run(x)[0]

    def gradient_of_magnitude(self, x: Tensor) -> Tensor:
        """Return the gradient of the sum of ``|U(x)|`` with respect to x.

        Every rectified output masks what flows back through it: its sign is 0 or 1.
        """
        y, encoded, decoded = self._run(x)
        g = conv_transpose3d(y.sign(), self.last_conv.weight, padding=1)
        to_skips = []
        for layer, output in zip(reversed(self.decoder), reversed(decoded), strict=True):
            channels = output.shape[1]
            to_skips.append(g[:, channels:])
            g = _down(g[:, :channels] * output.sign(), layer.weight)
        for level in reversed(range(len(encoded))):
            if level < len(to_skips):
                g = g + to_skips[level]
            g = g * encoded[level].sign()
            weight: Any = self.encoder[level].weight
            g = _up(g, weight) if level else conv_transpose3d(g, weight, padding=1)
        return g

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the output, and those of the rectifiers on the way down and up."""
        encoded = [torch.relu(self.encoder[0](x))]
        for layer in self.encoder[1:]:
            encoded.append(torch.relu(_down(encoded[-1], layer.weight, layer.bias)))
        v, decoded = encoded[-1], []
        for layer, skip in zip(self.decoder, encoded[-2::-1], strict=True):
            decoded.append(torch.relu(_up(v, layer.weight, layer.bias)))
            v = torch.cat([decoded[-1], skip], dim=1)
        return self.last_conv(v), encoded, decoded


def _down(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """Convolve with stride 2; without a bias the adjoint of :func:`_up` with the same weight.

    What a list of layers holds has no type that mypy knows.
    """
    return conv3d(pad(x, (0, 1) * 3), weight, bias, stride=2)


def _up(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    return conv_transpose3d(x, weight, bias, stride=2)[..., :-1, :-1, :-1]


class NextQsmField(Network):
    """Total field, 0 outside the mask, to local field, both (n, 1, x, y, z) in ppm."""

    inputs = (TOTAL_FIELD,)
    output = LOCAL_FIELD
    geometry = ANY_GEOMETRY
    why_whole = "its coarsest resolution is that of the whole volume"

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.bf = Unet(widths)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(2 ** (len(self.bf.encoder) - 1))

    def forward(self, total_field_ppm: Tensor) -> Tensor:
        """Return ``local_field_ppm``, not masked."""
        field: Tensor = self.bf(total_field_ppm)
        return field


class NextQsmPrior(Network):
    """Susceptibility [ppm] to the gradient of the sum of the U-net's magnitude.

    Parameters
    ----------
    widths
        Of the :class:`Unet`.
    lambdas
        The weight of the field's misfit in each step.
    """

    inputs = (TensorInfo("prior_input", "1", VOLUME),)
    output = TensorInfo("prior_output", "1", VOLUME)
    pipeline = "nextqsm"
    geometry = ANY_GEOMETRY
    why_whole = "its steps are scaled by norms over the whole volume"

    def __init__(self, widths: Sequence[int], lambdas: Sequence[float]) -> None:
        super().__init__()
        self.vn = Unet(widths)
        weights = {f"lambda_{step}": value for step, value in enumerate(lambdas, start=1)}
        self.constants = {"iterations": len(lambdas), **weights}

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this: of the other part's, which is deeper."""
        return int(2 ** len(self.vn.encoder))

    def forward(self, prior_input: Tensor) -> Tensor:
        """Return ``prior_output``."""
        gradient: Tensor = self.vn.gradient_of_magnitude(prior_input)
        return gradient


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> Network:
    """Build one of the two parts that a Keras file describes, its widths read off the shapes.

    Parameters
    ----------
    state
        Under the names in the authors' ``.weights.h5`` of that part; or ``bf.`` and ``vn.`` before
        the names here, where the other part may lack.
    choices
        The option ``part`` is ``bf`` or ``vn``, which needs the authors' six numbers.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape, or the numbers are.
    """
    part = choices.options["part"]
    authors_keys = dict(keras_keys(part))
    kernels = [f"{part}.encoder.{level}.weight" for level in range(LEVELS[part])]
    if any(theirs in state for theirs in authors_keys.values()):
        require_keys(state, [authors_keys[key] for key in kernels], f"nextqsm, part {part}")
        ours = {theirs: key for key, theirs in authors_keys.items()}
        state = {
            ours.get(key, key): value.permute(4, 3, 0, 1, 2) if value.ndim == 5 else value
            for key, value in state.items()
        }
    else:
        authors_keys = {}
        require_keys(state, kernels, f"nextqsm, part {part}")
    widths = [channels_of(state, key) for key in kernels]
    network: Network = NextQsmField(widths)
    if part == "vn":
        numbers = numbers_from(choices.normalisation, LAMBDAS, f"{LAMBDAS}.npy", ITERATIONS)
        network = NextQsmPrior(widths, numbers)
    (other,) = LEVELS.keys() - {part}
    unused = {key for key in state if key.startswith(f"{other}.")} | {"vn.lambdas"}
    load_strictly(network, state, unused, authors_keys)
    return network.eval()


def keras_keys(part: str) -> Iterator[tuple[str, str]]:
    """Give our name of each tensor of a part, and its place in the authors' file."""
    layers = {"last_conv": "last_conv/layers/conv3d"}
    for level in range(LEVELS[part]):
        cnn = f"cnn_{level}" if level else "cnn"
        layers[f"encoder.{level}"] = f"encoder/{cnn}/layers/conv3d"
        if level < LEVELS[part] - 1:
            layers[f"decoder.{level}"] = f"decoder/{cnn}/layers/conv3d_transpose"
    for ours, theirs in layers.items():
        for index, what in enumerate(("weight", "bias")):
            yield f"{part}.{ours}.{what}", f"{theirs}/vars/{index}"
