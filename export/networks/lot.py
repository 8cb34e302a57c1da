"""The Laplacian-of-trigonometric-functions layer: features of wrapped phase, without unwrapping.

The Laplacian of the true phase is ``L(sin p) cos p - L(cos p) sin p``, which a wrap of ``p`` by
2 pi does not change. Attribute names are the authors'.

Gao et al., NeuroImage 259:119410 (2022), doi 10.1016/j.neuroimage.2022.119410.
"""

import torch
from torch import Tensor, nn

# The field strength [T] times the echo time [s] that the features are scaled to.
REFERENCE_T_S = 0.06


class LotLayer(nn.Module):
    """Wrapped phase to ``features`` channels, the first of which is also the residual.

    Parameters
    ----------
    features
        Kernels: ``conv_x`` is the first, ``conv_y`` holds the others, if there are others.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv_x = nn.Parameter(fixed_laplacian())
        self.conv_y = None
        if features > 1:
            self.conv_y = nn.Parameter(fixed_laplacian().repeat(features - 1, 1, 1, 1, 1))

    def forward(
        self, phase_rad: Tensor, mask: Tensor, echo_time_s: Tensor, field_strength_t: Tensor
    ) -> Tensor:
        """Return (n, features, x, y, z), proportional to the Laplacian of the field.

        Parameters
        ----------
        phase_rad
            (n, 1, x, y, z), wrapped or not.
        mask
            (n, 1, x, y, z), 1 inside and 0 outside.
        echo_time_s, field_strength_t
            (1,) each.
        """
        kernels = self.conv_x if self.conv_y is None else torch.cat([self.conv_x, self.conv_y])
        sine, cosine = phase_rad.sin(), phase_rad.cos()
        laplacian = _inside(sine, kernels) * cosine - _inside(cosine, kernels) * sine
        return laplacian * mask / (field_strength_t * echo_time_s) * REFERENCE_T_S


def fixed_laplacian() -> Tensor:
    """Return the (1, 1, 3, 3, 3) kernel of the first version: 27 points, of zero sum."""
    offsets = torch.arange(-1, 2).abs()
    axes_off_centre = offsets[:, None, None] + offsets[:, None] + offsets
    by_axes_off_centre = torch.tensor([-44 / 13, 3 / 13, 3 / 26, 1 / 13])
    return by_axes_off_centre[axes_off_centre][None, None]


def _inside(volume: Tensor, kernels: Tensor) -> Tensor:
    """Convolve where the kernel lies inside the grid; the six faces are 0."""
    return nn.functional.pad(nn.functional.conv3d(volume, kernels), (1,) * 6)
