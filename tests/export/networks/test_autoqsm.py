"""AutoQSM from a file of Keras: layers by the order of their numbers, without the optimiser's."""

import pytest
import torch

from qsm_deploy.export.networks.autoqsm import AutoQSM, network_from_state, our_layers
from qsm_deploy.export.networks.network import Choices

WIDTHS = (1, 2, 3)


@pytest.mark.parametrize("within", ["", "model_weights/"])
@pytest.mark.parametrize("shift", [1, 9, 98])
def test_only_the_order_of_the_numbers_counts(formula_state, within: str, shift: int) -> None:
    state = formula_state(AutoQSM(WIDTHS).state_dict())
    keras = {"optimizer_weights/training/Adam/conv3d_1/kernel:0": torch.zeros(3)} if within else {}
    for kind, layers in our_layers(2).items():
        for number, layer in enumerate(layers, start=shift):
            path = f"{within}{kind}_{number}/{kind}_{number}"
            keras[f"{path}/kernel:0"] = state[f"{layer}.weight"].permute(2, 3, 4, 1, 0)
            keras[f"{path}/bias:0"] = state[f"{layer}.bias"]
    network = network_from_state(dict(sorted(keras.items())), Choices())
    assert network.divisor == 4
    assert all(torch.equal(network.state_dict()[key], state[key]) for key in state)
