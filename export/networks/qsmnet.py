"""QSMnet and QSMnet+: one U-net over five resolutions, on a normalised local field.

Yoon et al., NeuroImage 179:199-206 (2018), doi 10.1016/j.neuroimage.2018.06.030; Jung et al.,
NeuroImage 211:116619 (2020), doi 10.1016/j.neuroimage.2020.116619. The authors trained it in
TensorFlow 1 and later in PyTorch, where the same layers differ in what :class:`Flavour` says.
Attribute names are those of the PyTorch version.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.normalisation import number_from
from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.network import LOCAL_FIELD, MASK, Choices, Network
from qsm_deploy.export.networks.qsmnet_tf1 import is_tf1, state_from_tf1, torch_keys
from qsm_deploy.export.networks.state_sizes import channels_of
from qsm_deploy.kernels.errors import WeightsError

ENCODERS = ("conv1", "conv2", "conv3", "conv4")
DECODERS = {"deconv4": "conv5", "deconv3": "conv6", "deconv2": "conv7", "deconv1": "conv8"}
SLOPES = {"relu": 0.0, "leaky_relu": 0.1}
NUMBERS = ("field_mean", "field_std", "chi_mean", "chi_std")
# what the authors' files call these numbers, of the TensorFlow and of the PyTorch version
AUTHORS_NUMBERS = (
    ("input_mean", "input_std", "label_mean", "label_std"),
    ("field_mean", "field_std", "cosmos_sus_mean", "cosmos_sus_std"),
)
NUMBERS_FILE = "norm_factor_<name>.mat"
WORDS_FILE = "network_info_<name>.npy"


@dataclass(frozen=True)
class Flavour:
    """What two implementations of the same layers do differently.

    Attributes
    ----------
    epsilon
        Added to the variance in every batch normalisation.
    slope
        Of the activation below zero.
    skip_first
        Whether the encoder's features come before the up-sampled ones in a concatenation.
    """

    epsilon: float
    slope: float
    skip_first: bool


TORCH = Flavour(epsilon=1e-5, slope=0.0, skip_first=False)


class ConvLayer(nn.Module):
    """Convolution, batch normalisation, activation; keys ``conv`` and ``bn``."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, flavour: Flavour) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm3d(channels_out, eps=flavour.epsilon)
        self.activation = nn.LeakyReLU(flavour.slope) if flavour.slope else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c_in, x, y, z) to (n, c_out, x, y, z)."""
        y: Tensor = self.activation(self.bn(self.conv(x)))
        return y


class FiveResolutions(Network):
    """The U-net of QSMnet and of chi-sepnet, which differ in what they take and give.

    Parameters
    ----------
    channels
        Feature channels of the five resolutions, finest first.
    kernel
        Voxels along each side of the convolutions, odd.
    flavour
        Which implementation it follows.
    normalisation
        Means and standard deviations of the training data.
    """

    channels_in = channels_out = 1

    def __init__(
        self,
        channels: Sequence[int],
        kernel: int,
        flavour: Flavour,
        normalisation: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.skip_first = flavour.skip_first
        self.normalisation = dict(normalisation)
        before = self.channels_in
        for name, c in zip((*ENCODERS, "l_conv"), channels, strict=True):
            self._add_pair(name, before, c, kernel, flavour)
            before = c
        for (up, name), c in zip(DECODERS.items(), channels[-2::-1], strict=True):
            deconv = nn.ConvTranspose3d(before, c, kernel_size=2, stride=2)
            self.add_module(up, nn.ModuleDict({"deconv": deconv}))
            self._add_pair(name, 2 * c, c, kernel, flavour)
            before = c
        self.out = nn.ModuleDict({"conv": nn.Conv3d(before, self.channels_out, kernel_size=1)})

    def _add_pair(self, name: str, before: int, after: int, kernel: int, flavour: Flavour) -> None:
        self.add_module(f"{name}1", ConvLayer(before, after, kernel, flavour))
        self.add_module(f"{name}2", ConvLayer(after, after, kernel, flavour))

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(2 ** len(ENCODERS))

    def unet(self, v: Tensor) -> Tensor:
        """Map (n, channels_in, x, y, z) to (n, channels_out, x, y, z)."""
        skips: list[Tensor] = []
        for name in ENCODERS:
            skips.append(self._pair(name, v))
            v = nn.functional.max_pool3d(skips[-1], 2)
        v = self._pair("l_conv", v)
        for up, name in DECODERS.items():
            both = [self.get_submodule(f"{up}.deconv")(v), skips.pop()]
            v = self._pair(name, torch.cat(both[::-1] if self.skip_first else both, dim=1))
        y: Tensor = self.out["conv"](v)
        return y

    def _pair(self, name: str, v: Tensor) -> Tensor:
        for n in (1, 2):
            v = self.get_submodule(f"{name}{n}")(v)
        return v


class QSMnet(FiveResolutions):
    """Local field and mask to susceptibility, (n, 1, x, y, z), field and susceptibility in ppm.

    The authors pad the normalised field with zeros, and in PyTorch they mask it before that. A
    field that is padded in ppm would be off by its mean, so the graph masks what it normalised.
    The TensorFlow version does not mask: its air is at ``-field_mean / field_std`` instead of 0,
    the same where the mean is 0 as in the published QSMnet and QSMnet+. The normalisation is
    ``field_mean``, ``field_std``, ``chi_mean``, ``chi_std`` [ppm].
    """

    inputs = (LOCAL_FIELD, MASK)

    def forward(self, local_field_ppm: Tensor, mask: Tensor) -> Tensor:
        """Return ``chi_ppm``."""
        mean, std, chi_mean, chi_std = (self.normalisation[name] for name in NUMBERS)
        return self.unet((local_field_ppm - mean) / std * mask) * chi_std + chi_mean


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> QSMnet:
    """Build the network that a state describes: flavour from its keys, sizes from its shapes.

    Parameters
    ----------
    state
        The PyTorch version's state dict, or the variables of a TensorFlow checkpoint.
    choices
        With the numbers of ``norm_factor_<name>.mat`` and, for TensorFlow, the activation of
        ``network_info_<name>.npy`` as its normalisation.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape, or the normalisation is.
    """
    given = choices.normalisation
    flavour, authors_keys = TORCH, dict[str, str]()
    if is_tf1(state):
        authors_keys = {ours: theirs for theirs, ours in torch_keys().items()}
        state = state_from_tf1(state)
        flavour = Flavour(epsilon=1e-3, slope=_slope(given), skip_first=True)
    network = QSMnet(*sizes_in(state, "qsmnet"), flavour, _numbers(given))
    load_strictly(network, state, authors_keys=authors_keys)
    return network.eval()


def sizes_in(state: Mapping[str, Tensor], name: str) -> tuple[list[int], int]:
    """Return the channels and the kernel of the U-net that a state dict describes.

    Raises
    ------
    WeightsError
        If a key is missing, or is of no such layer.
    """
    widths = [f"{layer}2.conv.bias" for layer in (*ENCODERS, "l_conv")]
    require_keys(state, [*widths, "conv11.conv.weight"], name)
    kernel, *others = [*state["conv11.conv.weight"].shape[2:], 0]
    if others != [kernel, kernel, 0] or kernel % 2 == 0:
        raise WeightsError(
            f"conv11.conv.weight has shape {tuple(state['conv11.conv.weight'].shape)}, expected "
            "kernels as long as wide, of an odd number of voxels; pass the file for this network"
        )
    return [channels_of(state, key) for key in widths], kernel


def _numbers(given: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    names = next((n for n in AUTHORS_NUMBERS if n[0] in given), AUTHORS_NUMBERS[0])
    return {
        own: number_from(given, name, NUMBERS_FILE, positive=own.endswith("std"))
        for own, name in zip(NUMBERS, names, strict=True)
    }


def _slope(given: Mapping[str, NDArray[Any]]) -> float:
    if "network_info" not in given:
        raise WeightsError(
            "the activation is not in these weights; pass --normalisation "
            f"{NUMBERS_FILE} {WORDS_FILE}, which came with them"
        )
    activation = str(next(iter(given["network_info"].astype(str).flat), ""))
    if activation not in SLOPES:
        raise WeightsError(
            f"the activation in network_info is {activation!r}, expected {' or '.join(SLOPES)}; "
            f"pass the {WORDS_FILE} that came with the weights"
        )
    return SLOPES[activation]
