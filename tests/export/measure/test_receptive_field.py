"""The receptive field of networks whose own is known on paper."""

import numpy as np
import pytest
import torch
from torch import nn

from qsm_deploy.export.measure import receptive_field
from qsm_deploy.export.measure.receptive_field import (
    effective_halo,
    measure_receptive_field,
    theoretical_receptive_field,
)
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.runtime.card.card import ModelCard
from tests.export.table import SMALL


class Stack(Network):
    """Convolutions of 3 voxels, one after the other; the middle weight can be all there is."""

    divisor = 1

    def __init__(self, layers: int, outer_weight: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv3d(1, 1, 3, padding=1) for _ in range(layers)))
        for layer in self.layers:
            nn.init.constant_(layer.weight, outer_weight)
            layer.weight.data[0, 0, 1, 1, 1] = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


class Mean(Network):
    divisor = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean()


@pytest.mark.parametrize("layers", [1, 3, 20])
def test_convolutions_add_one_voxel_each(layers: int) -> None:
    assert theoretical_receptive_field(Stack(layers)) == layers


def test_zero_weights_do_not_shorten_it() -> None:
    assert theoretical_receptive_field(Stack(5, outer_weight=0.0)) == 5


# on paper: 4 convolutions of a quarter of the resolution, 2 + 2 of half, 2 of the whole: 4*4 + 4*2
# + 2 voxels, and three more for where a voxel lies among its four
def test_tv_unet() -> None:
    assert theoretical_receptive_field(SMALL["tv-unet"]().eval()) == 29


# a convolution at each of three resolutions on the way down and up, 1 + 2 + 4 voxels; at an eighth
# 8 * 10, a gate, 4 + 4 in the interaction and 1 behind it; 7 for where a voxel lies among its eight
def test_of_two_outputs_it_is_that_of_the_one_that_sees_farther() -> None:
    assert theoretical_receptive_field(SMALL["susep-net"]().eval()) == 7 + 80 + 7 + 7


def test_it_does_not_depend_on_width_but_on_depth_and_iterations() -> None:
    sizes = [
        theoretical_receptive_field(IR2QSM(channels, iterations).eval())
        for channels, iterations in (((2, 4), 1), ((3, 6), 1), ((2, 4), 2), ((2, 4, 8), 1))
    ]
    assert sizes[0] == sizes[1] < min(sizes[2:])


def test_a_network_without_end_is_refused() -> None:
    with pytest.raises(ExportError, match="Mean sees farther"):
        theoretical_receptive_field(Mean())


def card_of(module: Network, name: str) -> ModelCard:
    return provisional_card(REGISTRY[name], module, Choices(), "none", "0" * 64)


def test_a_network_that_changes_with_its_input_has_none() -> None:
    stack = Stack(1)
    stack.why_whole = "it stretches over the input"
    field = measure_receptive_field(stack, card_of(stack, "ir2qsm"))
    assert (field.theoretical, field.halo) == (None, None)


@pytest.fixture
def small_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receptive_field, "BOX", (24, 24, 32))
    monkeypatch.setattr(receptive_field, "HEAD", (24, 24, 32))


@pytest.mark.usefixtures("small_box")
def test_the_halo_follows_the_weights() -> None:
    card = card_of(Stack(1), "ir2qsm")
    assert effective_halo(Stack(3, outer_weight=0.0), card, 3) == 0
    assert effective_halo(Stack(3, outer_weight=1e-5), card, 3) == 0
    assert effective_halo(Stack(3, outer_weight=0.001), card, 3) == 1
    assert effective_halo(Stack(3, outer_weight=1.0), card, 3) == 3


@pytest.mark.usefixtures("small_box")
def test_the_halo_holds_the_stated_energy(tiny_tv_unet) -> None:
    field = measure_receptive_field(tiny_tv_unet, card_of(tiny_tv_unet, "tv-unet"))
    assert (field.theoretical, field.energy_kept) == (29, 0.999999)
    assert 0 < field.halo <= 29
    assert all(p.requires_grad for p in tiny_tv_unet.parameters())


def test_radius_is_the_smallest_that_holds_the_energy() -> None:
    energy = np.zeros((9, 9, 9))
    energy[4, 4, 4], energy[4, 2, 4], energy[8, 4, 4] = 1.0, 1e-3, 1e-9
    assert receptive_field._radius_of_energy(energy, (4, 4, 4)) == 2
