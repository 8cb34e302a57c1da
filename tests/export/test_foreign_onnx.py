"""ONNX files that something else made: adopted, fixed in size or not, or refused in one line."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qsm_deploy.calibration.int8 import volumes
from qsm_deploy.calibration.int8.qdq import is_quantised
from qsm_deploy.calibration.phantom.measured_head import scan_from_phantom
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export import write_network
from qsm_deploy.export.cli import main
from qsm_deploy.export.graph import torch_operators
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.graph.torch_graph import TorchGraph
from qsm_deploy.export.own.assembly import network_from_module
from qsm_deploy.export.own.card_file import stated_in
from qsm_deploy.export.own.export import export_onnx
from qsm_deploy.export.own.foreign_onnx import foreign_graph, require_same, size_of
from qsm_deploy.kernels.errors import AccuracyError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import METADATA_KEY, ReceptiveField, Tiles
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.reconstruction.pipeline import network_outputs
from qsm_deploy.runtime.reconstruction.tiles import plan_for
from qsm_deploy.runtime.sessions.open import open_session

SIZE = (32, 32, 16)
MAPS = ["chi_ppm", "local_field_ppm", "r2prime_hz"]
SCALES = {
    "chi_ppm": {"mean": -0.001, "std": 0.03, "masked": True},
    "local_field_ppm": {"mean": -0.002, "std": 0.01, "masked": True},
    "r2prime_hz": {"mean": 10.0, "std": 20.0, "masked": True},
    "chi_positive_ppm": {"mean": 0.01, "std": 0.02, "at_least": 0.0},
    "chi_negative_ppm": {"mean": 0.02, "std": 0.03, "at_least": 0.0},
}
SEPARATING = {
    "network": "separating",
    "inputs": [MAPS],
    "outputs": ["chi_positive_ppm", "chi_negative_ppm"],
    "geometry": {
        "voxel_size_mm": [1, 1, 1],
        "voxel_tolerance": 0.1,
        "b0_direction": [0, 0, 1],
        "b0_tolerance_deg": 2,
    },
    "normalisation": SCALES,
}
TWICE = {"two": [1, 1, 2, 2, 2.0]}
PADS = {"pads": [0, 0, 1, 0, 2, 0, 0, 1, 2, 0]}
ONE = {
    "network": "theirs",
    "inputs": ["local_field_ppm"],
    "outputs": ["chi_ppm"],
    "geometry": {"voxel_size_mm": "any", "b0_direction": "any"},
    "normalisation": "none",
}


def unet(
    channels: tuple[int, int] = (3, 2),
    size: tuple = SIZE,
    middle: tuple = (),
    weights: Mapping = {},
    opset: int = 17,
) -> onnx.ModelProto:
    """Return two levels with a skip; ``middle`` are nodes from ``relu`` to ``half_done``."""
    rng = np.random.default_rng(0)
    taken, given = channels
    made = {
        "w1": rng.standard_normal((4, taken, 3, 3, 3)) / 5,
        "b1": rng.standard_normal(4) / 5,
        "scale": 1 + rng.random(4),
        "shift": rng.random(4),
        "mean": rng.random(4),
        "var": 1 + rng.random(4),
        "up": rng.standard_normal((4, 4, 2, 2, 2)) / 2,
        "w2": rng.standard_normal((given, 8, 1, 1, 1)),
    }
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in made.items()]
    tensors += [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()]
    node = helper.make_node
    nodes = [
        node("Conv", ["in", "w1", "b1"], ["conv"], pads=[1] * 6, kernel_shape=[3] * 3),
        node("BatchNormalization", ["conv", "scale", "shift", "mean", "var"], ["norm"]),
        node("Relu", ["norm"], ["relu"]),
        *(middle or [node("Identity", ["relu"], ["half_done"])]),
        node("MaxPool", ["half_done"], ["pool"], kernel_shape=[2] * 3, strides=[2] * 3),
        node("ConvTranspose", ["pool", "up"], ["upped"], kernel_shape=[2] * 3, strides=[2] * 3),
        node("Concat", ["upped", "relu"], ["both"], axis=1),
        node("Conv", ["both", "w2"], ["out"], kernel_shape=[1] * 3),
    ]
    graph = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, (1, taken, *size))],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, (1, given, *size))],
        tensors,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, producer_name="others"
    )


def reshaped(size=SIZE) -> dict:
    """Return what makes a graph compute at one size alone, with a layer that INT8 serves."""
    kernel = np.random.default_rng(1).standard_normal((4, 4, 3, 3, 3)).astype(np.float32) / 10
    flat, back = np.array([1, 4, -1]), np.array([1, 4, *size])
    return {
        "middle": (
            helper.make_node("Conv", ["relu", "kernel"], ["more"], pads=[1] * 6),
            helper.make_node("Reshape", ["more", "flat"], ["line"]),
            helper.make_node("Reshape", ["line", "back"], ["half_done"]),
        ),
        "weights": {"flat": flat, "back": back, "kernel": kernel},
    }


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, quick) -> None:
    monkeypatch.setattr("qsm_deploy.export.measure.verification.SHAPES", ((24, 20, 22),))
    monkeypatch.setattr(
        write_network, "measure_receptive_field", lambda m, c: ReceptiveField(m.reach, 1, 0.999)
    )


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


class TestTheGraphAsAModule:
    def test_a_file_of_fixed_size_becomes_free(self, tmp_path: Path) -> None:
        model = foreign_graph(save(unet(), tmp_path / "a.onnx"))
        said: list[str] = []
        module = TorchGraph(model, "a.onnx").eval()
        network = network_from_module(module, stated_in(SEPARATING), said.append, size=SIZE)
        assert (network.divisor, network.only_tiles, network.tiles) == (2, False, None)
        assert network.why_whole is None
        require_same(model, module, size_of(model), network.divisor, said.append)
        assert "of openvino and onnxruntime" in said[-1]
        assert [t.name for t in network.inputs] == [
            "local_field_ppm",
            "chi_ppm",
            "r2prime_hz",
            "mask",
        ]

    def test_normalisation_channels_and_units_meet_the_file(self, tmp_path: Path) -> None:
        path = save(unet(), tmp_path / "a.onnx")
        module = TorchGraph(foreign_graph(path), "a.onnx").eval()
        network = network_from_module(module, stated_in(SEPARATING), size=SIZE)
        rng = np.random.default_rng(0)
        maps = {n: rng.standard_normal((1, 1, *SIZE)).astype(np.float32) for n in MAPS}
        mask = (rng.random((1, 1, *SIZE)) > 0.5).astype(np.float32)
        z = [(maps[n] - SCALES[n]["mean"]) / SCALES[n]["std"] * mask for n in MAPS]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"in": np.concatenate(z, axis=1).astype(np.float32)})
        given = maps | {"mask": mask}
        with torch.inference_mode():
            found = network(*(torch.from_numpy(given[t.name]) for t in network.inputs))
        for i, name in enumerate(SEPARATING["outputs"]):
            expected = np.maximum(y[:, i : i + 1] * SCALES[name]["std"] + SCALES[name]["mean"], 0)
            assert np.abs(found[i].numpy() - expected).max() < 1e-4 * np.abs(expected).max()

    def test_one_that_is_truly_fixed_runs_in_tiles(self, tmp_path: Path) -> None:
        path = save(unet(**reshaped()), tmp_path / "a.onnx")
        module = TorchGraph(foreign_graph(path), "a.onnx").eval()
        network = network_from_module(module, stated_in(SEPARATING), size=SIZE)
        assert network.only_tiles
        assert network.tiles == Tiles(SIZE, SIZE, (24, 24, 12), "zero", "mean")
        model = onnx_from_module(network)
        shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        assert shape == [1, 1, *SIZE]
        assert [o.name for o in model.graph.output] == SEPARATING["outputs"]
        tiles = {"size": [16] * 3, "kept": [16] * 3, "stride": [8] * 3}
        card = stated_in(SEPARATING | {"tiles": tiles | {"beyond": "zero", "blend": "mean"}})
        with pytest.raises(UsageError, match=r"tiles of 16x16x16, but .* at 32x32x16"):
            network_from_module(module, card, size=SIZE)

    @pytest.mark.parametrize(
        ("nodes", "weights", "opset"),
        [
            (
                [("Resize", ["relu", "", "two"], {"mode": "nearest"})],
                TWICE,
                13,
            ),
            ([("Resize", ["relu", "", "two"], {"mode": "linear"})], TWICE, 19),
            (
                [("Pad", ["relu", "pads", "three"], {})],
                PADS,
                17,
            ),
            ([("Pad", ["relu", "pads"], {"mode": "reflect"})], {"pads": [0, 0, 0, 1, 2] * 2}, 18),
            ([("Slice", ["relu", "one", "big", "three_"], {})], {}, 17),
            ([("Clip", ["relu", "", "three"], {})], {}, 17),
            ([("InstanceNormalization", ["relu", "scale", "shift"], {})], {}, 17),
            ([("ReduceMean", ["relu"], {"axes": [2, 3], "keepdims": 1})], {}, 17),
            ([("AveragePool", ["relu"], {"kernel_shape": [3] * 3, "pads": [1] * 6})], {}, 17),
            (
                [("MaxPool", ["relu"], {"kernel_shape": [3] * 3, "auto_pad": "SAME_UPPER"})],
                {},
                17,
            ),
            (
                [
                    (
                        "ConvTranspose",
                        ["relu", "up"],
                        {"strides": [2] * 3, "output_padding": [1] * 3, "pads": [1, 0, 0, 0, 1, 0]},
                    )
                ],
                {},
                17,
            ),
            ([("Split", ["relu"], {"axis": 1, "num_outputs": 2})], {}, 18),
            ([("Transpose", ["relu"], {"perm": [0, 1, 4, 3, 2]})], {}, 17),
            ([("Softmax", ["relu"], {"axis": 1})], {}, 17),
            ([("PRelu", ["norm", "slope"], {})], {"slope": np.full((4, 1, 1, 1), 0.3)}, 17),
        ],
        ids=lambda value: value[0][0] if isinstance(value, list) else "",
    )
    def test_operators_mean_what_they_do_in_the_file(self, nodes, weights, opset, tmp_path) -> None:
        ((kind, inputs, attributes),) = nodes
        numbers = {
            "three": np.float32(0.3),
            "one": np.array([1]),
            "big": np.array([2**31]),
            "three_": np.array([3]),
        }
        for name, values in weights.items():
            whole = all(isinstance(v, int) for v in values)
            numbers[name] = np.asarray(values, np.int64 if whole else np.float32)
        outputs = ["y", "z"] if kind == "Split" else ["y"]
        model = unet(size=(6, 8, 10), middle=(), weights=numbers, opset=opset)
        kept = [n for n in model.graph.node if n.output[0] in ("conv", "norm", "relu")]
        del model.graph.node[:]
        made = helper.make_node(kind, inputs, outputs, **attributes)
        model.graph.node.extend([*kept, made])
        model.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("y"))
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
        path = save(model, tmp_path / "a.onnx")
        x = np.random.default_rng(0).standard_normal((1, 3, 6, 8, 10)).astype(np.float32)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (expected,) = session.run(None, {"in": x})
        found = TorchGraph(onnx.load(path), "a.onnx").eval()(torch.from_numpy(x)).numpy()
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

    def test_what_differs_from_the_file_is_refused_with_the_number(
        self, tmp_path, monkeypatch
    ) -> None:
        model = foreign_graph(save(unet(), tmp_path / "a.onnx"))
        operators = torch_operators.OPERATORS
        monkeypatch.setitem(operators, "Relu", lambda a, x: torch.relu(x) * 1.001)
        with pytest.raises(AccuracyError, match=r"by 0\.000\d+ of the output's range at 32x32x16"):
            require_same(model, TorchGraph(model, "a").eval(), SIZE, 2)

    def test_one_output_that_is_no_number_is_not_outdone_by_the_next(self, tmp_path) -> None:
        model = unet()
        model.graph.output.append(
            helper.make_tensor_value_info("relu", TensorProto.FLOAT, (1, 4, *SIZE))
        )
        model = foreign_graph(save(model, tmp_path / "a.onnx"))
        graph = TorchGraph(model, "a").eval()
        require_same(model, graph, SIZE, 2)

        class FirstLost(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                first, second = graph(x)
                return first * torch.nan, second

        with pytest.raises(AccuracyError, match="by inf of the output's range"):
            require_same(model, FirstLost(), SIZE, 2)


@pytest.mark.usefixtures("fast")
def test_a_free_file_from_end_to_end(tmp_path: Path) -> None:
    path = save(unet((1, 1), ("x", "y", "z")), tmp_path / "theirs.onnx")
    exported = export_onnx(path, ONE, output=tmp_path / "mine.onnx")
    card = load_card(tmp_path / "mine.onnx")
    assert card == exported.card
    assert (card.network, card.divisor, card.patchable, card.tiles) == ("theirs", 2, "yes", None)
    with pytest.raises(UsageError, match="it has a card: run it as it is"):
        export_onnx(tmp_path / "mine.onnx", ONE, output=tmp_path / "again.onnx")


def with_operator(kind: str, domain: str = "") -> onnx.ModelProto:
    node = helper.make_node(kind, ["relu"], ["half_done"], domain=domain)
    model = unet(middle=(node,))
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def far_away(path: Path) -> None:
    onnx.save(unet(), path, save_as_external_data=True, location="far.bin", size_threshold=0)
    (path.parent / "far.bin").unlink()


def quantised(path: Path) -> None:
    scale, zero = np.float32(0.1), np.int8(0)
    nodes = (
        helper.make_node("QuantizeLinear", ["relu", "s", "o"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "o"], ["half_done"]),
    )
    save(unet(middle=nodes, weights={"s": scale, "o": zero}), path)


def carded(path: Path) -> None:
    model = unet()
    helper.set_model_props(model, {METADATA_KEY: "{}"})
    save(model, path)


@pytest.mark.parametrize(
    ("make", "fields", "code", "message"),
    [
        (lambda path: None, {}, 7, "no such file"),
        (lambda path: path.write_bytes(b"nonsense"), {}, 7, "damaged"),
        (lambda path: path.write_bytes(unet().SerializeToString()[:900]), {}, 7, "damaged"),
        (lambda path: save(with_operator("Erf"), path), {}, 4, "cannot become PyTorch here: Erf"),
        (lambda path: save(with_operator("Own", "mine"), path), {}, 4, "mine::Own"),
        (far_away, {}, 7, "in another file that cannot be read"),
        (quantised, {}, 7, "quantised to INT8 already"),
        (carded, {}, 2, "it has a card"),
        (lambda path: save(unet(), path), {"inputs": MAPS}, 2, "the graph takes in 1x3x32x32x16"),
        (lambda path: save(unet(), path), {"inputs": [MAPS[:2]]}, 2, "names 2 channels"),
        (lambda path: save(unet(), path), {"outputs": ["chi_ppm"]}, 2, "the graph gives 2"),
    ],
)
def test_one_line_each(make, fields, code, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "theirs.onnx")
    monkeypatch.setattr(
        "qsm_deploy.export.own.export.stated_in", lambda card: stated_in(SEPARATING | fields)
    )
    before = sorted(tmp_path.iterdir())
    assert main(["--onnx", "theirs.onnx", "-o", "mine.onnx", "-q"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_maps_from_end_to_end(tmp_path: Path, monkeypatch, fixed: bool, precision) -> None:
    for name, value in (("HEAD", (48, 48, 48)), ("CORNER", (8, 8, 8)), ("SHAPE", SIZE)):
        monkeypatch.setattr(f"qsm_deploy.export.measure.rounding.{name}", value)
    path = save(unet(**(reshaped() if fixed else {})), tmp_path / "theirs.onnx")
    output = tmp_path / "mine.onnx"
    export_onnx(path, SEPARATING, output=output, precision=precision, gate_ppb=1000)
    card = load_card(output)
    assert (card.network, card.precision) == ("separating", precision)
    assert [tensor.name for tensor in card.outputs] == SEPARATING["outputs"]
    assert (card.tiles is not None) == fixed == (card.patchable == "no")
    shape = SIZE if fixed else (12, 16, 8)
    rng = np.random.default_rng(0)
    given = {t.name: rng.random((1, 1, *shape), dtype=np.float32) for t in card.inputs}
    exact = network_from_module(
        TorchGraph(foreign_graph(path), "").eval(), stated_in(SEPARATING), size=SIZE
    )
    with torch.inference_mode():
        expected = torch.cat(exact(*map(torch.from_numpy, given.values())), dim=1).numpy()
    bound = {"fp32": 1e-5, "fp16": 3e-3}[precision] * np.abs(expected).max()
    for backend in ("onnxruntime", "openvino"):
        got = open_session(output, backend).run(given)
        assert np.abs(got - expected).max() <= bound


@pytest.mark.usefixtures("fast")
def test_int8_in_tiles(tmp_path: Path, monkeypatch) -> None:
    grid = Geometry((44, 40, 42))
    monkeypatch.setattr(volumes, "GRIDS", (grid,))
    for name, value in (("HEAD", (48, 48, 48)), ("CORNER", (8, 8, 8)), ("SHAPE", SIZE)):
        monkeypatch.setattr(f"qsm_deploy.export.measure.rounding.{name}", value)
    path = save(unet(**reshaped()), tmp_path / "theirs.onnx")
    about = {"budget_ppb": 1e3, "budget_max_ppb": 1e5, "budget_xsim": 1.0, "patches": 2}
    about |= {"precision": "int8", "calibration": "phantoms", "collector": "max"}
    export_onnx(path, SEPARATING, output=tmp_path / "low.onnx", **about)
    export_onnx(path, SEPARATING, output=tmp_path / "exact.onnx")
    card = load_card(tmp_path / "low.onnx")
    assert (card.precision, card.tiles is not None) == ("int8", True)
    assert is_quantised(onnx.load(tmp_path / "low.onnx"))
    scan = scan_from_phantom(card, head_phantom(grid, seed=3))
    plan = plan_for(card, grid.shape)
    sessions = [open_session(tmp_path / name, "onnxruntime") for name in ("low.onnx", "exact.onnx")]
    got, exact = (network_outputs(session, scan, plan) for session in sessions)
    assert 0 < np.linalg.norm(got - exact) < 0.2 * np.linalg.norm(exact)


class Upsampling(torch.nn.Module):
    """Half the size and back, by a factor or to the size that it had."""

    def __init__(self, mode: str, *, corners: bool | None = None, to_size: bool = False) -> None:
        super().__init__()
        self.first, self.last = (torch.nn.Conv3d(1, 1, 3, padding=1) for _ in range(2))
        self.how = {"mode": mode, "align_corners": corners}
        self.to_size = to_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        size = {"size": h.shape[2:]} if self.to_size else {"scale_factor": 2.0}
        half = torch.nn.functional.avg_pool3d(h, 2)
        return self.last(h + torch.nn.functional.interpolate(half, **size, **self.how))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Sequential(torch.nn.Conv3d(1, 1, 3, padding=1), torch.nn.PReLU()).half(),
        Upsampling("nearest"),
        Upsampling("trilinear", corners=False),
        Upsampling("trilinear", corners=True),
        Upsampling("trilinear", corners=False, to_size=True),
    ],
    ids=["half precision", "nearest", "trilinear", "corners", "to a size"],
)
def test_files_of_the_older_exporter(module, tmp_path: Path) -> None:
    path, axes = tmp_path / "theirs.onnx", {2: "a", 3: "b", 4: "c"}
    module = module.eval()
    x = torch.randn(1, 1, 16, 16, 16, dtype=next(module.parameters()).dtype)
    torch.onnx.export(module, (x,), path, dynamo=False, input_names=["f"], dynamic_axes={"f": axes})
    graph = foreign_graph(path)
    ours = TorchGraph(graph, "theirs").eval()
    require_same(graph, ours, None, 2)
    network = network_from_module(ours, stated_in(ONE))
    traced = onnx_from_module(network).SerializeToString()
    session = onnxruntime.InferenceSession(traced, providers=["CPUExecutionProvider"])
    x = torch.randn(1, 1, 20, 14, 18)
    (made,) = session.run(None, {"local_field_ppm": x.numpy()})
    with torch.inference_mode():
        expected = module.float()(x).numpy()
    assert np.abs(made - expected).max() <= 1e-5
