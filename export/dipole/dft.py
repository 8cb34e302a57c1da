"""The dipole operator with the Fourier transform of the ONNX standard, for export only.

Every transform is complex and along axis 1, to which the others are turned: OpenVINO 2026.4 reads
DFT as opset 17 defined it, so it overlooks the input that names the axis and takes that one, and
gives a one-sided transform an axis too many. The inverse of half a spectrum is the real part of
the complex inverse of that half and zeros, with every frequency counted as often as it stands
for.
"""

import torch
from torch import Tensor

from qsm_deploy.export.dipole.matmul import half_weight
from qsm_deploy.export.dipole.multiplier import Response, frequencies, symmetrised_multiplier

OPSET = 20
LAST_TO_FIRST, FIRST_TO_LAST = (0, 3, 1, 2, 4), (0, 2, 3, 1, 4)


def dipole_conv_dft(
    x: Tensor,
    voxel_size_mm: Tensor,
    b0_direction: Tensor,
    response: Response,
) -> Tensor:
    """Stand for DFT nodes while a graph is traced; what it computes otherwise means nothing.

    Parameters and result are those of :func:`qsm_deploy.export.dipole.matmul.dipole_conv_matmul`.
    """
    z_size = x.shape[4]
    axes = [frequencies(n, half=axis == 2) for axis, n in enumerate(x.shape[2:])]
    e = symmetrised_multiplier(axes, voxel_size_mm, b0_direction, response)
    e = e * half_weight(z_size)
    spectrum = x.reshape((x.shape[0] * x.shape[1], *x.shape[2:], 1)).permute(LAST_TO_FIRST)
    spectrum = _dft(spectrum)[:, : z_size // 2 + 1]
    for _ in "yx":
        spectrum = _dft(spectrum.permute(LAST_TO_FIRST))
    spectrum = spectrum * e[..., None]
    for _ in "xy":
        spectrum = _dft(spectrum, inverse=True).permute(FIRST_TO_LAST)
    y = _dft(spectrum, z_size, inverse=True).permute(FIRST_TO_LAST)
    return y[..., 0].reshape(x.shape)


def _dft(x: Tensor, padded_to: int | None = None, *, inverse: bool = False) -> Tensor:
    """Stand for the transform along axis 1 of (n, ., ., ., 1 or 2), which gives 2."""
    length = None if padded_to is None else torch.full((1,), padded_to)[0]
    return torch.onnx.ops.symbolic(
        "DFT",
        [x, length, torch.tensor(1)],
        {"inverse": int(inverse), "onesided": 0},
        dtype=x.dtype,
        shape=[x.shape[0], padded_to or x.shape[1], *x.shape[2:4], 2],
        version=OPSET,
    )
