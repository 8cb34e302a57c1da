"""MoDL-QSM: gradient steps on susceptibility and anisotropic field, alternating with a prior.

The first channel is the susceptibility along B0, the second the field of what the isotropic model
does not explain. Feng et al., NeuroImage 240:118376 (2021), doi 10.1016/j.neuroimage.2021.118376.
"""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.normalisation import numbers_from
from qsm_deploy.export.checkpoints.state import load_strictly, require_keys
from qsm_deploy.export.dipole.op import dipole_conv
from qsm_deploy.export.networks.blocks import fold_batch_norm
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.state_sizes import count_parts
from qsm_deploy.export.networks.unrolled import Prior, Unrolled
from qsm_deploy.export.networks.wide_resnet import wide_resnet, wide_resnet_like
from qsm_deploy.runtime.card.card import GeometryLimits

ITERATIONS = 3
CHANNELS = 2
EPSILON = 1e-3
ISOTROPIC_1MM = GeometryLimits((1.0, 1.0, 1.0), 0.1, None, None)
# of the training data [ppm]
PUBLISHED = {
    "chi_mean": -0.0022565326653420925,
    "chi_std": 0.026074999943375587,
    "field_mean": -0.0004852914426010102,
    "field_std": 0.004082275088876486,
}
MODEL, STEP = "model_1/", "my_layer_1/my_layer_1/step:0"
NORMS = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


class ModlQsm(Unrolled):
    """Local field to susceptibility in one graph, in ppm.

    Parameters
    ----------
    gen
        The prior, of two channels.
    normalisation
        ``chi_mean``, ``chi_std``, ``field_mean``, ``field_std`` [ppm] of the training data.
    """

    geometry = ISOTROPIC_1MM

    def __init__(
        self, gen: nn.Sequential | None = None, normalisation: Mapping[str, float] = PUBLISHED
    ) -> None:
        super().__init__()
        self.gen = wide_resnet(CHANNELS, epsilon=EPSILON, last_bias=True) if gen is None else gen
        self.step = nn.Parameter(torch.tensor(4.0))
        self.normalisation = dict(normalisation)
        self.constants = {"iterations": ITERATIONS}

    def forward(
        self, local_field_ppm: Tensor, mask: Tensor, voxel_size_mm: Tensor, b0_direction: Tensor
    ) -> Tensor:
        """Return ``chi_ppm`` of a (n, 1, x, y, z) field, 0 outside the mask."""
        return self.both_channels(local_field_ppm, mask, voxel_size_mm, b0_direction)[:, :1]

    def both_channels(
        self, local_field_ppm: Tensor, mask: Tensor, voxel_size_mm: Tensor, b0_direction: Tensor
    ) -> Tensor:
        """Return susceptibility and anisotropic field [ppm], (n, 2, x, y, z)."""
        mean, std = (self._statistic(what) for what in ("mean", "std"))

        def dipole(x: Tensor) -> Tensor:
            return dipole_conv(x, voxel_size_mm, b0_direction[0])

        def adjoint(field: Tensor) -> Tensor:
            return torch.cat([dipole(field), field], dim=1)

        y = self.step * adjoint(local_field_ppm)
        x = y
        for iteration in range(ITERATIONS):
            if iteration:
                predicted = dipole(x[:, :1]) + x[:, 1:]
                x = x - self.step * adjoint(predicted) + y
            # outside the mask the next step starts from the mean, not from zero
            x = self.gen((x - mean) / std * mask) * mask * std + mean
        return x * mask

    def _statistic(self, what: str) -> Tensor:
        values = [self.normalisation[f"{channel}_{what}"] for channel in ("chi", "field")]
        return torch.tensor(values).reshape(CHANNELS, 1, 1, 1)


def network_from_state(state: Mapping[str, Tensor], choices: Choices) -> ModlQsm | Prior:
    """Build the network that a Keras file describes.

    Parameters
    ----------
    state
        Under the names in the authors' ``.h5`` file.
    choices
        Option ``form`` (``unrolled`` or ``split``); optionally ``CosTrnMean`` and ``CosTrnStd``.

    Raises
    ------
    WeightsError
        If a key is missing, left over or of the wrong shape, or the normalisation is.
    """
    torch_state, authors_keys = state_from_keras(state)
    gen = wide_resnet_like(torch_state, CHANNELS, "modl-qsm", epsilon=EPSILON, last_bias=True)
    network = ModlQsm(gen, _normalisation(choices.normalisation))
    load_strictly(network, torch_state, authors_keys=authors_keys)
    network.constants = {"step": network.step.item(), "iterations": ITERATIONS}
    if choices.options["form"] == "unrolled":
        fold_batch_norm(gen)
        return network.eval()
    return Prior(
        gen, CHANNELS, "modl", ISOTROPIC_1MM, network.normalisation, network.constants
    ).eval()


def state_from_keras(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a Keras state under this module's names and axes, and the Keras name of each.

    Strange keys keep their names.

    Raises
    ------
    WeightsError
        If the step or a kernel that the size is read from is missing.
    """
    kernels = [f"{MODEL}conv3d_{n}/kernel:0" for n in (1, 2)]
    require_keys(state, [STEP, *kernels], "modl-qsm")
    blocks = count_parts(state, MODEL + "batch_normalization_{}/", first=1) // 2
    names = {1: "gen.0"}
    norms = {}
    for block in range(blocks):
        for n in (1, 2):
            names[1 + 2 * block + n] = f"gen.2.{block}.conv{n}"
            norms[2 * block + n] = f"gen.2.{block}.bn{n}"
    for n, name in enumerate(("gen.3", "gen.5", "gen.7"), start=2 + 2 * blocks):
        names[n] = name
    renamed = {STEP: "step"}
    for n, name in names.items():
        renamed[f"{MODEL}conv3d_{n}/kernel:0"] = f"{name}.weight"
        renamed[f"{MODEL}conv3d_{n}/bias:0"] = f"{name}.bias"
    for n, name in norms.items():
        for theirs, ours in NORMS.items():
            renamed[f"{MODEL}batch_normalization_{n}/{theirs}:0"] = f"{name}.{ours}"
    torch_state = {
        renamed.get(key, key): value.permute(4, 3, 0, 1, 2) if value.ndim == 5 else value
        for key, value in state.items()
    }
    return torch_state, {ours: theirs for theirs, ours in renamed.items()}


def _normalisation(given: Mapping[str, NDArray[Any]]) -> Mapping[str, float]:
    """Return the numbers that were passed, or else the published ones."""
    if not given:
        return PUBLISHED
    means = numbers_from(given, "CosTrnMean", "NormFactor.mat", CHANNELS)
    stds = numbers_from(given, "CosTrnStd", "NormFactor.mat", CHANNELS, positive=True)
    return {
        "chi_mean": means[0],
        "chi_std": stds[0],
        "field_mean": means[1],
        "field_std": stds[1],
    }
