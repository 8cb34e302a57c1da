"""NeXtQSM's two parts: the gradient by hand, the files and the numbers that go with them."""

import numpy as np
import pytest
import torch

from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.nextqsm import LAMBDAS, LEVELS, Unet, keras_keys, network_from_state
from qsm_deploy.kernels.errors import WeightsError

WIDTHS = (2, 3, 4, 5, 5, 6, 6)
NUMBERS = {LAMBDAS: np.arange(1, 7, dtype=np.float32) / 4}


@pytest.fixture
def state(formula_state) -> dict[str, torch.Tensor]:
    """Return both parts under our names."""
    return {
        f"{part}.{key}": value
        for part, levels in LEVELS.items()
        for key, value in formula_state(Unet(WIDTHS[:levels]).state_dict()).items()
    }


def built(state, part: str, numbers=NUMBERS) -> Network:
    return network_from_state(state, Choices({"part": part}, numbers))


@pytest.mark.parametrize("shape", [(4, 8, 12), (8, 4, 4)])
def test_the_gradient_by_hand_is_that_of_autograd(formula_state, shape) -> None:
    unet = Unet((3, 4, 5))
    unet.load_state_dict(formula_state(unet.state_dict()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, *shape, generator=generator, requires_grad=True)
    (expected,) = torch.autograd.grad(unet(x).abs().sum(), x)
    got = unet.gradient_of_magnitude(x)
    assert expected.abs().max() > 0.1
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_both_parts_come_from_one_state_or_from_their_own(state) -> None:
    for part in LEVELS:
        own = {key: value for key, value in state.items() if key.startswith(part)}
        one, other = built(state, part), built(own, part)
        assert one.state_dict().keys() == other.state_dict().keys() == own.keys()
        assert (one.divisor, one.why_whole is None) == (64, False)


def test_its_steps_are_the_authors(state) -> None:
    constants = built(state, "vn").constants
    assert constants == {"iterations": 6} | {f"lambda_{n}": n / 4 for n in range(1, 7)}
    assert built(state, "bf", {}).constants == {}


def test_the_numbers_are_asked_for(state) -> None:
    with pytest.raises(WeightsError, match=rf"lacks {LAMBDAS}.*--normalisation {LAMBDAS}\.npy"):
        built(state, "vn", {})
    with pytest.raises(WeightsError, match="expected 6 finite numbers"):
        built(state, "vn", {LAMBDAS: np.ones(5)})


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a kernel with the axes of Keras."""
    return tensor.permute(2, 3, 4, 1, 0) if tensor.ndim == 5 else tensor


def test_the_file_of_the_other_part_is_refused(state) -> None:
    def keras(part: str) -> dict[str, torch.Tensor]:
        return {theirs: turned(state[ours]) for ours, theirs in keras_keys(part)}

    for part in LEVELS:
        again = built(keras(part), part).state_dict()
        assert all(torch.equal(again[key], state[key]) for key in again)
    with pytest.raises(WeightsError, match=r"no encoder/cnn_6/"):
        built(keras("vn"), "bf")
    with pytest.raises(WeightsError, match=r"does not know, the first is (en|de)coder/cnn_"):
        built(keras("bf"), "vn")
