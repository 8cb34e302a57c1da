"""The dipole operator as matrix products, of operators that every inference engine has.

No engine this package targets computes the Fourier transform well, and some refuse it; so the
transform is a product with cosine and sine matrices along each axis. For real volumes half of the
last frequency axis is enough.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qsm_deploy.export.dipole.multiplier import Response, frequencies, symmetrised_multiplier


def dipole_conv_matmul(
    x: Tensor,
    voxel_size_mm: Tensor,
    b0_direction: Tensor,
    response: Response,
) -> Tensor:
    """Return what :func:`qsm_deploy.export.dipole.op.dipole_conv` does, without its checks.

    Parameters
    ----------
    x
        (n, c, x, y, z) real volumes of any size.
    voxel_size_mm
        (3,) [mm].
    b0_direction
        (3,) unit vector in voxel axes.
    response
        What the multiplier makes of the unit dipole.

    Returns
    -------
    (n, c, x, y, z) tensor
    """
    along_x, along_y, along_z = (
        _Transform.of_size(n, half=axis == 2) for axis, n in enumerate(x.shape[2:])
    )
    axes = [transform.frequencies for transform in (along_x, along_y, along_z)]
    e = symmetrised_multiplier(axes, voxel_size_mm, b0_direction, response)
    e = e * (along_x.weight[:, None, None] * along_y.weight[:, None] * along_z.weight)
    real, imaginary = along_y.forward(x @ along_z.cos, -(x @ along_z.sin))
    real, imaginary = along_x.forward(real.flatten(-2), imaginary.flatten(-2))
    flat = e.flatten(-2)
    real, imaginary = along_x.inverse(real * flat, imaginary * flat)
    rows = (*x.shape[:3], *e.shape[1:])
    real, imaginary = along_y.inverse(real.reshape(rows), imaginary.reshape(rows))
    return real @ along_z.cos.T - imaginary @ along_z.sin.T


@dataclass(frozen=True)
class _Transform:
    """The transform along an axis of n voxels to m frequencies, n or n // 2 + 1 of them.

    ``cos`` and ``sin`` are (n, m), ``frequencies`` (2, m); ``weight`` (m,) is what each frequency
    counts in the inverse.
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
        weight = half_weight(n) / size if half else 1 / size.expand(n)
        return cls(torch.cos(angle), torch.sin(angle), frequencies(n, half=half), weight)

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


def half_weight(n: int) -> Tensor:
    """Return how many frequencies each of the first n // 2 + 1 stands for, 1 or 2.

    In a half spectrum all but the zero and, on even axes, the Nyquist frequency stand for their
    negatives as well.
    """
    size = torch.full((1,), n)
    twice = 2 * torch.arange(n // 2 + 1)
    return torch.where((twice == 0) | (twice == size), 1.0, 2.0)
