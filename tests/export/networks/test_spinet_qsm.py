"""SpiNet-QSM: its prior equals the published one, its numbers come from the file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.networks.spinet_qsm import PUBLISHED, SpinetWeights, network_from_state
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from qsm_deploy.kernels.errors import WeightsError

SPEC = REGISTRY["spinet-qsm"]


@pytest.fixture
def state(formula_state) -> dict[str, torch.Tensor]:
    return formula_state(SpinetWeights(wide_resnet(2, width=4, blocks=2)).state_dict())


def test_its_numbers_come_from_the_file(state) -> None:
    prior = build_network(SPEC, state, Choices())
    assert prior.constants == {
        "lambda": state["lambda_val"].item(),
        "p": state["p"].item(),
        "iterations": 3,
        "cg_steps": 25,
    }
    assert prior.normalisation == PUBLISHED
    assert (prior.pipeline, prior.divisor, prior.why_whole) == ("spinet", 1, None)


def test_the_normalisation_can_be_passed(state) -> None:
    given = {"out_mean": np.array([0.1]), "out_std": np.array(0.2)}
    prior = network_from_state(state, Choices(normalisation=given))
    assert prior.normalisation == {"chi_mean": 0.1, "chi_std": 0.2}
    with pytest.raises(WeightsError, match="lacks out_std"):
        network_from_state(state, Choices(normalisation={"out_mean": np.array(0.1)}))


@pytest.mark.parametrize(
    ("key", "message"),
    [("p", "first is p"), ("gen.2.1.bn2.running_var", r"gen\.2\.1\.bn2\.running_var")],
)
def test_a_missing_key_is_named(state, key, message) -> None:
    del state[key]
    with pytest.raises(WeightsError, match=message):
        build_network(SPEC, state, Choices())


def test_the_published_file_loads_and_computes_what_the_published_prior_does(shared: Path) -> None:
    prior = build_network(
        SPEC, load_state(shared / "data" / "checkpoints" / "spinet_qsm.pth"), Choices()
    )
    assert prior.constants["lambda"] == pytest.approx(0.0378121696)
    assert prior.constants["p"] == pytest.approx(1.5838474035)
    field = torch.from_numpy(np.load(shared / "specs" / "golden" / "input.npz")["input"]).float()
    expected = np.load(shared / "specs" / "golden" / "spinet_dw_realckpt.npz")["output"]
    with torch.inference_mode():
        got = prior(torch.cat([field, 0.5 * field], dim=1)).numpy()
    assert np.abs(got - expected).max() <= 1e-5
