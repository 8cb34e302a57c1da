"""LPCNN: gradient steps on one or more local fields, alternating with a learned prior.

Lai et al., MICCAI 2020, doi 10.1007/978-3-030-59713-9_13. Attribute names are the authors', so
that their checkpoint loads key by key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.normalisation import number_from
from qsm_deploy.export.checkpoints.state import load_strictly
from qsm_deploy.export.dipole.op import dipole_conv
from qsm_deploy.export.networks.blocks import fold_batch_norm
from qsm_deploy.export.networks.network import ANY_GEOMETRY, Choices
from qsm_deploy.export.networks.unrolled import Prior, Unrolled
from qsm_deploy.export.networks.wide_resnet import wide_resnet, wide_resnet_like

ITERATIONS = 3
# of the training susceptibility [ppm], as the authors' inference takes it
PUBLISHED = {"chi_mean": -0.00024724603240382513, "chi_std": 0.028365555003933052}


class LPCNN(Unrolled):
    """Local fields to susceptibility in one graph, in ppm.

    Parameters
    ----------
    gen
        The prior, of one channel.
    orientations
        Number of local fields.
    normalisation
        ``chi_mean``, ``chi_std`` [ppm] of the training data.
    """

    geometry = ANY_GEOMETRY

    def __init__(
        self,
        gen: nn.Sequential | None = None,
        orientations: int = 1,
        normalisation: Mapping[str, float] = PUBLISHED,
    ) -> None:
        super().__init__(orientations)
        self.alpha = nn.Parameter(torch.full((1,), 4.0))
        self.gen = wide_resnet(1) if gen is None else gen
        self.normalisation = dict(normalisation)

    def forward(
        self, local_field_ppm: Tensor, mask: Tensor, voxel_size_mm: Tensor, b0_direction: Tensor
    ) -> Tensor:
        """Return ``chi_ppm`` of (n, orientations, x, y, z) fields, 0 outside the mask."""
        mean, std = self.normalisation["chi_mean"], self.normalisation["chi_std"]
        directions = b0_direction.unbind()
        projected = [
            self.alpha * dipole_conv(local_field_ppm[:, n : n + 1], voxel_size_mm, direction)
            for n, direction in enumerate(directions)
        ]
        z = torch.stack(projected).sum(dim=0)
        for remaining in reversed(range(ITERATIONS)):
            p = self.gen((z - mean) / std * mask)
            z = (p * std + mean) * mask
            if remaining:
                z = self.gradient_step(z, projected, voxel_size_mm, directions)
        return z

    def gradient_step(
        self,
        chi_ppm: Tensor,
        projected: Sequence[Tensor],
        voxel_size_mm: Tensor,
        directions: Sequence[Tensor],
    ) -> Tensor:
        """Move a map towards the fields, one orientation after the other.

        As published, each orientation sees the map that the one before it has moved.
        """
        z = chi_ppm
        for b, direction in zip(projected, directions, strict=True):
            z = z + b - self.alpha * dipole_conv(z, voxel_size_mm, direction, "dipole_squared")
        return z


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> LPCNN | Prior:
    """Build the network that a state dict describes, its widths read off the shapes.

    Parameters
    ----------
    state
        Under the authors' names.
    choices
        Options ``form`` (``unrolled`` or ``split``) and ``orientations`` (of the unrolled form;
        the split one takes any number); optionally ``train_gt_mean`` and ``train_gt_std``.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape, or the normalisation is.
    """
    gen = wide_resnet_like(state, 1, "lpcnn")
    normalisation = _normalisation(choices.normalisation)
    network = LPCNN(gen, int(choices.options["orientations"]), normalisation)
    load_strictly(network, state)
    network.constants = {"alpha": network.alpha.item(), "iterations": ITERATIONS}
    if choices.options["form"] == "unrolled":
        fold_batch_norm(gen)
        return network.eval()
    return Prior(gen, 1, "lpcnn", ANY_GEOMETRY, normalisation, network.constants).eval()


def _normalisation(given: Mapping[str, NDArray[Any]]) -> Mapping[str, float]:
    """Return the numbers that were passed, or else the published ones."""
    if not given:
        return PUBLISHED
    return {
        "chi_mean": number_from(given, "train_gt_mean", "train_gt_mean.npy"),
        "chi_std": number_from(given, "train_gt_std", "train_gt_std.npy", positive=True),
    }
