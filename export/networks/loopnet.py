"""LoopNet, reconstructed: a U-net run in a loop, its decoder feeding back to its encoder.

Chen et al., ISMRM 2024, abstract 2621. Neither code nor weights are public: the number of layers,
their connections and the sharing of weights over the loops follow the abstract, the rest is
assumed. What names and shapes of the weights do not say is stored among them as settings.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.networks.blocks import conv_norm_relu, fold_batch_norm
from qsm_deploy.export.networks.ghpa import AXES, GROUPS, PLANES, FixedGhpa, Ghpa, Layout
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.kernels.errors import WeightsError

FirstLoop = Literal["zeros", "copy"]
Residual = Literal["input", "iteration"]

LEVELS = 4
MAX_LOOPS = 32
# a setting is stored as its place in these
FIRST_LOOPS: tuple[FirstLoop, ...] = ("zeros", "copy")
RESIDUALS: tuple[Residual, ...] = ("input", "iteration")
SETTINGS = {
    "setting_loops": range(1, MAX_LOOPS + 1),
    "setting_first_loop": range(len(FIRST_LOOPS)),
    "setting_residual": range(len(RESIDUALS)),
}


class LoopNet(Network):
    """Local field to susceptibility, both (n, 1, x, y, z) in ppm.

    Parameters
    ----------
    base
        Feature channels of the finest level, a multiple of four; each level doubles them.
    layout
        Of the attention: maps over planes (``PLANES``) or along axes (``AXES``).
    loops
        How often the U-net runs, 1 to 32 times, always with the same weights.
    first_loop
        What the encoder gets before there are decoder features: ``zeros``, or a ``copy`` of the
        features that enter the level, repeated to as many channels.
    residual
        What is added to each loop's output: the field (``input``) or what entered that loop
        (``iteration``).
    """

    why_whole = "its attention maps stretch over the whole input, so a patch is another function"
    setting_loops: Tensor
    setting_first_loop: Tensor
    setting_residual: Tensor

    def __init__(
        self,
        base: int = 16,
        layout: Layout = PLANES,
        loops: int = 4,
        first_loop: FirstLoop = "zeros",
        residual: Residual = "input",
    ) -> None:
        super().__init__()
        fine = [base * 2**level for level in range(LEVELS)]
        coarse = fine[::-1]
        bottom = 2 * coarse[0]
        entering = (1, *fine[:-1])
        self.e1 = nn.ModuleList(
            conv_norm_relu(i + c, c) for i, c in zip(entering, fine, strict=True)
        )
        self.e2 = nn.ModuleList(conv_norm_relu(c, c) for c in fine)
        self.eg = nn.ModuleList(Ghpa(c, c, layout) for c in fine)
        self.pool = nn.ModuleList(nn.MaxPool3d(2) for _ in fine)
        self.m1 = conv_norm_relu(coarse[0], bottom)
        self.m2 = conv_norm_relu(bottom, bottom)
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(2 * c, c, kernel_size=2, stride=2) for c in coarse
        )
        self.d1 = nn.ModuleList(conv_norm_relu(2 * c, c) for c in coarse)
        self.d2 = nn.ModuleList(conv_norm_relu(c, c) for c in coarse)
        self.dg = nn.ModuleList(Ghpa(c, c, layout) for c in coarse)
        self.out = nn.Conv3d(base, 1, kernel_size=1)
        self.widths = tuple(fine)
        self.loops, self.first_loop, self.residual = loops, first_loop, residual
        self.register_buffer("setting_loops", torch.tensor(loops))
        self.register_buffer("setting_first_loop", torch.tensor(FIRST_LOOPS.index(first_loop)))
        self.register_buffer("setting_residual", torch.tensor(RESIDUALS.index(residual)))

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this."""
        return int(2**LEVELS)

    def forward(self, local_field_ppm: Tensor) -> Tensor:
        """Return ``chi_ppm`` of a (n, 1, x, y, z) field."""
        maps = self._attention_maps(local_field_ppm.shape[2:])
        estimate = local_field_ppm
        decoded: list[Tensor] = []
        for _ in range(self.loops):
            correction, decoded = self._loop(estimate, decoded, maps)
            estimate = correction + (local_field_ppm if self.residual == "input" else estimate)
        return estimate

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; the settings among them replace those of the constructor."""
        keys = super().load_state_dict(state_dict, strict, assign)
        self.loops = _setting("setting_loops", self.setting_loops)
        self.first_loop = FIRST_LOOPS[_setting("setting_first_loop", self.setting_first_loop)]
        self.residual = RESIDUALS[_setting("setting_residual", self.setting_residual)]
        return keys

    def fixed(self, size: Sequence[int]) -> "LoopNet":
        """Return an equivalent network for one spatial size, its attention maps constants."""
        network = copy.deepcopy(self)
        for level in range(LEVELS):
            for gates, n in ((network.eg, level), (network.dg, LEVELS - 1 - level)):
                gates[n] = FixedGhpa(cast(Ghpa, gates[n]), _level_size(size, level))
        return network

    def _attention_maps(self, size: Sequence[int]) -> dict[nn.Module, list[Tensor]]:
        """Return the maps of every GHPA: once for all loops, since no features enter them."""
        maps = {}
        for level in range(LEVELS):
            for gate in (self.eg[level], self.dg[LEVELS - 1 - level]):
                maps[gate] = cast(Ghpa, gate).attention_maps(_level_size(size, level))
        return maps

    def _loop(
        self, estimate: Tensor, previous: list[Tensor], maps: Mapping[nn.Module, list[Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the correction and the decoder's features, finest first, of one loop."""
        v = estimate
        skips = []
        for level, gate in enumerate(self.eg):
            v = torch.cat([v, previous[level]], dim=1) if previous else self._first(v, level)
            v = self.e2[level](self.e1[level](v))
            v = gate(v, maps[gate])
            skips.append(v)
            v = self.pool[level](v)
        v = self.m2(self.m1(v))
        decoded: list[Tensor] = []
        for n, gate in enumerate(self.dg):
            v = torch.cat([self.up[n](v), skips.pop()], dim=1)
            v = self.d2[n](self.d1[n](v))
            v = gate(v, maps[gate])
            decoded.insert(0, v)
        return self.out(v), decoded

    def _first(self, v: Tensor, level: int) -> Tensor:
        """Return what enters an encoder level when there are no decoder features yet."""
        missing = self.widths[level]
        if self.first_loop == "zeros":
            return functional.pad(v, (0, 0, 0, 0, 0, 0, 0, missing))
        return v.repeat(1, 1 + missing // v.shape[1], 1, 1, 1)


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> LoopNet:
    """Build the network that a state dict describes, batch normalisation folded.

    Parameters
    ----------
    state
        Width and attention are read off its names and shapes, the rest off its settings; a
        setting that is not there has the default.
    choices
        None matters here.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape, or a setting is out of range.
    """
    first = "e1.0.0.bias"
    require_keys(state, [first], "loopnet")
    base = state[first].numel()
    if base == 0 or base % GROUPS:
        raise WeightsError(
            f"{first} holds {base} values in the weights; the base width of loopnet is a "
            f"multiple of {GROUPS}"
        )
    network = LoopNet(base, AXES if "eg.0.params_cd" in state else PLANES)
    settings = {key: network.get_buffer(key) for key in SETTINGS}
    whole = settings | dict(state)
    for key in SETTINGS:
        _setting(key, whole[key])
    load_strictly(network, whole)
    fold_batch_norm(network)
    return network.eval()


def _setting(key: str, value: Tensor) -> int:
    """Return a stored setting.

    Raises
    ------
    WeightsError
        If it is not one integer, or out of range.
    """
    allowed = SETTINGS[key]
    seen = f"{value.dtype} of shape {tuple(value.shape)}"
    if value.dtype == torch.int64 and value.ndim == 0:
        if int(value) in allowed:
            return int(value)
        seen = str(int(value))
    raise WeightsError(
        f"{key} is {seen} in the weights; it must be one int64 from {allowed[0]} to {allowed[-1]}"
    )


def _level_size(size: Sequence[int], level: int) -> list[int]:
    return [n // 2**level for n in size]
