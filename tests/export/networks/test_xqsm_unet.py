"""xqsm-unet against the output of the published network, and against two ways to get it wrong."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder, encoder_decoder_size
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet, network_from_state
from qsm_deploy.kernels.errors import WeightsError

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE_PPM = 1e-5
WRONG_PPM = 1e-3
BACKENDS = ["pytorch", "onnxruntime", "openvino"]


@pytest.fixture(scope="module")
def field() -> Tensor:
    return torch.from_numpy(np.load(GOLDEN / "ir2qsm.npz")["input"])


@pytest.fixture(scope="module")
def network(formula_state) -> XqsmUnet:
    return network_from_state(formula_state(XqsmUnet().state_dict()), Choices())


@pytest.fixture(scope="module")
def graph(network) -> onnx.ModelProto:
    return onnx_from_module(network)


@pytest.fixture(scope="module")
def outputs(run_everywhere, network, graph, field) -> dict[str, np.ndarray]:
    return run_everywhere(network, graph, field)


def difference(chi: np.ndarray) -> float:
    """Return the largest difference from the committed voxels [ppm]."""
    golden = np.load(GOLDEN / "xqsm_unet.npz")
    assert golden["output"].size > 900
    return float(np.abs(chi.reshape(-1)[:: int(golden["stride"])] - golden["output"]).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_committed_voxels(backend: str, outputs) -> None:
    assert difference(outputs[backend]) <= TOLERANCE_PPM


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_every_golden_voxel(backend: str, shared: Path, outputs) -> None:
    golden = np.load(shared / "specs" / "golden" / "xqsm_unet.npz")["output"]
    assert outputs[backend].shape == golden.shape
    assert np.abs(outputs[backend] - golden).max() <= TOLERANCE_PPM


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_its_graph_takes_any_batch_and_size(backend: str, run, network, graph) -> None:
    other = 0.02 * torch.randn(2, 1, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    chi = run(network, other)
    assert np.abs(run(graph, other, backend=backend) - chi).max() <= TOLERANCE_PPM


@pytest.mark.slow
def test_a_swapped_concatenation_fails(run, network, field, monkeypatch) -> None:
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, dim: cat(tensors[::-1], dim))
    assert difference(run(network, field)) > WRONG_PPM


def test_a_global_residual_fails(outputs, field) -> None:
    assert difference(outputs["pytorch"] + field.numpy()) > WRONG_PPM


def test_has_the_published_size(network) -> None:
    assert sum(p.numel() for p in network.parameters()) == 4_150_785
    assert len(network.state_dict()) == 86
    assert network.divisor == 4


# the size of iQSM's, which has the same layers: channels_in, base, depth
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("xqsm_unet", (1, 64, 2)),
        ("iqsm_v1_unet_only", (1, 16, 4)),
        ("iqsm_v2_unet_only", (16, 16, 4)),
    ],
)
def test_has_the_published_keys(name: str, size: tuple[int, int, int], shared: Path) -> None:
    lines = (shared / "specs" / "keys" / f"{name}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    state = EncoderDecoder(*size).state_dict()
    own = {key: str(tuple(value.shape)) for key, value in state.items()}
    assert own == {key: shape for key, shape, _ in rows}
    assert encoder_decoder_size(state, name) == size


@pytest.mark.parametrize(("base", "depth"), [(2, 1), (3, 2), (2, 4)])
def test_sizes_are_read_off_the_shapes(base: int, depth: int, formula_state) -> None:
    network = network_from_state(formula_state(XqsmUnet(base, depth).state_dict()), Choices())
    assert network.divisor == 2**depth
    assert network.FinalConv.in_channels == base
    volume = torch.zeros(1, 1, *(network.divisor * n for n in (1, 2, 3)))
    with torch.inference_mode():
        assert network(volume).shape == volume.shape


@pytest.mark.parametrize("key", ["FinalConv.bias", "DecodeConvs.1.up.0.weight"])
def test_other_weights_are_refused_by_key(key: str, formula_state) -> None:
    state = formula_state(XqsmUnet(2).state_dict())
    without = {k: value for k, value in state.items() if k != key}
    for wrong in (without, state | {key: state[key][..., None]}, state | {f"{key}2": state[key]}):
        with pytest.raises(WeightsError, match=key):
            network_from_state(wrong, Choices())


def test_more_input_channels_are_refused(formula_state) -> None:
    state = formula_state(EncoderDecoder(16, 2, 2).state_dict())
    with pytest.raises(WeightsError, match=r"EncodeConvs\.0\.EncodeConv\.0\.weight has shape"):
        network_from_state(state, Choices())


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(WeightsError, match="not the weights of xqsm-unet"):
        network_from_state({"conv.weight": torch.zeros(1)}, Choices())
