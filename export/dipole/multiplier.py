"""The multiplier E(k) of the dipole operator in PyTorch, one definition for every lowering.

It is that of :mod:`qsm_deploy.kernels.dipole`, made of tensor operations only, so that it can be
traced for any size and geometry.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qsm_deploy.kernels.cuda_library import DipoleOperator, MultiplierName
from qsm_deploy.kernels.dipole import CONE

THRESHOLD, LAM = DipoleOperator.threshold, DipoleOperator.lam
Response = Callable[[Tensor], Tensor]


def frequencies(n: int, *, half: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the cycles per voxel at each index of an axis and at its negative modulo n.

    Parameters
    ----------
    n
        Voxels along the axis.
    half
        Whether to keep the first n // 2 + 1 only, as real-to-complex transforms do.

    Returns
    -------
    (2, m) tensor
        The rows differ in more than the sign at the Nyquist index of an even axis only.
    """
    size = torch.full((1,), n)  # the exporter takes a free size as a tensor only
    index = torch.arange(n // 2 + 1) if half else torch.arange(n)
    signed = torch.where(2 * index >= size, index - size, index)
    opposite = torch.where(2 * index == size, signed, -signed)
    return torch.stack([signed, opposite]).to(dtype) / size


def symmetrised_multiplier(
    axes: Sequence[Tensor],
    voxel_size_mm: Tensor,
    b0_direction: Tensor,
    response: Response,
) -> Tensor:
    """Return ``E(k) = (g(D(k)) + g(D(-k))) / 2`` on the grid of three axes.

    Parameters
    ----------
    axes
        The (2, m) :func:`frequencies` of each axis [1 / voxel].
    voxel_size_mm
        (3,) [mm].
    b0_direction
        (3,) unit vector in voxel axes.
    response
        The g.

    Returns
    -------
    (m_x, m_y, m_z) tensor
        Dimensionless, 0 at the origin.
    """
    kx, ky, kz = (
        (axis / voxel_size_mm[n]).reshape([2, *(-1 if n == m else 1 for m in range(3))])
        for n, axis in enumerate(axes)
    )
    along_b = kx * b0_direction[0] + ky * b0_direction[1] + kz * b0_direction[2]
    k_squared = kx[0] * kx[0] + ky[0] * ky[0] + kz[0] * kz[0]
    origin = k_squared == 0
    d = torch.where(origin, 0.0, 1 / 3 - along_b * along_b / torch.where(origin, 1.0, k_squared))
    at_k, at_minus_k = response(d).unbind()
    return (at_k + at_minus_k) / 2


def respond(d: Tensor, multiplier: MultiplierName, parameter: float | Tensor) -> Tensor:
    """Return g(D): the dipole, its square, or a regularised inverse of it.

    Parameters
    ----------
    d
        The unit dipole.
    multiplier
        ``dipole``, ``dipole_squared``, ``tkd`` or ``tikhonov``.
    parameter
        Of ``tkd`` the threshold, of ``tikhonov`` lambda; the others ignore it.

    References
    ----------
    Shmueli et al., Magn Reson Med 62:1510-1522 (2009).
    """
    if multiplier == "dipole_squared":
        return d * d
    if multiplier == "tkd":
        size = d.abs()
        sign = torch.where(size < CONE, 0.0, torch.sign(d))
        return sign / size.clamp(min=parameter)
    if multiplier == "tikhonov":
        return d / (d * d + parameter)
    return d
