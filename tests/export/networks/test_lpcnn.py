"""LPCNN of one and two orientations against the published network, and ways to get it wrong."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks import lpcnn
from qsm_deploy.export.networks.lpcnn import LPCNN, network_from_state
from qsm_deploy.export.networks.network import ANY_GEOMETRY, Choices
from qsm_deploy.export.networks.unrolled import Prior
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from qsm_deploy.kernels.errors import WeightsError

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # of the range of the output; 2e-6 was seen
WRONG = 1e-3
BACKENDS = ["pytorch", "onnxruntime", "openvino"]
DIRECTIONS = np.array([[0, 0, 1], [0, np.sin(0.4), np.cos(0.4)]], dtype=np.float32)
State = dict[str, Tensor]
Arrays = tuple[np.ndarray, ...]


one_and_two = pytest.mark.parametrize("orientations", [pytest.param(1, marks=pytest.mark.slow), 2])


def choices(orientations: int = 1, form: str = "unrolled", **normalisation: float) -> Choices:
    arrays = {name: np.array(value) for name, value in normalisation.items()}
    return Choices({"form": form, "orientations": str(orientations)}, arrays)


@pytest.fixture(scope="module")
def state(formula_state) -> State:
    return formula_state(LPCNN().state_dict()) | {"alpha": torch.tensor([1.5])}


@pytest.fixture(scope="module")
def scan(formula_state) -> Callable[[int], Arrays]:
    """Return fields, mask, voxel size and B0 directions of the golden vectors."""
    from_centre = np.arange(32) - 15.5
    squared = from_centre[:, None, None] ** 2 + from_centre[:, None] ** 2 + from_centre**2
    mask = (squared <= 12**2).astype(np.float32)[None, None]
    first = np.load(GOLDEN / "ir2qsm.npz")["input"]
    second = formula_state({"input2": torch.zeros(mask.size)})["input2"] / 2  # within +-0.05
    fields = np.concatenate([first, second.numpy().reshape(mask.shape) * mask], axis=1)
    voxel_size_mm = np.ones(3, dtype=np.float32)
    return lambda n: (fields[:, :n], mask, voxel_size_mm, DIRECTIONS[:n])


@pytest.fixture(scope="module")
def graph(state) -> Callable[[int], onnx.ModelProto]:
    made: dict[int, onnx.ModelProto] = {}

    def of(orientations: int) -> onnx.ModelProto:
        if orientations not in made:
            network = network_from_state(state, choices(orientations))
            made[orientations] = onnx_from_module(network)
        return made[orientations]

    return of


@pytest.fixture(scope="module")
def outputs(run_everywhere, state, graph, scan) -> Callable[[int], dict[str, np.ndarray]]:
    """Return what gives the maps for a number of orientations, by what made them [ppm]."""
    return functools.cache(
        lambda n: run_everywhere(network_from_state(state, choices(n)), graph(n), *scan(n))
    )


def normalised(chi_ppm: np.ndarray) -> np.ndarray:
    return (chi_ppm - lpcnn.PUBLISHED["chi_mean"]) / lpcnn.PUBLISHED["chi_std"]


def difference(chi_ppm: np.ndarray, orientations: int, mask: np.ndarray) -> float:
    """Return the largest difference from the committed voxels inside, as a share of the range."""
    golden = np.load(GOLDEN / "lpcnn.npz")
    expected, stride = golden[f"output_{orientations}"], int(golden["stride"])
    inside = mask.reshape(-1)[::stride] > 0
    assert np.count_nonzero(inside) > 150
    error = normalised(chi_ppm).reshape(-1)[::stride][inside] - expected[inside]
    return float(np.abs(error).max() / np.ptp(expected[inside]))


@one_and_two
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_committed_voxels(backend: str, orientations: int, outputs, scan) -> None:
    chi, mask = outputs(orientations)[backend], scan(1)[1]
    assert difference(chi, orientations, mask) <= TOLERANCE
    assert not chi[mask == 0].any()


@one_and_two
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_every_golden_voxel(
    backend: str, orientations: int, shared: Path, outputs, scan
) -> None:
    golden = np.load(shared / "specs" / "golden" / f"lpcnn_{orientations}ori.npz")["output"]
    inside = scan(1)[1] > 0
    error = normalised(outputs(orientations)[backend])[inside] - golden[inside]
    assert np.abs(error).max() <= TOLERANCE * np.ptp(golden[inside])


def test_the_keys_are_the_authors(shared: Path) -> None:
    lines = (shared / "specs" / "keys" / "lpcnn.txt").read_text().splitlines()
    listed = {key: shape for key, shape, _ in (line.split("\t") for line in lines[1:])}
    assert {key: str(tuple(t.shape)) for key, t in LPCNN().state_dict().items()} == listed


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_graph_takes_any_batch_size_and_geometry(backend: str, run, state, graph) -> None:
    rng = np.random.default_rng(0)
    fields = 0.02 * rng.standard_normal((2, 2, 12, 9, 10), dtype=np.float32)
    mask = (rng.random((2, 1, 12, 9, 10)) > 0.2).astype(np.float32)
    directions = np.array([[0.6, 0.0, 0.8], [0.36, 0.48, 0.8]], dtype=np.float32)
    arrays = (fields, mask, np.array([0.6, 1.0, 2.0], dtype=np.float32), directions)
    expected = run(network_from_state(state, choices(2)), *arrays)
    seen = run(graph(2), *arrays, backend=backend)
    assert np.abs(seen - expected).max() <= TOLERANCE * np.ptp(expected)


@pytest.fixture
def wrong_difference(run, state, scan) -> Callable[[LPCNN], float]:
    """Return a function that compares a network of these weights with the published one."""

    def of(network: LPCNN) -> float:
        network.load_state_dict(state)
        chi = run(network.eval(), *scan(network.orientations))
        return difference(chi, network.orientations, scan(1)[1])

    return of


@pytest.mark.slow
def test_a_joint_step_fails(wrong_difference) -> None:
    class Joint(LPCNN):
        def gradient_step(self, chi_ppm, projected, voxel_size_mm, directions):
            steps = [
                LPCNN.gradient_step(self, chi_ppm, [b], voxel_size_mm, [direction]) - chi_ppm
                for b, direction in zip(projected, directions, strict=True)
            ]
            return chi_ppm + torch.stack(steps).sum(dim=0)

    assert wrong_difference(Joint(orientations=2)) > 100 * WRONG


def test_fields_in_another_order_fail(wrong_difference) -> None:
    class Swapped(LPCNN):
        def gradient_step(self, chi_ppm, projected, voxel_size_mm, directions):
            swapped = (projected[::-1], voxel_size_mm, directions[::-1])
            return super().gradient_step(chi_ppm, *swapped)

    assert wrong_difference(Swapped(orientations=2)) > WRONG


@pytest.mark.slow
def test_the_operator_twice_for_its_square_fails(wrong_difference, monkeypatch) -> None:
    right = lpcnn.dipole_conv

    def twice(x: Tensor, voxel_size_mm: Tensor, b0: Tensor, multiplier: str = "dipole") -> Tensor:
        for _ in range(2 if multiplier == "dipole_squared" else 1):
            x = right(x, voxel_size_mm, b0)
        return x

    monkeypatch.setattr(lpcnn, "dipole_conv", twice)
    assert wrong_difference(LPCNN(orientations=2)) > WRONG


def test_the_numbers_of_the_training_fail(wrong_difference) -> None:
    training = {"chi_mean": -0.00043502135228842386, "chi_std": 0.028919385472807032}
    network = LPCNN(normalisation=training)
    assert wrong_difference(network) > WRONG


def tiny_state(width: int = 3, blocks: int = 2) -> State:
    return LPCNN(wide_resnet(1, width, blocks)).state_dict()


def test_its_size_is_read_off_the_weights() -> None:
    prior = network_from_state(tiny_state(), choices(form="split"))
    shapes = {key: tensor.shape for key, tensor in prior.state_dict().items()}
    assert shapes == {k: tensor.shape for k, tensor in tiny_state().items() if k != "alpha"}
    network = network_from_state(tiny_state(), choices())
    assert network.constants == {"alpha": 4, "iterations": 3}
    assert network.normalisation == lpcnn.PUBLISHED
    assert [info.shape[:2] for info in network.inputs] == [("n", 1), ("n", 1), (3,), (1, 3)]


@pytest.mark.parametrize("form", ["unrolled", "split"])
@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("alpha", None, "alpha"),
        ("gen.3.weight", None, r"gen\.3\.weight"),
        ("gen.0.weight", None, r"lpcnn: no gen\.0\.weight"),
        ("gen.0.weight", torch.zeros(3, 2, 3, 3, 3), r"gen\.0\.weight has shape \(3, 2"),
        ("alpha", torch.tensor([float("nan")]), "alpha holds NaN"),
        ("lambda_val", torch.zeros(1), "lambda_val"),
    ],
)
def test_other_weights_are_refused(form: str, key: str, tensor: Tensor | None, message) -> None:
    state = tiny_state()
    if tensor is None:
        del state[key]
    else:
        state[key] = tensor
    with pytest.raises(WeightsError, match=message):
        network_from_state(state, choices(form=form))


def test_the_split_form_is_the_prior_and_its_numbers(formula_state) -> None:
    state = formula_state(tiny_state())
    prior = network_from_state(state, choices(3, "split"))
    assert isinstance(prior, Prior)
    assert (prior.pipeline, prior.why_whole, prior.divisor) == ("lpcnn", None, 1)
    assert prior.geometry == ANY_GEOMETRY
    assert prior.constants == {"alpha": state["alpha"].item(), "iterations": 3}
    assert prior.normalisation == lpcnn.PUBLISHED
    assert [info.shape for info in prior.inputs] == [("n", 1, "x", "y", "z")]
    x = torch.randn(1, 1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(prior(x), network_from_state(state, choices()).gen(x), atol=1e-6)


def test_numbers_that_came_with_the_weights_win() -> None:
    network = network_from_state(
        tiny_state(), choices(train_gt_mean=0.001, train_gt_std=0.03, other=1.0)
    )
    assert network.normalisation == {"chi_mean": 0.001, "chi_std": 0.03}
    with pytest.raises(WeightsError, match="lacks train_gt_std"):
        network_from_state(tiny_state(), choices(train_gt_mean=0.001))
    with pytest.raises(WeightsError, match="train_gt_std is 0"):
        network_from_state(tiny_state(), choices(train_gt_mean=0.001, train_gt_std=0.0))
