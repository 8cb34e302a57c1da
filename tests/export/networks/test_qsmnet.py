"""QSMnet against its PyTorch version and against TensorFlow, and ways to get it wrong."""

import ast
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import scipy.io
import torch
from torch import Tensor

from qsm_deploy.export.checkpoints.normalisation import load_normalisation
from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.qsmnet import TORCH, Flavour, QSMnet, network_from_state
from qsm_deploy.export.networks.qsmnet_tf1 import state_from_tf1, torch_keys
from qsm_deploy.kernels.errors import WeightsError

GOLDEN = Path(__file__).parent / "golden"
TF1_WEIGHTS = GOLDEN / "qsmnet_tf1_weights.npz"
TOLERANCE = 1e-5  # the output's unit is that of the labels; there it is about 0.1
WRONG = 1e-3
CHANNELS = (32, 64, 128, 256, 512)
IDENTITY = {"field_mean": 0.0, "field_std": 1.0, "chi_mean": 0.0, "chi_std": 1.0}
TORCH_FILE = {
    name: np.array(value)
    for name, value in zip(
        ("field_mean", "field_std", "cosmos_sus_mean", "cosmos_sus_std"),
        IDENTITY.values(),
        strict=True,
    )
}
TF1_FILE = {"input_mean": 0.0, "input_std": 0.05, "label_mean": 0.25, "label_std": 2.0}
BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def field() -> Tensor:
    return torch.from_numpy(np.load(GOLDEN / "ir2qsm.npz")["input"])


@pytest.fixture(scope="module")
def k3(formula_state) -> QSMnet:
    state = formula_state(QSMnet(CHANNELS, 3, TORCH, IDENTITY).state_dict())
    return network_from_state(state, Choices(normalisation=TORCH_FILE))


@pytest.fixture(scope="module")
def k3_outputs(run_everywhere, k3, field) -> dict[str, np.ndarray]:
    return run_everywhere(k3, onnx_from_module(k3), field, torch.ones_like(field))


@pytest.fixture(scope="module")
def tf1_state() -> dict[str, Tensor]:
    return load_state(TF1_WEIGHTS)


def tf1_choices(activation: str = "leaky_relu", **numbers: float) -> Choices:
    arrays = {name: np.array(value) for name, value in (TF1_FILE | numbers).items()}
    return Choices(normalisation=arrays | {"network_info": np.array([activation, "qsmnet_deep"])})


def narrow(flavour: Flavour, tf1_state: Mapping[str, Tensor]) -> QSMnet:
    """Return the committed TensorFlow weights in a network that computes as ``flavour``."""
    numbers = dict(zip(IDENTITY, TF1_FILE.values(), strict=True))
    network = QSMnet((2, 2, 3, 3, 4), 5, flavour, numbers).eval()
    network.load_state_dict(state_from_tf1(tf1_state))
    return network


def torch_difference(chi: np.ndarray, case: str = "output_k3") -> float:
    golden = np.load(GOLDEN / "qsmnet_torch.npz")
    assert golden[case].size > 900
    return float(np.abs(chi.reshape(-1)[:: int(golden["stride"])] - golden[case]).max())


def tf1_difference(chi: np.ndarray, activation: str = "leaky_relu") -> float:
    golden = np.load(GOLDEN / "qsmnet_tf1.npz")
    assert float(golden["input_std"]) == TF1_FILE["input_std"]
    expected = golden[activation] * TF1_FILE["label_std"] + TF1_FILE["label_mean"]
    assert expected.size > 900
    return float(np.abs(chi.reshape(-1)[:: int(golden["stride"])] - expected).max())


@pytest.mark.parametrize("backend", ["pytorch", *BACKENDS])
def test_equals_the_committed_voxels(backend: str, k3_outputs) -> None:
    assert torch_difference(k3_outputs[backend]) <= TOLERANCE


@pytest.mark.parametrize("backend", ["pytorch", *BACKENDS])
def test_equals_every_golden_voxel(backend: str, shared: Path, k3_outputs) -> None:
    golden = np.load(shared / "specs" / "golden" / "qsmnet_torch_k3.npz")["output"]
    assert k3_outputs[backend].shape == golden.shape
    assert np.abs(k3_outputs[backend] - golden).max() <= TOLERANCE


