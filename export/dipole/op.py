"""``qsm::dipole_conv``, the dipole operator as an operator of PyTorch.

Eager, it transforms with ``torch.fft``; ``torch.export`` keeps it as one node, which the ONNX
export lowers as ``export/graph/dipole_lowering.py`` says. Its gradient is itself: E(k) is real and
even, so the operator is self-adjoint.
"""

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor

from qsm_deploy.export.dipole.multiplier import (
    LAM,
    THRESHOLD,
    frequencies,
    respond,
    symmetrised_multiplier,
)
from qsm_deploy.kernels.cuda_library import MultiplierName
from qsm_deploy.kernels.dipole import require_lam, require_threshold
from qsm_deploy.kernels.errors import GeometryError, UsageError

AXES = (-3, -2, -1)


def dipole_conv(
    x: Tensor,
    voxel_size_mm: Tensor,
    b0_direction: Tensor,
    multiplier: MultiplierName = "dipole",
    *,
    threshold: float = THRESHOLD,
    lam: float = LAM,
) -> Tensor:
    """Return ``F^-1 [E(k) F x]``, which wraps around at the border of the volume.

    ``E(k) = (g(D(k)) + g(D(-k))) / 2`` on the index grid, as in :mod:`qsm_deploy.kernels.dipole`.

    Parameters
    ----------
    x
        (n, c, x, y, z) real volumes of any size; float64 is computed in double precision.
    voxel_size_mm
        (3,) [mm].
    b0_direction
        (3,) unit vector in voxel axes.
    multiplier
        What g makes of the unit dipole D: ``dipole`` D itself, ``dipole_squared`` D^2, ``tkd``
        sign(D) / max(abs(D), threshold), ``tikhonov`` D / (D^2 + lam).
    threshold
        Of ``tkd``, in (0, 2/3].
    lam
        Of ``tikhonov``, positive and finite.

    Returns
    -------
    (n, c, x, y, z) tensor
        Zero-mean. Gradients flow to ``x`` only.

    Raises
    ------
    GeometryError
        If a tensor has another rank, size or type.
    UsageError
        If the multiplier is unknown, or its parameter outside its range.

    References
    ----------
    Marques & Bowtell, Concepts Magn Reson B 25:65-78 (2005).
    """
    y: Tensor = _dipole_conv(x, voxel_size_mm, b0_direction, multiplier, threshold, lam)
    return y


@torch.library.custom_op("qsm::dipole_conv", mutates_args=())
def _dipole_conv(
    x: Tensor,
    voxel_size_mm: Tensor,
    b0_direction: Tensor,
    multiplier: str = "dipole",
    threshold: float = THRESHOLD,
    lam: float = LAM,
) -> Tensor:
    name = _checked(x, voxel_size_mm, b0_direction, multiplier, threshold, lam)
    e = symmetrised_multiplier(
        [frequencies(n, half=axis == 2, dtype=x.dtype) for axis, n in enumerate(x.shape[2:])],
        voxel_size_mm.to(x.dtype),
        b0_direction.to(x.dtype),
        lambda d: respond(d, name, threshold if name == "tkd" else lam),
    )
    spectrum = torch.fft.rfftn(x, dim=AXES)
    spectrum *= e
    y: Tensor = torch.fft.irfftn(spectrum, s=x.shape[2:], dim=AXES)
    return y.contiguous()


@_dipole_conv.register_fake
def _(
    x: Tensor,
    voxel_size_mm: Tensor,
    b0_direction: Tensor,
    multiplier: str = "dipole",
    threshold: float = THRESHOLD,
    lam: float = LAM,
) -> Tensor:
    _checked(x, voxel_size_mm, b0_direction, multiplier, threshold, lam)
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, *ctx.geometry, ctx.multiplier, ctx.threshold, ctx.lam = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    own = _dipole_conv(gradient, *ctx.geometry, ctx.multiplier, ctx.threshold, ctx.lam)
    return own, None, None, None, None, None


_dipole_conv.register_autograd(_backward, setup_context=_setup_context)


def _checked(
    x: Tensor,
    voxel_size_mm: Tensor,
    b0_direction: Tensor,
    multiplier: str,
    threshold: float,
    lam: float,
) -> MultiplierName:
    """Return the multiplier's name if all is as it must be."""
    if x.ndim != 5 or x.dtype not in (torch.float32, torch.float64):
        raise GeometryError(f"dipole_conv takes (n, c, x, y, z) volumes in float32, got {_seen(x)}")
    for name, vector in (("voxel_size_mm", voxel_size_mm), ("b0_direction", b0_direction)):
        if vector.shape != (3,):
            raise GeometryError(f"{name} must have the shape (3,), got {_seen(vector)}")
    if multiplier not in get_args(MultiplierName):
        known = ", ".join(get_args(MultiplierName))
        raise UsageError(f"multiplier {multiplier!r} is unknown; known are {known}")
    if multiplier == "tkd":
        require_threshold(threshold)
    if multiplier == "tikhonov":
        require_lam(lam)
    return cast(MultiplierName, multiplier)


def _seen(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
