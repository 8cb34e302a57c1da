"""GHPA: the 2-D form against its authors' output, the 3-D forms against a twin in NumPy."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import erf
from torch import Tensor, nn
from torch.export import Dim

from qsm_deploy.export.networks import ghpa
from qsm_deploy.export.networks.ghpa import AXES, ORIGINAL_2D, PLANES, FixedGhpa, Ghpa, Layout
from qsm_deploy.kernels.errors import GeometryError

GOLDEN = Path(__file__).parent / "golden" / "ghpa.npz"
TOLERANCE = 1e-5
WRONG = 1e-3
GRAPH_BACKENDS = ["onnxruntime", "openvino"]
BACKENDS = ["pytorch", *GRAPH_BACKENDS]
FORMS = {"original": ORIGINAL_2D, "planes": PLANES, "axes": AXES}
FORMS_3D = {name: layout for name, layout in FORMS.items() if layout.dimensions == 3}
SIZE = (6, 10, 14)
EXPORT = {"dynamo": True, "input_names": ["x"], "output_names": ["y"], "verbose": False}
Array = NDArray[np.float64]

# what the exporter says of itself
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]


@pytest.fixture(scope="module")
def build(formula_state) -> Callable[..., Ghpa]:
    """Return a function that makes a GHPA with weights from the formula."""

    def build(channels_in: int, channels_out: int, layout: Layout) -> Ghpa:
        module = Ghpa(channels_in, channels_out, layout)
        module.load_state_dict(formula_state(module.state_dict()))
        return module.eval()

    return build


@pytest.fixture(scope="module")
def modules(build) -> dict[str, Ghpa]:
    return {name: build(32, 48, layout) for name, layout in FORMS.items()}


@pytest.fixture(scope="module")
def graphs(modules) -> dict[str, onnx.ModelProto]:
    return {name: traced(module, module.layout.dimensions) for name, module in modules.items()}


def traced(module: nn.Module, dimensions: int) -> onnx.ModelProto:
    axes = {0: Dim("n")} | {2 + i: 2 * Dim("xyz"[i]) for i in range(dimensions)}
    example = (torch.zeros(2, 32, *(8, 10, 12)[:dimensions]),)
    return torch.onnx.export(module, example, dynamic_shapes=(axes,), **EXPORT).model_proto


@pytest.fixture(scope="module")
def x(formula_state) -> Tensor:
    shape = (1, 32, 16, 16)
    tenth = formula_state({"input": torch.zeros(shape).flatten()})  # as a bias would be filled
    return 10 * tenth["input"].reshape(shape)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def difference(y: Array) -> float:
    """Return the largest difference from the committed numbers."""
    golden = np.load(GOLDEN)
    assert golden["output"].size > 300
    return float(np.abs(y.reshape(-1)[:: int(golden["stride"])] - golden["output"]).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_committed_numbers(backend: str, run, modules, graphs, x) -> None:
    y = run((modules if backend == "pytorch" else graphs)["original"], x, backend=backend)
    assert difference(y) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_golden_vector(backend: str, run, shared: Path, modules, graphs, x) -> None:
    golden = np.load(shared / "specs" / "golden" / "ege_ghpa2d_32_48.npz")["output"]
    y = run((modules if backend == "pytorch" else graphs)["original"], x, backend=backend)
    assert y.shape == golden.shape
    assert np.abs(y - golden).max() <= TOLERANCE


def test_swapped_groups_fail(run, modules, x, monkeypatch) -> None:
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda groups, dim: cat(groups[::-1], dim))
    assert difference(run(modules["original"], x)) > WRONG


def test_corners_that_do_not_align_fail(run, modules, x, monkeypatch) -> None:
    resize = nn.functional.interpolate
    monkeypatch.setattr(
        ghpa.functional, "interpolate", lambda grid, size, **_: resize(grid, size, mode="bilinear")
    )
    assert difference(run(modules["original"], x)) > WRONG


def test_maps_along_the_other_axis_fail(run, build, x) -> None:
    other = Layout(ORIGINAL_2D.spans | {"zx": (1,), "zy": (0,)}, "dw", 2)
    assert difference(run(build(32, 48, other), x)) > WRONG


@pytest.mark.parametrize(
    ("file", "form", "channels", "parameters"),
    [
        ("ege_ghpa2d_32_48", "original", (32, 48), 3184),
        ("ghpa3d_planes_32_32_PROPOSED", "planes", (32, 32), 4368),
    ],
)
def test_has_the_published_keys(file, form, channels, parameters, shared: Path) -> None:
    lines = (shared / "specs" / "keys" / f"{file}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    module = Ghpa(*channels, FORMS[form])
    own = {key: str(tuple(value.shape)) for key, value in module.state_dict().items()}
    assert own == {row[0]: row[1] for row in rows}
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_maps_along_axes_are_stored_like_the_original_ones() -> None:
    original = {k: v.shape for k, v in Ghpa(32, 32, ORIGINAL_2D).state_dict().items() if "zx" in k}
    state = Ghpa(32, 32, AXES).state_dict()
    for name in AXES.spans:
        own = {k.replace(name, "zx"): v.shape for k, v in state.items() if name in k}
        assert own == original


@pytest.mark.parametrize("form", list(FORMS_3D))
def test_equals_its_twin(form: str, run, modules) -> None:
    volume = noise(2, 32, *SIZE)
    state = {key: value.double().numpy() for key, value in modules[form].state_dict().items()}
    expected = ghpa_ref(volume.double().numpy(), state, form)
    y = run(modules[form], volume)
    assert np.abs(y - expected).max() <= TOLERANCE


@pytest.mark.parametrize("form", list(FORMS_3D))
def test_knows_its_axes(form: str, run, modules) -> None:
    volume = noise(1, 32, 8, 8, 8)
    y = run(modules[form], volume)
    turned = run(modules[form], volume.transpose(2, 4)).swapaxes(2, 4)
    assert np.abs(y - turned).max() > WRONG


@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
@pytest.mark.parametrize("form", list(FORMS))
def test_its_graph_takes_any_batch_and_size(form: str, backend: str, run, modules, graphs) -> None:
    for shape in ((1, 32, 16, 2, 30), (3, 32, 4, 18, 6)):
        volume = noise(*shape[: 2 + FORMS[form].dimensions])
        y = run(modules[form], volume)
        assert np.abs(run(graphs[form], volume, backend=backend) - y).max() <= TOLERANCE


@pytest.mark.parametrize("form", list(FORMS))
def test_maps_are_stretched_not_cut(form: str, modules) -> None:
    dimensions = FORMS[form].dimensions
    with torch.inference_mode():
        small, large = (modules[form].attention_maps([n] * dimensions) for n in (8, 16))
    for one, other in zip(small, large, strict=True):
        corner = other[tuple(slice(n) for n in one.shape)]
        assert (corner - one).abs().max() > WRONG


@pytest.mark.parametrize("form", list(FORMS))
def test_folded_maps_change_nothing(form: str, run, modules) -> None:
    size = SIZE[: FORMS[form].dimensions]
    volume = noise(2, 32, *size)
    fixed = FixedGhpa(modules[form], size)
    difference = run(fixed, volume) - run(modules[form], volume)
    assert np.abs(difference).max() <= 1e-6


@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
def test_folded_maps_leave_no_resize_in_the_graph(backend: str, run, modules, graphs) -> None:
    volume = noise(2, 32, *SIZE)
    fixed = FixedGhpa(modules["planes"], SIZE)
    graph = torch.onnx.export(fixed, (volume,), **EXPORT).model_proto
    kinds, dynamic = (Counter(n.op_type for n in g.graph.node) for g in (graph, graphs["planes"]))
    assert (dynamic["Resize"], dynamic["Conv"]) == (3, 10)
    assert (kinds["Resize"], kinds["Conv"]) == (0, 4)
    y = run(modules["planes"], volume)
    assert np.abs(run(graph, volume, backend=backend) - y).max() <= TOLERANCE


def test_folded_maps_refuse_another_size(modules) -> None:
    fixed = FixedGhpa(modules["planes"], SIZE)
    with pytest.raises(
        GeometryError, match=r"folded for \(6, 10, 14\), the input has \(6, 10, 12\)"
    ):
        fixed(noise(1, 32, 6, 10, 12))


def ghpa_ref(x: Array, state: dict[str, Array], form: str) -> Array:
    """Return what a 3-D GHPA makes of (n, c, d, h, w)."""
    x = norm_ref(x, state, "norm1")
    c = x.shape[1] // 4
    _, _, d, h, w = x.shape
    maps = {
        "planes": lambda: [
            map_ref(state, "dh", (d, h))[:, :, :, :, None],
            map_ref(state, "hw", (h, w))[:, :, None, :, :],
            map_ref(state, "dw", (d, w))[:, :, :, None, :],
        ],
        "axes": lambda: [
            map_ref(state, "cd", (d,))[:, :, :, None, None],
            map_ref(state, "ch", (h,))[:, :, None, :, None],
            map_ref(state, "cw", (w,))[:, :, None, None, :],
        ],
    }[form]()
    local = conv_ref(gelu_ref(conv_ref(x[:, 3 * c :], state, "local.0")), state, "local.2")
    groups = [x[:, n * c : (n + 1) * c] * m for n, m in enumerate(maps)]
    y = norm_ref(np.concatenate([*groups, local], axis=1), state, "norm2")
    return conv_ref(gelu_ref(conv_ref(y, state, "ldw.0")), state, "ldw.2")


def map_ref(state: dict[str, Array], name: str, size: tuple[int, ...]) -> Array:
    grid = state[f"params_{name}"]
    grid = grid if len(size) == 2 else grid[0]
    for axis, n in enumerate(size, start=2):
        at = np.linspace(0, 7, n)
        grid = np.apply_along_axis(lambda line, at=at: np.interp(at, range(8), line), axis, grid)
    return conv_ref(gelu_ref(conv_ref(grid, state, f"conv_{name}.0")), state, f"conv_{name}.2")


def conv_ref(x: Array, state: dict[str, Array], name: str) -> Array:
    """Depthwise with a kernel of 3, pointwise with a kernel of 1."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    spatial = weight.ndim - 2
    column = bias.reshape(-1, *[1] * spatial)
    if weight.shape[-1] == 1:
        return np.einsum("oc,nc...->no...", weight.reshape(weight.shape[:2]), x) + column
    padded = np.pad(x, [(0, 0), (0, 0)] + [(1, 1)] * spatial)
    y = np.zeros_like(x) + column
    for offset in np.ndindex(*[3] * spatial):
        window = tuple(slice(o, o + n) for o, n in zip(offset, x.shape[2:], strict=True))
        y += weight[(slice(None), 0, *offset)].reshape(column.shape) * padded[(..., *window)]
    return y


def gelu_ref(x: Array) -> Array:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def norm_ref(x: Array, state: dict[str, Array], name: str) -> Array:
    weight, bias = (state[f"{name}.{p}"].reshape(-1, 1, 1, 1) for p in ("weight", "bias"))
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6) * weight + bias
