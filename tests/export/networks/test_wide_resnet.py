"""The prior of three networks against the output of a published one, and ways to get it wrong."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks import wide_resnet as file
from qsm_deploy.export.networks.network import ANY_GEOMETRY
from qsm_deploy.export.networks.unrolled import Prior
from qsm_deploy.export.networks.wide_resnet import wide_resnet, wide_resnet_like
from qsm_deploy.kernels.errors import WeightsError

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # of outputs within +-0.3; 6e-8 was seen
WRONG = 1e-3
BACKENDS = ["pytorch", "onnxruntime", "openvino"]


def prior_of(state: Mapping[str, Tensor], epsilon: float = 1e-5) -> Prior:
    gen = wide_resnet(2, epsilon=epsilon)
    prior = Prior(gen, 2, "spinet", ANY_GEOMETRY, {}, {})
    prior.load_state_dict({key: state[key] for key in prior.state_dict()})
    return prior.eval()


@pytest.fixture(scope="module")
def state(formula_state) -> dict[str, Tensor]:
    return formula_state(Prior(wide_resnet(2), 2, "spinet", ANY_GEOMETRY, {}, {}).state_dict())


@pytest.fixture(scope="module")
def volume() -> Tensor:
    first = torch.from_numpy(np.load(GOLDEN / "ir2qsm.npz")["input"])
    return torch.cat([first, 0.5 * first], dim=1)


@pytest.fixture(scope="module")
def graph(state) -> onnx.ModelProto:
    return onnx_from_module(prior_of(state))


@pytest.fixture(scope="module")
def outputs(run_everywhere, state, graph, volume) -> dict[str, np.ndarray]:
    return run_everywhere(prior_of(state), graph, volume)


def difference(output: np.ndarray) -> float:
    """Return the largest difference from the committed voxels."""
    golden = np.load(GOLDEN / "wide_resnet.npz")
    assert golden["output"].size > 1900
    thinned = output.reshape(2, -1)[:, :: int(golden["stride"])]
    return float(np.abs(thinned - golden["output"]).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_committed_voxels(backend: str, outputs) -> None:
    assert difference(outputs[backend]) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_every_golden_voxel(backend: str, shared: Path, outputs) -> None:
    golden = np.load(shared / "specs" / "golden" / "spinet_dw.npz")["output"]
    assert np.abs(outputs[backend] - golden).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_published_network_with_its_trained_weights(
    backend: str, shared: Path, run, volume
) -> None:
    golden = np.load(shared / "specs" / "golden" / "spinet_dw_realckpt.npz")["output"]
    path = shared / "data" / "checkpoints" / "spinet_qsm.pth"
    prior = prior_of(torch.load(path, map_location="cpu", weights_only=True))
    model = prior if backend == "pytorch" else onnx_from_module(prior)
    largest = np.abs(run(model, volume, backend=backend) - golden).max()
    assert largest <= 1e-5 * np.ptp(golden)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("shape", [(1, 2, 5, 7, 9), (3, 2, 8, 3, 4)])
def test_the_graph_takes_any_batch_and_size(backend: str, shape, run, state, graph) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    prior = prior_of(state)
    expected = run(prior, x)
    assert np.abs(run(graph, x, backend=backend) - expected).max() <= TOLERANCE


@pytest.mark.slow
def test_the_epsilon_of_keras_fails(run, state, volume) -> None:
    assert difference(run(prior_of(state, epsilon=1e-3), volume)) > WRONG / 2


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["no shortcut", "shortcut after the activation"])
def test_another_shortcut_fails(wrong: str, run, state, volume, monkeypatch) -> None:
    def forward(block: file.ResidualBlock, x: Tensor) -> Tensor:
        y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
        return torch.relu(y) + x if wrong == "shortcut after the activation" else torch.relu(y)

    monkeypatch.setattr(file.ResidualBlock, "forward", forward)
    assert difference(run(prior_of(state), volume)) > WRONG


def test_patches_with_a_halo_of_17_equal_the_whole(run, state) -> None:
    x = torch.randn(1, 2, 60, 4, 4, generator=torch.Generator().manual_seed(0))
    prior = prior_of(state)
    whole = run(prior, x)[:, :, 20:40]
    patch = run(prior, x[:, :, 3:57])[:, :, 17:-17]
    assert np.abs(patch - whole).max() < 1e-6
    short = run(prior, x[:, :, 8:52])[:, :, 12:-12]
    assert np.abs(short - whole).max() > 1e-5


def like(state: Mapping[str, Tensor]) -> torch.nn.Sequential:
    return wide_resnet_like(state, 2, "the network")


def test_its_size_is_read_off_the_weights() -> None:
    small = {f"gen.{key}": v for key, v in wide_resnet(2, width=3, blocks=2).state_dict().items()}
    found = {f"gen.{key}": v.shape for key, v in like(small).state_dict().items()}
    assert found == {key: v.shape for key, v in small.items()}


def test_other_weights_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"the network: no gen\.0\.weight"):
        like({"conv.weight": torch.zeros(1)})