@pytest.mark.slow
def test_equals_the_committed_voxels_with_kernels_of_five(run, field, formula_state) -> None:
    state = formula_state(QSMnet(CHANNELS, 5, TORCH, IDENTITY).state_dict())
    network = network_from_state(state, Choices(normalisation=TORCH_FILE))
    chi = run(network, field, torch.ones_like(field))
    assert torch_difference(chi, "output_k5") <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", [replace(TORCH, skip_first=True), replace(TORCH, slope=0.1)], ids=["order", "slope"]
)
def test_another_flavour_is_not_pytorchs(wrong: Flavour, run, k3, field) -> None:
    with torch.device("meta"):
        network = QSMnet(CHANNELS, 3, wrong, IDENTITY).eval()
    network.load_state_dict(k3.state_dict(), assign=True)
    assert torch_difference(run(network, field, torch.ones_like(field))) > WRONG


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_equals_tensorflow(activation: str, run, tf1_state, field) -> None:
    network = network_from_state(tf1_state, tf1_choices(activation))
    chi = run(network, field, torch.ones_like(field))
    assert tf1_difference(chi, activation) <= TOLERANCE


@pytest.mark.parametrize(
    "wrong",
    [Flavour(1e-3, 0.1, False), Flavour(1e-5, 0.1, True), Flavour(1e-3, 0.0, True)],
    ids=["order", "epsilon", "slope"],
)
def test_another_flavour_is_not_tensorflows(wrong: Flavour, run, tf1_state, field) -> None:
    whole = torch.ones_like(field)
    right = run(narrow(Flavour(1e-3, 0.1, True), tf1_state), field, whole)
    assert tf1_difference(right) <= TOLERANCE
    assert tf1_difference(run(narrow(wrong, tf1_state), field, whole)) > WRONG


@pytest.fixture(scope="module")
def shifted(tf1_state) -> QSMnet:
    """Return the network of a field whose mean is far from zero."""
    return network_from_state(tf1_state, tf1_choices(input_mean=0.02))


