"""A module of a user, as the export asks of every network: its normalisation in the graph."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qsm_deploy.export.networks.network import (
    CHI,
    CHI_NEGATIVE,
    CHI_POSITIVE,
    ECHO_TIME,
    FIELD_NOISE,
    FIELD_STRENGTH,
    LOCAL_FIELD,
    MASK,
    PHASE,
    R2_PRIME,
    TOTAL_FIELD,
    VOXEL_SIZE,
    Network,
)
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.runtime.card.card import TensorInfo

B0_DIRECTION = TensorInfo("b0_direction", "1", (1, 3))
TENSORS = {
    tensor.name: tensor
    for tensor in (
        *(LOCAL_FIELD, TOTAL_FIELD, PHASE, R2_PRIME, MASK, CHI, CHI_POSITIVE, CHI_NEGATIVE),
        *(FIELD_NOISE, VOXEL_SIZE, B0_DIRECTION, ECHO_TIME, FIELD_STRENGTH),
    )
}


class OwnNetwork(Network):
    """Maps as they were measured, to maps in their units.

    ``z = (a - mean) / std`` enters the module, times the mask where that is asked for, and
    ``y * std + mean`` leaves, at least ``at_least`` where there is one.

    Parameters
    ----------
    module
        A user's, in evaluation mode. Returns (n, outputs, x, y, z), or a tuple of such, whose
        channels are the outputs in order.
    groups
        Names for each argument of its ``forward``; several are channels of one.
    outputs
        Names of the output's channels.
    scale
        Mean and standard deviation of maps, by name; others enter and leave as they are.
    masked
        Names of maps that are multiplied by the mask.
    at_least
        The least value of outputs, by name.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Sequence[str]],
        outputs: Sequence[str],
        scale: Mapping[str, tuple[float, float]],
        masked: frozenset[str] = frozenset(),
        at_least: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.groups, self.gives = groups, outputs
        self.scale, self.masked, self.at_least = scale, masked, at_least or {}
        self.multiple = 1
        self.output = TENSORS[outputs[0]]
        self.further_outputs = tuple(TENSORS[name] for name in outputs[1:])

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this, as found or stated."""
        return self.multiple

    def forward(self, *maps: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for what ``inputs`` names, in that order."""
        given = dict(zip((tensor.name for tensor in self.inputs), maps, strict=True))
        entering = [
            torch.cat([self._entering(name, given) for name in group], dim=1)
            if len(group) > 1
            else self._entering(group[0], given)
            for group in self.groups
        ]
        y = self.module(*entering)
        if not isinstance(y, Tensor | tuple | list):
            raise ExportError(
                f"it returns a {type(y).__name__}, expected a tensor or a tuple of some"
            )
        channels = torch.cat(tuple(y), dim=1) if isinstance(y, tuple | list) else y
        if channels.ndim != 5 or channels.shape[1] != len(self.gives):
            raise ExportError(
                f"the module returns {tuple(y.shape) if isinstance(y, Tensor) else type(y)}, "
                f"expected (n, {len(self.gives)}, x, y, z) of {', '.join(self.gives)}"
            )
        leaving = [
            self._leaving(name, channels[:, i : i + 1] if len(self.gives) > 1 else channels)
            for i, name in enumerate(self.gives)
        ]
        return leaving[0] if len(leaving) == 1 else tuple(leaving)

    def _entering(self, name: str, given: Mapping[str, Tensor]) -> Tensor:
        a = given[name]
        mean, std = self.scale.get(name, (0.0, 1.0))
        if mean != 0:
            a = a - mean
        if std != 1:
            a = a / std
        return a * given[MASK.name] if name in self.masked else a

    def _leaving(self, name: str, y: Tensor) -> Tensor:
        mean, std = self.scale.get(name, (0.0, 1.0))
        if std != 1:
            y = y * std
        if mean != 0:
            y = y + mean
        return y.clamp(min=self.at_least[name]) if name in self.at_least else y
