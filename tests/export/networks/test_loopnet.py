"""LoopNet, which has no published output: its counts, a functional twin, its settings."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.ghpa import AXES, PLANES, Ghpa, Layout
from qsm_deploy.export.networks.loopnet import LoopNet, network_from_state
from qsm_deploy.export.networks.network import AXIAL_1MM, Choices
from qsm_deploy.kernels.errors import GeometryError, WeightsError

TOLERANCE_PPM = 1e-5
# of larger volumes: there PyTorch itself is up to 8e-6 from double precision
ROUNDING_PPM = 3e-5
WRONG_PPM = 1e-3
BACKENDS = ["onnxruntime", "openvino"]
SETTINGS = ("setting_loops", "setting_first_loop", "setting_residual")
BASE = 8
LOOPS = 2  # the fewest that feed features back
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def fill():
    """Return a function that gives a network random weights, and norms that fit its features.

    Voxels with all channels near zero would have their rounding errors magnified a thousandfold
    by the layer normalisation, and with as few channels as here there are such voxels; so the
    norms lift most features above zero.
    """

    def fill(network: LoopNet) -> LoopNet:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "params" in name or parameter.ndim > 1:
                    fan_in = 1 if "params" in name else parameter[0].numel()
                    parameter.normal_(0, fan_in**-0.5, generator=generator)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.momentum = None  # keep the statistics of all loops alike
                nn.init.constant_(module.bias, 2)
        network.out.weight.data *= 0.1
        network.train()(noise(2, 1, 32, 32, 32))
        return network.eval()

    return fill


@pytest.fixture(scope="module")
def network(fill) -> LoopNet:
    return fill(LoopNet(BASE, loops=LOOPS))


@pytest.fixture(scope="module")
def built(network) -> LoopNet:
    """Return the network as the export gets it."""
    return network_from_state(network.state_dict(), Choices())


@pytest.fixture(scope="module")
def graph(built) -> onnx.ModelProto:
    return onnx_from_module(built)


# what the exporter says of itself
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")


@pytest.fixture(scope="module")
def field() -> Tensor:
    return noise(1, 1, 16, 32, 16)


def noise(*shape: int) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def chi_of(network: nn.Module, field: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(field)


def layers(module: nn.Module) -> list[nn.Module]:
    """Return every layer outside the attention, and the attention as one layer."""
    if isinstance(module, Ghpa) or not list(module.children()):
        return [module]
    return [layer for child in module.children() for layer in layers(child)]


def test_has_the_layers_of_the_abstract() -> None:
    kinds = Counter(type(layer) for layer in layers(LoopNet(BASE)))
    del kinds[nn.ReLU]
    assert kinds == {
        nn.Conv3d: 19,
        nn.BatchNorm3d: 18,
        Ghpa: 8,
        nn.MaxPool3d: 4,
        nn.ConvTranspose3d: 4,
    }


@pytest.mark.parametrize(("base", "count"), [(16, 6_336_097), (32, 25_241_537), (64, 100_760_449)])
def test_parameters_do_not_depend_on_the_loops(base: int, count: int) -> None:
    for loops in (1, 4):
        with torch.device("meta"):
            network = LoopNet(base, loops=loops)
        assert sum(p.numel() for p in network.parameters()) == count


def test_says_how_it_is_used(built) -> None:
    assert (built.divisor, built.pipeline, built.geometry) == (16, "cnn", AXIAL_1MM)
    assert "attention maps" in built.why_whole


def test_has_the_proposed_keys_and_its_settings(shared: Path) -> None:
    path = shared / "specs" / "keys" / "loopnet_reconstruction_base16_PROPOSED.txt"
    rows = [row.split("\t") for row in path.read_text().splitlines() if not row.startswith("#")]
    with torch.device("meta"):
        state = LoopNet().state_dict()
    own = {key: str(tuple(value.shape)) for key, value in state.items()}
    assert own == dict(rows) | dict.fromkeys(SETTINGS, "()")
    assert len(rows) == 352


def loopnet_ref(
    field: Tensor,
    state: State,
    first_loop: str = "zeros",
    residual: str = "input",
    layout: Layout = PLANES,
    reverse_first: bool = False,
    skip_first: bool = False,
) -> Tensor:
    """Return what LoopNet makes of a field in two loops, from its weights by name."""

    def block(x: Tensor, key: str) -> Tensor:
        x = functional.conv3d(x, state[f"{key}.0.weight"], state[f"{key}.0.bias"], padding=1)
        norm = [state[f"{key}.1.{p}"] for p in ("running_mean", "running_var", "weight", "bias")]
        return functional.relu(functional.batch_norm(x, *norm))

    def attend(x: Tensor, key: str) -> Tensor:
        own = {k.removeprefix(f"{key}."): v for k, v in state.items() if k.startswith(f"{key}.")}
        gate = Ghpa(x.shape[1], x.shape[1], layout).double()
        gate.load_state_dict(own)
        return gate(x)

    x, reverse = field, [None] * 4
    for _ in range(2):
        start, skips = x, []
        for i in range(4):
            width = state[f"e2.{i}.0.bias"].numel()
            fed_back = reverse[i]
            if fed_back is None and first_loop == "zeros":
                fed_back = torch.zeros(x.shape[0], width, *x.shape[2:])
            elif fed_back is None:
                fed_back = torch.cat([x] * (width // x.shape[1]), dim=1)
            pair = [fed_back, x] if reverse_first else [x, fed_back]
            x = attend(block(block(torch.cat(pair, 1), f"e1.{i}"), f"e2.{i}"), f"eg.{i}")
            skips.append(x)
            x = functional.max_pool3d(x, 2)
        x = block(block(x, "m1"), "m2")
        for n, i in enumerate((3, 2, 1, 0)):
            up = functional.conv_transpose3d(
                x, state[f"up.{n}.weight"], state[f"up.{n}.bias"], stride=2
            )
            pair = [skips[i], up] if skip_first else [up, skips[i]]
            x = attend(block(block(torch.cat(pair, 1), f"d1.{n}"), f"d2.{n}"), f"dg.{n}")
            reverse[i] = x
        x = functional.conv3d(x, state["out.weight"], state["out.bias"])
        x = x + (field if residual == "input" else start)
    return x


@pytest.mark.parametrize("layout", [PLANES, AXES], ids=["planes", "axes"])
@pytest.mark.parametrize("residual", ["input", "iteration"])
@pytest.mark.parametrize("first_loop", ["zeros", "copy"])
def test_equals_its_twin(first_loop, residual, layout, fill, field) -> None:
    network = fill(LoopNet(BASE, layout, 2, first_loop, residual)).double()
    with torch.inference_mode():
        expected = loopnet_ref(field.double(), network.state_dict(), first_loop, residual, layout)
    assert (chi_of(network, field.double()) - expected).abs().max() <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["reverse_first", "skip_first"])
def test_a_swapped_concatenation_fails(wrong: str, network, built, field) -> None:
    with torch.inference_mode():
        state = {key: value.double() for key, value in network.state_dict().items()}
        expected = loopnet_ref(field.double(), state, **{wrong: True})
    assert (chi_of(built, field) - expected).abs().max() > WRONG_PPM


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"loops": 1}, {"loops": 4}),
        ({"first_loop": "zeros", "loops": 1}, {"first_loop": "copy", "loops": 1}),
        ({"residual": "input"}, {"residual": "iteration"}),
    ],
)
def test_every_setting_matters(one, other, fill, field) -> None:
    chi = [chi_of(fill(LoopNet(BASE, **settings)), field) for settings in (one, other)]
    assert (chi[0] - chi[1]).abs().max() > WRONG_PPM


def test_every_loop_trains_the_same_weights(fill, field) -> None:
    gradients = []
    for loops in (1, 2):
        network = fill(LoopNet(BASE, loops=loops))
        network(field).sum().backward()
        assert all(p.grad is not None for p in network.parameters())
        gradients.append(network.m1[0].weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3 * gradients[0].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 16, 32, 48), (2, 1, 48, 16, 32)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_its_graph_takes_any_batch_and_size(backend: str, shape, run, network, graph) -> None:
    field = noise(*shape)
    chi = chi_of(network, field).numpy()
    assert np.abs(run(graph, field, backend=backend) - chi).max() <= ROUNDING_PPM


@pytest.mark.slow
def test_its_graph_stores_weights_and_makes_maps_once_for_all_loops(graph, built) -> None:
    stored = sum(np.prod(tensor.dims) for tensor in graph.graph.initializer if tensor.dims)
    parameters = sum(p.numel() for p in built.parameters())
    assert parameters - 8 * 3 * 256 < stored < 1.01 * parameters
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert (kinds["Resize"], kinds["MaxPool"]) == (8 * 3, 4 * LOOPS)


@pytest.mark.slow
def test_folded_maps_change_nothing_and_leave_no_resize(run, built, field) -> None:
    size = tuple(field.shape[2:])
    fixed = built.fixed(size)
    chi = chi_of(built, field)
    assert (chi_of(fixed, field) - chi).abs().max() <= 1e-6
    graph = traced_for(fixed, field)
    assert "Resize" not in {node.op_type for node in graph.graph.node}
    for backend in BACKENDS:
        assert np.abs(run(graph, field, backend=backend) - chi.numpy()).max() <= TOLERANCE_PPM
    with pytest.raises(GeometryError, match="fold the network for that size"):
        fixed(noise(1, 1, 32, 32, 16))


def traced_for(network: LoopNet, field: Tensor) -> onnx.ModelProto:
    """Return the graph for one size."""
    names = {"input_names": ["local_field_ppm"], "output_names": ["chi_ppm"]}
    return torch.onnx.export(network, (field,), dynamo=True, verbose=False, **names).model_proto


def test_a_patch_of_it_is_another_function(built) -> None:
    field = torch.zeros(1, 1, 64, 16, 16)
    field[:, :, 8:24] = noise(1, 1, 16, 16, 16)
    whole = chi_of(built, field)[:, :, :32]
    patch = chi_of(built, field[:, :, :32])
    assert (whole - patch)[:, :, 4:12].abs().max() > WRONG_PPM


def test_norms_are_folded(network, built, field) -> None:
    assert not [m for m in built.modules() if isinstance(m, nn.BatchNorm3d)]
    assert (chi_of(built, field) - chi_of(network, field)).abs().max() <= TOLERANCE_PPM


@pytest.mark.parametrize("layout", [PLANES, AXES], ids=["planes", "axes"])
def test_width_attention_and_settings_come_from_the_file(layout, tmp_path, fill) -> None:
    path = tmp_path / "loopnet.safetensors"
    save_file(fill(LoopNet(12, layout, 3, "copy", "iteration")).state_dict(), path)
    network = network_from_state(load_state(path), Choices())
    assert network.widths == (12, 24, 48, 96)
    assert network.eg[0].layout == layout
    assert (network.loops, network.first_loop, network.residual) == (3, "copy", "iteration")


def test_weights_without_settings_take_the_defaults(network) -> None:
    state = {k: value for k, value in network.state_dict().items() if k not in SETTINGS}
    built = network_from_state(state, Choices())
    assert (built.loops, built.first_loop, built.residual) == (4, "zeros", "input")


def test_loaded_settings_replace_those_of_the_constructor(fill) -> None:
    network = LoopNet(BASE)
    network.load_state_dict(fill(LoopNet(BASE, PLANES, 2, "copy", "iteration")).state_dict())
    assert (network.loops, network.first_loop, network.residual) == (2, "copy", "iteration")


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("setting_loops", torch.tensor(0), "0"),
        ("setting_loops", torch.tensor(33), "33"),
        ("setting_loops", torch.tensor(4.5), r"torch.float32 of shape \(\)"),
        ("setting_loops", torch.tensor([4]), r"torch.int64 of shape \(1,\)"),
        ("setting_first_loop", torch.tensor(-1), "-1"),
        ("setting_residual", torch.tensor(2), "2"),
        ("setting_residual", torch.tensor(True), "torch.bool"),
    ],
)
def test_damaged_settings_are_refused(key: str, value: Tensor, seen: str, network) -> None:
    with pytest.raises(WeightsError, match=f"{key} is {seen}"):
        network_from_state(network.state_dict() | {key: value}, Choices())


@pytest.mark.parametrize("key", ["e1.2.0.weight", "dg.3.norm2.bias", "eg.0.params_hw"])
def test_other_weights_are_refused_by_key(key: str, network) -> None:
    state = network.state_dict()
    without = {k: value for k, value in state.items() if k != key}
    for wrong in (without, state | {key: state[key][..., None]}, state | {f"{key}2": state[key]}):
        with pytest.raises(WeightsError, match=key):
            network_from_state(wrong, Choices())


@pytest.mark.parametrize("count", [0, 6])
def test_a_width_that_cannot_be_is_refused(count: int, network) -> None:
    state = network.state_dict() | {"e1.0.0.bias": torch.zeros(count)}
    with pytest.raises(WeightsError, match=rf"e1\.0\.0\.bias holds {count} values"):
        network_from_state(state, Choices())


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(WeightsError, match="not the weights of loopnet"):
        network_from_state({"conv.weight": torch.zeros(1)}, Choices())
