"""xQSM against the output of the published network, and against three ways to get it wrong."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks import octave
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.xqsm import XQSM, network_from_state
from qsm_deploy.kernels.errors import WeightsError

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE_PPM = 1e-5
WRONG_PPM = 1e-3
BACKENDS = ["pytorch", "onnxruntime", "openvino"]


@pytest.fixture(scope="module")
def field() -> Tensor:
    return torch.from_numpy(np.load(GOLDEN / "ir2qsm.npz")["input"])


@pytest.fixture(scope="module")
def network(formula_state) -> XQSM:
    return network_from_state(formula_state(XQSM().state_dict()), Choices())


@pytest.fixture(scope="module")
def graph(network) -> onnx.ModelProto:
    return onnx_from_module(network)


@pytest.fixture(scope="module")
def outputs(run_everywhere, network, graph, field) -> dict[str, np.ndarray]:
    return run_everywhere(network, graph, field)


def difference(chi: np.ndarray) -> float:
    """Return the largest difference from the committed voxels [ppm]."""
    golden = np.load(GOLDEN / "xqsm.npz")
    assert golden["output"].size > 900
    return float(np.abs(chi.reshape(-1)[:: int(golden["stride"])] - golden["output"]).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_committed_voxels(backend: str, outputs) -> None:
    assert difference(outputs[backend]) <= TOLERANCE_PPM


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_every_golden_voxel(backend: str, shared: Path, outputs) -> None:
    golden = np.load(shared / "specs" / "golden" / "xqsm.npz")["output"]
    assert outputs[backend].shape == golden.shape
    assert np.abs(outputs[backend] - golden).max() <= TOLERANCE_PPM


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_its_graph_takes_any_batch_and_size(backend: str, run, network, graph) -> None:
    other = 0.02 * torch.randn(2, 1, 8, 24, 16, generator=torch.Generator().manual_seed(0))
    chi = run(network, other)
    assert np.abs(run(graph, other, backend=backend) - chi).max() <= TOLERANCE_PPM


@pytest.mark.slow
def test_a_swapped_concatenation_fails(run, network, field, monkeypatch) -> None:
    monkeypatch.setattr(
        "qsm_deploy.export.networks.xqsm.concatenate", lambda up, skip: octave.concatenate(skip, up)
    )
    assert difference(run(network, field)) > WRONG_PPM


@pytest.mark.slow
def test_a_maximum_instead_of_the_average_fails(run, network, field, monkeypatch) -> None:
    monkeypatch.setattr(octave, "avg_pool3d", torch.nn.functional.max_pool3d)
    assert difference(run(network, field)) > WRONG_PPM


def test_a_missing_residual_fails(outputs, field) -> None:
    assert difference(outputs["pytorch"] - field.numpy()) > WRONG_PPM


def test_up_sampling_normalises_the_sum(formula_state) -> None:
    up = octave.OctaveUp(3).eval()
    up.load_state_dict(formula_state(up.state_dict()))
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randn(1, 3, n, n, n, generator=generator) for n in (8, 4))
    with torch.inference_mode():
        got = up((high, low))
        sums = up.up_HH(high) + up.up_LH(low), up.up_LL(low) + up.up_HL(high)
        expected = [torch.relu(norm(s)) for norm, s in zip((up.BN_H, up.BN_L), sums, strict=True)]
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_has_the_published_keys(shared: Path, network) -> None:
    lines = (shared / "specs" / "keys" / "xqsm.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    own = {key: str(tuple(value.shape)) for key, value in network.state_dict().items()}
    assert own == {key: shape for key, shape, _ in rows}


def test_has_the_published_size(network) -> None:
    assert sum(p.numel() for p in network.parameters()) == 5_215_681
    assert len(network.state_dict()) == 398
    assert network.divisor == 8


@pytest.mark.parametrize(("base", "depth"), [(1, 1), (3, 2), (2, 3)])
def test_sizes_are_read_off_the_shapes(base: int, depth: int, formula_state) -> None:
    network = network_from_state(formula_state(XQSM(base, depth).state_dict()), Choices())
    assert network.divisor == 2 ** (depth + 1)
    assert network.FinalOct.FinalConv.in_channels == 2 * base
    volume = torch.zeros(1, 1, *(network.divisor * n for n in (1, 2, 3)))
    with torch.inference_mode():
        assert network(volume).shape == volume.shape


@pytest.mark.parametrize("key", ["FinalOct.BN_LH.bias", "DecodeConvs.1.up.up_LH.weight"])
def test_other_weights_are_refused_by_key(key: str, formula_state) -> None:
    state = formula_state(XQSM(2).state_dict())
    without = {k: value for k, value in state.items() if k != key}
    for wrong in (without, state | {key: state[key][..., None]}, state | {f"{key}2": state[key]}):
        with pytest.raises(WeightsError, match=key):
            network_from_state(wrong, Choices())


def test_squeeze_and_excitation_is_refused(formula_state) -> None:
    state = formula_state(XQSM(2).state_dict())
    stranger = "EncodeConvs.0.EncodeConv1.se_HH.fc.0.weight"
    with pytest.raises(WeightsError, match=stranger):
        network_from_state(state | {stranger: torch.zeros(1, 2)}, Choices())


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(WeightsError, match="not the weights of xqsm"):
        network_from_state({"conv.weight": torch.zeros(1)}, Choices())
