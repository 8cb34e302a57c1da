"""The dipole operator inside a network, of operators that every inference engine has.

No engine this package targets computes the Fourier transform well, and one refuses it; so the
transform is a product with cosine and sine matrices along each axis. For real volumes half of the
last frequency axis is enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Power = Literal[1, 2]


def dipole_filter(
    x: Tensor, voxel_size_mm: Tensor, b0_direction: Tensor, power: Power = 1
) -> Tensor:
    """Return ``F^-1 [E(k) F x]`` with the symmetrised dipole or its square as multiplier.

    ``E(k) = (D(k)^power + D(-k)^power) / 2`` on the index grid, so that ``power=2`` is not twice
    ``power=1`` on the Nyquist planes of even axes. It wraps around at the volume's border.

    Parameters
    ----------
    x
        (n, c, x, y, z) real volumes of any size.
    voxel_size_mm
        (3,) [mm].
    b0_direction
        (3,) unit vector in voxel axes.
    power
        1 is the field of a susceptibility, 2 that field filtered by its adjoint.

    Returns
    -------
    (n, c, x, y, z) tensor
        In the unit of ``x``; zero-mean.
    """
    axes = [_Transform.of_size(n, half=axis == 2) for axis, n in enumerate(x.shape[2:])]
    multiplier = _multiplier(axes, voxel_size_mm, b0_direction, power)
    along_x, along_y, along_z = axes
    real, imaginary = along_y.forward(x @ along_z.cos, -(x @ along_z.sin))
    real, imaginary = along_x.forward(real.flatten(-2), imaginary.flatten(-2))
    flat = multiplier.flatten(-2)
    real, imaginary = along_x.inverse(real * flat, imaginary * flat)
    rows = (*x.shape[:3], *multiplier.shape[1:])
    real, imaginary = along_y.inverse(real.reshape(rows), imaginary.reshape(rows))
    return real @ along_z.cos.T - imaginary @ along_z.sin.T


@dataclass(frozen=True)
class _Transform:
    """The transform along an axis of n voxels to m frequencies, n or n // 2 + 1 of them.

    ``cos`` and ``sin`` are (n, m); ``frequencies`` (2, m) the cycles per voxel at an index and at
    its negative modulo n; ``weight`` is what each frequency counts in the inverse.
    """

    cos: Tensor
    sin: Tensor
    frequencies: Tensor
    weight: Tensor

    @classmethod
    def of_size(cls, n: int, *, half: bool) -> "_Transform":
        size = torch.full((1,), n)  # the exporter takes a free size as a tensor only
        voxel = torch.arange(n)
        index = torch.arange(n // 2 + 1) if half else voxel
        # reduced while an integer: in float32 the angle of the product itself is 9e-5 off
        angle = (voxel[:, None] * index % size) * (2 * math.pi / size)
        negative = 2 * index >= size
        frequency = torch.where(negative, index - size, index) / size
        opposite = torch.where(2 * index == size, frequency, -frequency)
        # in a half spectrum all but these stand for their negatives as well
        weight = torch.where(frequency == opposite, 1.0, 2.0) / size if half else 1 / size
        frequencies = torch.stack([frequency, opposite])
        return cls(torch.cos(angle), torch.sin(angle), frequencies, weight)

    def forward(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        """Transform the axis before the last."""
        return (
            self.cos @ real + self.sin @ imaginary,
            self.cos @ imaginary - self.sin @ real,
        )

    def inverse(self, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        """Transform the axis before the last back, but for the weight."""
        return (
            self.cos @ real - self.sin @ imaginary,
            self.cos @ imaginary + self.sin @ real,
        )


def _multiplier(
    axes: Sequence[_Transform], voxel_size_mm: Tensor, b0_direction: Tensor, power: Power
) -> Tensor:
    """Return E on the half grid times the weights of the inverse, (x, y, z // 2 + 1)."""
    kx, ky, kz = (
        (axis.frequencies / voxel_size_mm[n]).reshape([2, *_along(n)])
        for n, axis in enumerate(axes)
    )
    wx, wy, wz = (axis.weight.reshape(_along(n)) for n, axis in enumerate(axes))
    along_b = kx * b0_direction[0] + ky * b0_direction[1] + kz * b0_direction[2]
    k_squared = kx[0] * kx[0] + ky[0] * ky[0] + kz[0] * kz[0]
    origin = k_squared == 0
    d = torch.where(origin, 0.0, 1 / 3 - along_b * along_b / torch.where(origin, 1.0, k_squared))
    at_k, at_minus_k = (d if power == 1 else d * d).unbind()
    return (at_k + at_minus_k) * (wx * wy * wz / 2)


def _along(n: int) -> list[int]:
    return [-1 if n == axis else 1 for axis in range(3)]