@pytest.fixture(scope="module")
def shifted_graph(shifted) -> onnx.ModelProto:
    return onnx_from_module(shifted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_its_graph_equals_tensorflow(backend: str, run, shifted_graph, field) -> None:
    whole = torch.ones_like(field)
    chi = run(shifted_graph, field + 0.02, whole, backend=backend)
    assert tf1_difference(chi) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_its_graph_takes_any_batch_and_size(backend: str, run, shifted, shifted_graph) -> None:
    generator = torch.Generator().manual_seed(0)
    field = 0.05 * torch.randn(3, 1, 16, 48, 32, generator=generator)
    mask = (torch.rand(3, 1, 16, 48, 32, generator=generator) > 0.3).float()
    chi = run(shifted_graph, field, mask, backend=backend)
    assert np.abs(chi - run(shifted, field, mask)).max() <= TOLERANCE


def test_voxels_padded_in_ppm_are_zero_once_normalised(run, shifted, tf1_state) -> None:
    field = 0.05 * torch.randn(1, 1, 20, 24, 28, generator=torch.Generator().manual_seed(1))
    padding = (0, 4, 0, 8, 0, 12)
    padded = torch.nn.functional.pad(field, padding)
    mask = torch.nn.functional.pad(torch.ones_like(field), padding)
    unit = network_from_state(tf1_state, tf1_choices(input_std=1.0))
    normalised = torch.nn.functional.pad((field - 0.02) / 0.05, padding)
    expected = run(unit, normalised, torch.ones_like(mask))
    assert np.abs(run(shifted, padded, mask) - expected).max() <= TOLERANCE
    assert np.abs(run(shifted, padded, torch.ones_like(mask)) - expected).max() > WRONG


def test_the_card_tells_the_normalisation(shifted) -> None:
    assert [tensor.name for tensor in shifted.inputs] == ["local_field_ppm", "mask"]
    assert shifted.divisor == 16
    assert shifted.normalisation == {
        "field_mean": 0.02,
        "field_std": 0.05,
        "chi_mean": 0.25,
        "chi_std": 2.0,
    }


def test_takes_the_authors_files(run, tmp_path: Path, tf1_state, field) -> None:
    paths = [tmp_path / "norm_factor_QSMnet_64.mat", tmp_path / "network_info_QSMnet_64.npy"]
    scipy.io.savemat(paths[0], {name: np.float32([[v]]) for name, v in TF1_FILE.items()})
    np.save(paths[1], ["leaky_relu", "qsmnet_deep"])
    network = network_from_state(tf1_state, Choices(normalisation=load_normalisation(paths)))
    assert tf1_difference(run(network, field, torch.ones_like(field))) <= TOLERANCE


def listed(shared: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the list of a published network's keys."""
    lines = (shared / "specs" / "keys" / f"{name}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {key: ast.literal_eval(shape) for key, shape, *_ in rows}


def empty(kernel: int) -> QSMnet:
    """Return the full network without memory for its weights."""
    with torch.device("meta"):
        return QSMnet(CHANNELS, kernel, TORCH, IDENTITY)


@pytest.mark.parametrize(("kernel", "parameters"), [(3, 22_581_217), (5, 99_453_985)])
def test_has_the_published_keys(kernel: int, parameters: int, shared: Path) -> None:
    network = empty(kernel)
    own = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert own == listed(shared, f"qsmnet_torch_k{kernel}")
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_has_the_published_variables(shared: Path) -> None:
    shapes = listed(shared, "qsmnet_tf1")
    assert shapes.keys() == torch_keys().keys()
    variables = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    converted = {key: tuple(v.shape) for key, v in state_from_tf1(variables).items()}
    own = {key: tuple(v.shape) for key, v in empty(5).state_dict().items()}
    assert converted == {k: shape for k, shape in own.items() if "num_batches_tracked" not in k}
    trained = [v for key, v in variables.items() if not key.endswith("_sh")]
    assert sum(v.numel() for v in trained) == 99_453_985


def test_reads_the_size_off_the_shapes(formula_state) -> None:
    state = formula_state(QSMnet((2, 3, 4, 5, 6), 1, TORCH, IDENTITY).state_dict())
    network = network_from_state(state, Choices(normalisation=TORCH_FILE))
    assert network.l_conv1.conv.weight.shape == (6, 5, 1, 1, 1)


@pytest.mark.parametrize("key", ["conv11.conv.weight", "l_conv2.conv.bias", "out.conv.bias"])
def test_refuses_other_keys_and_shapes(key: str, formula_state) -> None:
    state = formula_state(QSMnet((2, 3, 4, 5, 6), 3, TORCH, IDENTITY).state_dict())
    others = (
        {name: value for name, value in state.items() if name != key},
        state | {f"{key}.more": state[key]},
        state | {key: torch.zeros(7, 2)},
        state | {key: torch.tensor(0.0)},
    )
    for other in others:
        with pytest.raises(WeightsError, match=r"conv"):
            network_from_state(other, Choices(normalisation=TORCH_FILE))


def test_refuses_kernels_without_a_middle(formula_state) -> None:
    state = formula_state(QSMnet((2, 3, 4, 5, 6), 2, TORCH, IDENTITY).state_dict())
    with pytest.raises(WeightsError, match=r"conv11\.conv\.weight .* an odd number"):
        network_from_state(state, Choices(normalisation=TORCH_FILE))


def test_refuses_other_variables(tf1_state) -> None:
    name = "qsmnet/l_conv1/bn/mean_sh"
    without = {key: value for key, value in tf1_state.items() if key != name}
    with pytest.raises(WeightsError, match=name):
        network_from_state(without, tf1_choices())
    with pytest.raises(WeightsError, match=r"qsmnet/conv91/biases"):
        network_from_state(tf1_state | {"qsmnet/conv91/biases": torch.zeros(2)}, tf1_choices())
    flat = tf1_state | {"qsmnet/conv12/conv_weights": torch.zeros(2, 2)}
    with pytest.raises(WeightsError, match=r"qsmnet/conv12/conv_weights has shape \(2, 2\)"):
        network_from_state(flat, tf1_choices())


def test_leaves_out_what_the_optimiser_kept(tf1_state) -> None:
    slots = {"qsmnet/conv11/conv_weights/Adam", "qsmnet/conv11/conv_weights/Adam_1", "beta1_power"}
    assert slots < tf1_state.keys()
    assert not any("Adam" in key or "beta1" in key for key in state_from_tf1(tf1_state))


def test_needs_the_authors_numbers_and_activation(tf1_state, k3) -> None:
    with pytest.raises(WeightsError, match=r"--normalisation norm_factor_<name>\.mat") as refusal:
        network_from_state(k3.state_dict(), Choices())
    assert refusal.value.exit_code == 7
    with pytest.raises(WeightsError, match=r"network_info_<name>\.npy"):
        network_from_state(tf1_state, Choices(normalisation=TORCH_FILE))
    with pytest.raises(WeightsError, match=r"'tanh', expected relu or leaky_relu"):
        network_from_state(tf1_state, tf1_choices("tanh"))
    with pytest.raises(WeightsError, match=r"label_std is 0\.0, expected .* above zero"):
        network_from_state(tf1_state, tf1_choices(label_std=0.0))
