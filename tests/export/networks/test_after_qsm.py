"""Both CNNs of AFTER-QSM out of one checkpoint: each finds its own half, and says what it takes."""

import pytest
import torch
from torch import Tensor

from qsm_deploy.export.networks.after_qsm import (
    RECON,
    REFINE,
    AfterRecon,
    AfterRefine,
    network_from_state,
)
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.kernels.errors import WeightsError

PARTS = ("recon", "refine")
State = dict[str, Tensor]


def built(part: str, state: State) -> Network:
    return network_from_state(state, Choices({"part": part}))


@pytest.fixture(scope="module")
def tiny(formula_state) -> State:
    return formula_state(
        AfterRecon(2, 2).state_dict() | AfterRefine(2, 3, 2, 2, last=5).state_dict()
    )


def test_each_part_says_what_it_takes(tiny) -> None:
    networks = {part: built(part, tiny) for part in PARTS}
    assert [t.name for t in networks["recon"].inputs] == ["local_field_ppm"]
    assert [t.name for t in networks["refine"].inputs] == ["rough_chi_ppm"]
    assert {network.pipeline for network in networks.values()} == {"after"}
    assert {network.geometry.b0_direction for network in networks.values()} == {None}


def test_sizes_are_read_off_the_shapes(tiny) -> None:
    recon, refine = built("recon", tiny), built("refine", tiny)
    assert (recon.divisor, refine.divisor) == (4, 1)
    dense = refine.refine_model_state
    assert (len(dense.blocks), len(dense.blocks[0].layers)) == (2, 2)
    assert dense.conv.weight.shape[:2] == (5, 2)
    assert dense.blocks[0].layers[1].conv.weight.shape[:2] == (3, 5)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("recon", f"{RECON}_output.bias"),
        ("recon", f"{RECON}_decoders.1._mid.0.weight"),
        ("refine", f"{REFINE}output.weight"),
        ("refine", f"{REFINE}blocks.1.feature_fusion_local.bias"),
    ],
)
def test_other_weights_are_refused_by_key(part: str, key: str, tiny) -> None:
    without = {k: value for k, value in tiny.items() if k != key}
    for wrong in (without, tiny | {key: tiny[key][..., None]}, tiny | {f"{key}2": tiny[key]}):
        with pytest.raises(WeightsError, match=key):
            built(part, wrong)
        built("refine" if part == "recon" else "recon", wrong)


@pytest.mark.parametrize("part", PARTS)
def test_what_belongs_to_neither_half_is_refused(part: str, tiny) -> None:
    with pytest.raises(WeightsError, match="optimiser"):
        built(part, tiny | {"optimiser.weight": torch.zeros(1)})


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_another_network_are_refused(part: str) -> None:
    with pytest.raises(WeightsError, match=f"not the weights of after-qsm, part {part}"):
        built(part, {"conv.weight": torch.zeros(1)})
