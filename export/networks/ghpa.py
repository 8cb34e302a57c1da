"""Group multi-axis Hadamard product attention (GHPA), the original in 2-D and two forms in 3-D.

Three quarters of the channels are multiplied by learnt maps, the last quarter passes through a
depthwise convolution. The maps do not depend on the input, only on its size: a small learnt grid
is stretched over it. Attribute names of the 2-D form are the authors'.

Ruan et al., MICCAI 2023 (EGE-UNet), doi 10.1007/978-3-031-43901-8_46.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsm_deploy.kernels.errors import GeometryError

GROUPS = 4
GRID = 8
NORM_EPS = 1e-6
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layout:
    """What the groups of a GHPA look at.

    Attributes
    ----------
    spans
        For each learnt map, by name, the spatial axes that it varies along.
    local
        Name of the convolutions of the last group.
    dimensions
        Number of spatial axes.
    """

    spans: Mapping[str, tuple[int, ...]]
    local: str
    dimensions: int


ORIGINAL_2D = Layout({"xy": (0, 1), "zx": (0,), "zy": (1,)}, "dw", 2)
PLANES = Layout({"dh": (0, 1), "hw": (1, 2), "dw": (0, 2)}, "local", 3)
AXES = Layout({"cd": (0,), "ch": (1,), "cw": (2,)}, "local", 3)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each voxel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, ...) to the same shape."""
        centred = x - x.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        per_channel = (-1, *[1] * (x.ndim - 2))
        weight, bias = self.weight.reshape(per_channel), self.bias.reshape(per_channel)
        return centred / torch.sqrt(variance + NORM_EPS) * weight + bias


class Ghpa(nn.Module):
    """(n, c_in, *size) to (n, c_out, *size).

    Parameters
    ----------
    channels_in
        A multiple of four, the number of groups.
    channels_out
        Any.
    layout
        One of ``ORIGINAL_2D``, ``PLANES`` and ``AXES``.
    """

    def __init__(self, channels_in: int, channels_out: int, layout: Layout = PLANES) -> None:
        super().__init__()
        self.layout = layout
        c = channels_in // GROUPS
        for name, axes in layout.spans.items():
            # maps along one axis keep the channels as the grid's other side
            shape = (1, c, GRID, GRID) if len(axes) == 2 else (1, 1, c, GRID)
            self.register_parameter(f"params_{name}", nn.Parameter(torch.ones(shape)))
            self.add_module(f"conv_{name}", _depthwise_pointwise(c, c, len(axes)))
        self.add_module(layout.local, _pointwise_depthwise(c, layout.dimensions))
        self.norm1 = ChannelNorm(channels_in)
        self.norm2 = ChannelNorm(channels_in)
        self.ldw = _depthwise_pointwise(channels_in, channels_out, layout.dimensions)

    def forward(self, x: Tensor, maps: Sequence[Tensor] | None = None) -> Tensor:
        """Attend to ``x``, with the ``maps`` for its size if they are at hand."""
        maps = self.attention_maps(x.shape[2:]) if maps is None else maps
        *groups, last = self.norm1(x).chunk(GROUPS, dim=1)
        attended = [group * m for group, m in zip(groups, maps, strict=True)]
        attended.append(self.get_submodule(self.layout.local)(last))
        y: Tensor = self.ldw(self.norm2(torch.cat(attended, dim=1)))
        return y

    def attention_maps(self, size: Sequence[int]) -> list[Tensor]:
        """Return the three maps for a spatial size, each broadcasting to (n, c_in / 4, *size)."""
        return [self._attention_map(name, axes, size) for name, axes in self.layout.spans.items()]

    def _attention_map(self, name: str, axes: tuple[int, ...], size: Sequence[int]) -> Tensor:
        grid = cast(Tensor, getattr(self, f"params_{name}"))
        target = [grid.shape[2], *(size[axis] for axis in axes)][-2:]
        stretched = functional.interpolate(grid, target, mode="bilinear", align_corners=True)
        if len(axes) == 1:
            stretched = stretched.squeeze(1)
        m: Tensor = self.get_submodule(f"conv_{name}")(stretched)
        for axis in range(self.layout.dimensions):
            if axis not in axes:
                m = m.unsqueeze(2 + axis)
        return m


class FixedGhpa(nn.Module):
    """A GHPA for one size, its maps folded to constants."""

    def __init__(self, ghpa: Ghpa, size: Sequence[int]) -> None:
        super().__init__()
        self.ghpa = ghpa
        self.size = tuple(size)
        with torch.no_grad():
            for n, m in enumerate(ghpa.attention_maps(self.size)):
                self.register_buffer(f"map_{n}", m)
        self.train(ghpa.training)

    def forward(self, x: Tensor, maps: Sequence[Tensor] | None = None) -> Tensor:
        """Return what the GHPA returns."""
        y: Tensor = self.ghpa(x, self.attention_maps(x.shape[2:]) if maps is None else maps)
        return y

    def attention_maps(self, size: Sequence[int]) -> list[Tensor]:
        """Return the folded maps.

        Raises
        ------
        GeometryError
            If they were folded for another size.
        """
        if tuple(size) != self.size:
            raise GeometryError(
                f"the attention maps are folded for {self.size}, the input has {tuple(size)}; "
                "fold the network for that size"
            )
        return [self.get_buffer(f"map_{n}") for n in range(GROUPS - 1)]


def _depthwise_pointwise(channels_in: int, channels_out: int, dimensions: int) -> nn.Sequential:
    conv = CONVOLUTIONS[dimensions - 1]
    return nn.Sequential(
        conv(channels_in, channels_in, kernel_size=3, padding=1, groups=channels_in),
        nn.GELU(),
        conv(channels_in, channels_out, kernel_size=1),
    )


def _pointwise_depthwise(channels: int, dimensions: int) -> nn.Sequential:
    conv = CONVOLUTIONS[dimensions - 1]
    return nn.Sequential(
        conv(channels, channels, kernel_size=1),
        nn.GELU(),
        conv(channels, channels, kernel_size=3, padding=1, groups=channels),
    )
