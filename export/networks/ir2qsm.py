"""IR2QSM: unrolled iterations of a U-net that feeds its decoder back to its encoder.

Chen et al., Med Phys 2025, doi 10.1002/mp.17747. The published inference code adds random noise
to every iteration; this module is the noise-free network. Attribute names are the authors', so
that their checkpoint loads key by key.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.blocks import ConvBlock, UpBlock
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.state_sizes import channels_of, count_parts

Residual = Literal["input", "iteration"]


class RecurrentUnit(nn.Module):
    """Gated update of the bottleneck state; both gates end in a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.update_gate = ConvBlock(channels, channels)
        self.out_gate = ConvBlock(channels, channels)

    def forward(self, features: Tensor, state: Tensor) -> Tensor:
        """Return ``state (1 - u) + out u`` with ``u = sigmoid(update_gate(features))``."""
        u = torch.sigmoid(self.update_gate(features))
        updated: Tensor = state * (1 - u) + self.out_gate(features) * u
        return updated


class IR2QSM(Network):
    """Local field to susceptibility, both (n, 1, x, y, z) in ppm.

    Parameters
    ----------
    channels
        Feature channels of each encoder level and of the bottleneck, each twice the previous.
    iterations
        Unrolled iterations, each with weights of its own.
    residual
        What is added to each iteration's output. ``input``: the field, there and once more at the
        end, as in the published code. ``iteration``: that iteration's own input and nothing at
        the end, as in an earlier version under the same keys.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64, 128),
        iterations: int = 4,
        residual: Residual = "input",
    ) -> None:
        super().__init__()
        self.levels = len(channels) - 1
        self.iterations = iterations
        self.residual = residual
        for t in range(iterations):
            self._add_iteration(t, channels)
        self.post_transform_conv_block2 = nn.Sequential(nn.Conv3d(iterations, 1, kernel_size=1))

    def _add_iteration(self, t: int, channels: Sequence[int]) -> None:
        first, bottom = channels[0], channels[-1]
        parts: dict[str, nn.Module] = {
            "pre_transform": _two_convs(1, first, first),
            "middle": RecurrentUnit(bottom),
            "post_transform": nn.Sequential(
                ConvBlock(first, first), nn.Conv3d(first, 1, kernel_size=1)
            ),
        }
        for level, c in enumerate(channels[:-1]):
            if t > 0:
                parts[f"layer{level}_encoder_conv1"] = ConvBlock(2 * c, c)
            parts[f"layer{level}_encoder_conv2"] = nn.Sequential(nn.Identity(), ConvBlock(c, c))
            parts[f"layer{level}_encoder_down"] = nn.Sequential(
                ConvBlock(c, 2 * c), nn.MaxPool3d(2)
            )
        for level, c in enumerate(reversed(channels[1:])):
            parts[f"layer{level}_decoder_up"] = UpBlock(c, c // 2)
            parts[f"layer{level}_decoder_convs"] = _two_convs(c, c, c // 2)
        for name, module in parts.items():
            self.add_module(f"iteration{t}_{name}", module)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(2**self.levels)

    def forward(self, local_field_ppm: Tensor) -> Tensor:
        """Return ``chi_ppm`` of a (n, 1, x, y, z) field."""
        return self.all_outputs(local_field_ppm)[0]

    def all_outputs(self, local_field_ppm: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return ``chi_ppm`` and the output of every iteration."""
        field = local_field_ppm
        outputs: list[Tensor] = []
        decoded: list[Tensor] = []
        state: Tensor | None = None
        for t in range(self.iterations):
            source = outputs[-1] if outputs else field
            features, state, decoded = self._iterate(t, source, state, decoded)
            correction = self._part(t, "post_transform")(features)
            outputs.append(correction + (field if self.residual == "input" else source))
        chi: Tensor = self.post_transform_conv_block2(torch.cat(outputs, dim=1))
        return (chi + field if self.residual == "input" else chi), outputs

    def _iterate(
        self, t: int, source: Tensor, state: Tensor | None, previous: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the last features, the bottleneck state and the decoder outputs of iteration t."""
        v = self._part(t, "pre_transform")(source)
        skips = []
        for level in range(self.levels):
            if previous:  # reverse concatenation, current features first
                v = torch.cat([v, previous[self.levels - 1 - level]], dim=1)
                v = self._part(t, f"layer{level}_encoder_conv1")(v)
            v = self._part(t, f"layer{level}_encoder_conv2")(v)
            skips.append(v)
            v = self._part(t, f"layer{level}_encoder_down")(v)
        v = state = self._part(t, "middle")(v, v if state is None else state)
        decoded = []
        for level in range(self.levels):
            v = self._part(t, f"layer{level}_decoder_up")(v)
            v = torch.cat([v, skips[self.levels - 1 - level]], dim=1)
            v = self._part(t, f"layer{level}_decoder_convs")(v)
            decoded.append(v)
        return v, state, decoded

    def _part(self, t: int, name: str) -> nn.Module:
        return cast(nn.Module, getattr(self, f"iteration{t}_{name}"))


def unused_keys(levels: int) -> set[str]:
    """Return the names that published files carry for layers that no forward pass reaches."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    conv_block = ("0.weight", "0.bias", *(f"1.{name}" for name in norm))
    encoders = {
        f"iteration0_layer{level}_encoder_conv1.conv.{name}"
        for level in range(levels)
        for name in conv_block
    }
    head = ("0.weight", "0.bias", "4.weight", "4.bias", *(f"2.{name}" for name in norm))
    block = (*head, *(f"3.conv.{name}" for name in conv_block))
    return encoders | {f"post_transform_conv_block1.{name}" for name in block}


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> IR2QSM:
    """Build the network that a state dict describes: width, depth and iterations from its shapes.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape.
    """
    residual: Residual = "iteration" if choices.options["residual"] == "iteration" else "input"
    iterations = count_parts(state, "iteration{}_")
    levels = count_parts(state, "iteration0_layer{}_encoder_conv2.")
    widths = [f"iteration0_layer{n}_encoder_conv2.1.conv.0.bias" for n in range(levels)]
    widths.append("iteration0_middle.out_gate.conv.0.bias")
    require_keys(state, [*widths, "iteration0_post_transform.1.bias"], "ir2qsm")
    network = IR2QSM([channels_of(state, key) for key in widths], iterations, residual)
    load_strictly(network, state, unused_keys(levels))
    return network.eval()


def _two_convs(channels_in: int, channels_mid: int, channels_out: int) -> nn.Sequential:
    """Two convolution blocks around the place of a dropout layer, which only training knew."""
    return nn.Sequential(
        ConvBlock(channels_in, channels_mid), nn.Identity(), ConvBlock(channels_mid, channels_out)
    )
