"""What the constructors infer, and what is asked of every network."""

import pytest
import torch

from qsm_deploy.export.networks import ir2qsm, tv_unet
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.networks.tv_unet import TvUnet
from qsm_deploy.kernels.errors import UsageError, WeightsError


@pytest.mark.parametrize(
    ("channels", "iterations"),
    [((2, 4), 1), ((2, 4, 8, 16), 2), ((3, 6, 12), 3), ((16, 32, 64, 128), 4)],
)
def test_ir2qsm_is_read_off_the_shapes(channels: tuple[int, ...], iterations: int) -> None:
    source = IR2QSM(channels, iterations)
    network = ir2qsm.network_from_state(source.state_dict(), Choices({"residual": "iteration"}))
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    assert shapes == {k: v.shape for k, v in source.state_dict().items()}
    assert network.iterations == iterations
    assert network.divisor == 2 ** (len(channels) - 1)
    assert network.residual == "iteration"


def test_full_width_has_the_published_number_of_used_parameters() -> None:
    assert sum(p.numel() for p in IR2QSM().parameters()) == 10_050_553
    assert len(IR2QSM().state_dict()) == 633


@pytest.mark.parametrize("module", [ir2qsm, tv_unet])
def test_strange_keys_are_refused_by_name(module) -> None:
    with pytest.raises(WeightsError, match=r"not the weights of .*found layer1\.weight"):
        module.network_from_state({"layer1.weight": torch.zeros(1)}, Choices({"residual": "input"}))


class NoDivisor(Network):
    """What someone writes first: weights, a forward, and nothing of the grid."""

    def forward(self, local_field_ppm: torch.Tensor) -> torch.Tensor:
        return local_field_ppm


class HalfDivisor(NoDivisor):
    divisor = 0.5  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (NoDivisor(), "NoDivisor, the network of tv-unet, says no divisor; define it"),
        (HalfDivisor(), "HalfDivisor, the network of tv-unet, says no divisor"),
        (torch.nn.Identity(), "Identity, which was built for tv-unet, is no Network; derive it"),
    ],
    ids=["none", "half", "no network"],
)
def test_a_network_that_lacks_what_the_export_asks_is_refused(monkeypatch, module, says) -> None:
    monkeypatch.setattr(tv_unet, "network_from_state", lambda state, choices: module)
    with pytest.raises(UsageError, match=says):
        build_network(REGISTRY["tv-unet"], TvUnet().state_dict(), Choices())
