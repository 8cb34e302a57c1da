"""INT8: what may be in it, what is demoted for the budget, and what the command writes."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import TensorProto, numpy_helper

from qsm_deploy.calibration.graph.graph_run import GraphRun
from qsm_deploy.calibration.int8 import choice as int8_choice
from qsm_deploy.calibration.int8 import volumes
from qsm_deploy.calibration.int8.calibration import Int8Choices, calibrate
from qsm_deploy.calibration.int8.layers import FloatGraphs, int8_layers, kept_from_int8
from qsm_deploy.calibration.int8.map_error import MapError
from qsm_deploy.calibration.int8.qdq import Int8Layer, Quantiser, is_quantised
from qsm_deploy.calibration.int8.search import Budget, Found, Sensitivity, fewest
from qsm_deploy.calibration.int8.table import layer_rows
from qsm_deploy.calibration.int8.volumes import CalibrationData
from qsm_deploy.calibration.phantom.measured_head import scan_from_phantom
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.cli import main
from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.export.graph.precision_policy import reducible_nodes
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.graph.rounded_run import RoundedRun
from qsm_deploy.export.int8 import verification
from qsm_deploy.export.int8.verification import exact_session
from qsm_deploy.export.measure import rounding as rounding_error
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import MAX_BYTES, METADATA_KEY, parse_card
from qsm_deploy.runtime.sessions.int8 import sums_in_int32
from qsm_deploy.runtime.sessions.open import open_session
from tests.export.table import tv_unet

FOLDER_SHAPE = (24, 28, 20)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def graphs(traced: Callable[[str], onnx.ModelProto]) -> dict[str, onnx.ModelProto]:
    """Return small graphs in FP32, by network."""
    cases = {"ir2qsm": "ir2qsm input", "prior": "lpcnn split", "tv-unet": "tv-unet"}
    return {name: traced(case) for name, case in cases.items()}


def feeds_of(model: onnx.ModelProto, size: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        value.name: (1,) if value.name == "field_noise_ppm" else (1, 1, size, size, size)
        for value in model.graph.input
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def quantiser_of(model: onnx.ModelProto, layers: list[Int8Layer]) -> Quantiser:
    tensors = sorted({layer.activation for layer in layers})
    seen = GraphRun(model, tensors).look(feeds_of(model))
    amax = {name: float(np.abs(value).max()) for name, value in zip(tensors, seen, strict=True)}
    return Quantiser.from_model(model, layers, amax)


def layers_of(model: onnx.ModelProto) -> list[Int8Layer]:
    return int8_layers(model.graph, reducible_nodes(model.graph))


def names(layers: list[Int8Layer]) -> list[str]:
    return [layer.partner.removesuffix(".weight") for layer in layers if layer.kind != "Add"]


def test_first_last_and_gates_start_in_higher_precision(graphs) -> None:
    graph = graphs["ir2qsm"].graph
    may = names(layers_of(graphs["ir2qsm"]))
    assert len(may) == 15
    for part in ("pre_transform.0", "middle", "post_transform.1", "post_transform_conv_block2"):
        assert not any(part in name for name in may), part
    assert any("pre_transform.2" in name for name in may)
    why = kept_from_int8(graph, reducible_nodes(graph))
    weights = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "Conv"}
    for output, (precision, reason) in why.items():
        if "middle" in weights[output]:
            assert (precision, reason) == ("fp16", "gates, or is gated")
        if "pre_transform.0" in weights[output]:
            assert (precision, reason) == ("fp16", "takes an input or an estimate")
        if "block2" in weights[output] or "post_transform.1" in weights[output]:
            assert precision == "fp32"
    assert len(why) + len(may) == sum("Conv" in node.op_type for node in graph.node)


def test_of_a_residual_block_the_shortcut_may_be_in_int8(graphs) -> None:
    layers = layers_of(graphs["prior"])
    adds = [layer for layer in layers if layer.kind == "Add"]
    convolutions = [layer for layer in layers if layer.kind == "Conv"]
    assert len(adds) == 2
    assert all(add.partner in {c.output for c in convolutions} for add in adds)
    # the shortcut is what the block's first convolution takes, so that both share its Q/DQ
    assert {add.activation for add in adds} <= {c.activation for c in convolutions}
    assert names(layers)[0] == "gen.2.0.conv1"


def test_of_tv_unet_what_takes_maps_and_the_sum_with_one_stay_in_float(graphs) -> None:
    model = graphs["tv-unet"]
    layers = layers_of(model)
    inner = {"encoder", "down", "bottom", "up", "decoder", "to_full"}
    assert {name.split(".")[0] for name in names(layers)} == inner
    graph = quantiser_of(model, layers).quantised(with_precision(model, "fp16"), layers).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert kinds["last.weight"] == kinds["linear.weight"] == TensorProto.FLOAT
    taking = [node.op_type for node in graph.node if "tv_chi_ppm" in node.input]
    assert taking == ["Div", "Add"]
    back = {node.output[0]: node for node in graph.node}
    (last,) = (node for node in graph.node if "chi_ppm" in node.output)
    scaled = back[last.input[1]]
    correction = back[scaled.input[0]]
    assert (last.input[0], scaled.op_type, correction.op_type) == ("tv_chi_ppm", "Mul", "Add")
    assert {back[name].op_type for name in correction.input} == {"Conv"}


@pytest.mark.parametrize("name", ["ir2qsm", "prior", "tv-unet"])
def test_backends_run_q_dq_as_true_rounding_says(name: str, graphs, tmp_path: Path) -> None:
    model = graphs[name]
    layers = layers_of(model)
    quantised = quantiser_of(model, layers).quantised(model, layers)
    onnx.checker.check_model(quantised, full_check=True)
    feeds = feeds_of(model)
    exact = GraphRun(model).run(feeds)
    expected = RoundedRun(quantised).run(feeds)
    cost = np.abs(expected - exact).mean()
    assert cost > 1e-4 * np.abs(exact).mean()
    in_onnxruntime = GraphRun(quantised).run(feeds)
    unoptimised = onnxruntime.SessionOptions()
    unoptimised.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(quantised.SerializeToString(), unoptimised)
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}
    compiled = core.compile_model(core.read_model(quantised.SerializeToString()), "CPU", settings)
    # a sum in another order may fall on the other side of a step
    for got in (in_onnxruntime, plain.run(None, feeds)[0], compiled(feeds)[0]):
        assert np.abs(got - expected).mean() < 0.1 * cost


def test_half_of_it_is_in_fp16(graphs) -> None:
    model = graphs["tv-unet"]
    layers = layers_of(model)
    half = with_precision(model, "fp16")
    quantised = quantiser_of(model, layers[1:]).quantised(half, layers[1:])
    onnx.checker.check_model(quantised, full_check=True)
    kinds = {t.name: t.data_type for t in quantised.graph.initializer}
    weights = {name for name, kind in kinds.items() if kind == TensorProto.INT8}
    convolutions = [layer for layer in layers[1:] if layer.kind != "Add"]
    assert {f"{layer.partner}_int8" for layer in convolutions} <= weights
    assert kinds[f"{layers[0].partner}_fp16"] == TensorProto.FLOAT16
    scales = [kind for name, kind in kinds.items() if name.endswith("_scale")]
    assert set(scales) == {TensorProto.FLOAT16}
    feeds = feeds_of(model)
    exact = GraphRun(model).run(feeds)
    errors = [np.abs(RoundedRun(g).run(feeds) - exact).mean() for g in (half, quantised)]
    assert 0 < 3 * errors[0] < errors[1] < 0.1 * np.abs(exact).mean()


def test_a_layer_that_takes_nothing_but_zeros_stays_in_fp16(graphs, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(graphs["ir2qsm"])
    dead = "iteration0_layer0_encoder_conv2.1.conv.0.bias"  # before a ReLU
    bias = next(t for t in model.graph.initializer if t.name == dead)
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims, -1e6, dtype=np.float32), dead))
    card = provisional_card(REGISTRY["ir2qsm"], IR2QSM((2, 4)), Choices(), "none", "0" * 64)
    head = scan_from_phantom(card, head_phantom(Geometry(FOLDER_SHAPE), seed=1))
    choices = Int8Choices("phantoms", patches=2)
    data = CalibrationData((head,), "", ())
    open_exact = partial(exact_session, model, card, tmp_path / "a.onnx")
    floats = FloatGraphs(model, model, reducible_nodes(model.graph))  # -1e6 is beyond FP16
    found = calibrate(floats, card, data, choices, open_exact)
    silent = {a.output for a in layers_of(model)} - {a.output for a in found.candidates}
    assert silent
    fine = MapError(0, 0, 0, 0, 0)
    alone = {a.output: Sensitivity(40, fine) for a in found.candidates}
    search = Found(found.candidates, alone, fine, fine, fine)
    amax = found.quantiser("max").amax
    rows = layer_rows(found, search, amax)
    assert sum(row.macs_share for row in rows) == pytest.approx(1)
    why = "takes nothing but zeros on the calibration data"
    assert {row.precision for row in rows if row.why == why} == {"fp16"}
    assert sum(row.why == why for row in rows) == len(silent)


@pytest.mark.parametrize("needed", [0, 1, 5, 12, 13])
def test_no_more_is_demoted_than_needed(needed: int) -> None:
    tried = []

    def holds(count: int) -> bool:
        tried.append(count)
        return count >= needed

    assert fewest(13, holds) == needed
    assert len(tried) <= 4


def test_a_budget_is_on_all_its_numbers_and_knows_nan() -> None:
    budget = Budget(2.0, 0.005, 200.0)
    fine = MapError(9, 2.0, 99, 200.0, 0.005)
    assert budget.holds(fine)
    assert not budget.holds(replace(fine, median_ppb=2.01))
    assert not budget.holds(replace(fine, xsim_change=0.0051))
    assert not budget.holds(replace(fine, max_ppb=200.1))
    assert not budget.holds(replace(fine, xsim_change=float("nan")))


@pytest.fixture
def folder(
    formula_state: Callable[..., State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return a folder with small weights, in which everything runs on small heads.

    They are of a network whose work lies inside, in what may be in INT8, as in the bundled one.
    """
    weights = formula_state(tv_unet(half=16, quarter=32, full=2).state_dict())
    torch.save({key: value.half() for key, value in weights.items()}, tmp_path / "tiny.pth")
    for name in ("HEAD", "SHAPE"):
        monkeypatch.setattr(rounding_error, name, (24, 20, 28))
    monkeypatch.setattr(rounding_error, "CORNER", (0, 0, 0))
    grids = [replace(grid, shape=FOLDER_SHAPE) for grid in volumes.GRIDS[:2]]
    monkeypatch.setattr(volumes, "GRIDS", grids)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*arguments: str, weights: str = "tiny.pth", network: str = "tv-unet") -> int:
    return main(["--model", network, "--weights", weights, *arguments])


INT8 = ("--int8", "--calibration", "phantoms", "-o", "a.onnx", "--patches", "2")
GENEROUS = ("--budget-ppb", "30", "--budget-xsim", "0.5", "--budget-max-ppb", "9999")


@pytest.mark.usefixtures("quick")
def test_the_command_writes_the_file_the_card_and_the_table(folder: Path, capsys) -> None:
    assert export(*INT8, *GENEROUS, "--layers", "layers.json") == 0
    out, err = capsys.readouterr()
    assert "of the multiply-accumulates in INT8: median " in out
    assert "encoder.second" in out
    assert "onnxruntime: median " in err
    card = parse_card(Path("a.json").read_text())
    assert card.precision == "int8"
    assert card.options["collector"] == "mse"
    assert len(card.options["calibration_sha256"]) == 64
    assert card.options["budget"] == "median 30 ppb, max 9999 ppb, XSIM 0.5"
    assert 0.5 < float(card.options["int8_share"]) <= 1
    accurate = sums_in_int32()
    assert card.options.get("int8_in") == ("openvino" if accurate else None)
    assert ("openvino in INT8: median " in err) == accurate
    assert "rounded in pytorch" in card.verified.reference
    assert len(card.to_json()) < MAX_BYTES
    model = onnx.load("a.onnx")
    assert is_quantised(model)
    assert parse_card({p.key: p.value for p in model.metadata_props}[METADATA_KEY]) == card
    rows = json.loads(Path("layers.json").read_text())["int8"]
    assert sum(row["macs_share"] for row in rows) == pytest.approx(1)
    quantised = [row for row in rows if row["precision"] == "int8"]
    assert sum(row["macs_share"] for row in quantised) == pytest.approx(
        float(card.options["int8_share"]), abs=1e-3
    )
    for row in quantised:
        assert row["scale"] == pytest.approx(row["amax"] / 127)
        assert row["alone_mean_ppb"] >= 0
    feeds = feeds_of(model, 8)
    maps = [open_session(Path("a.onnx"), b).run(feeds) for b in ("onnxruntime", "openvino")]
    assert np.abs(maps[0] - maps[1]).mean() < 0.02 * np.abs(maps[0]).mean()


@pytest.mark.parametrize(
    ("max_ppb", "vnni", "said"),
    [
        (199, True, ["openvino in INT8: median", "onnxruntime will compute this file in FP32"]),
        (201, True, ["max 2e+02 ppb, XSIM change 0, the budget is", "openvino will compute this"]),
        (199, False, ["openvino will compute this file in FP32"]),
    ],
)
def test_a_backend_that_misses_the_budget_in_int8_computes_in_fp32(
    max_ppb: float, vnni: bool, said: list[str], monkeypatch
) -> None:
    fine = MapError(0, 0, 0, 0, 0)
    errors = {"fp32": fine, "int8": replace(fine, max_ppb=max_ppb)}

    def opened(path: Path, backend: str, precision: str = "fp32") -> SimpleNamespace:
        return SimpleNamespace(precision=precision)

    monkeypatch.setattr(verification, "open_session", opened)
    monkeypatch.setattr(verification, "sums_in_int32", lambda: vnni)
    found = SimpleNamespace(
        choices=Int8Choices("phantoms"),
        error=fine,
        evaluation=SimpleNamespace(session_error=lambda s: errors[s.precision], shapes=()),
    )
    lines: list[str] = []
    verified, options = verification.verify_int8(
        cast(Any, found), Path("a.onnx"), ("openvino", "onnxruntime"), lines.append
    )
    accurate = vnni and max_ppb < 200
    assert options == ({"int8_in": "openvino"} if accurate else {})
    assert verified.max_ppb == (max_ppb if accurate else 0)
    assert all(any(words in line for line in lines) for words in said), lines


@pytest.mark.usefixtures("quick")
def test_what_cannot_keep_to_the_budget_stays_in_fp16_and_says_so(folder: Path, capsys) -> None:
    tight = ("--budget-ppb", "1e-4", "--json", "-q", "--layers", "layers.json")
    real = int8_choice.USEFUL_SHARE
    assert 0 < real < 0.5
    assert export(*INT8, *tight) == 0
    result = json.loads(capsys.readouterr().out)
    assert "INT8 keeps to the budget (median 0.0001 ppb" in result["int8"]["kept_fp16"]
    assert result["card"]["precision"] == "fp16"
    assert "collector" not in result["card"]["options"]
    assert not is_quantised(onnx.load("a.onnx"))
    assert {row["precision"] for row in result["int8"]["layers"]} == {"fp16", "fp32"}
    assert any("demoted" in row["why"] for row in result["int8"]["layers"])


@pytest.mark.usefixtures("quick")
def test_a_plan_in_int8_is_built_without_a_gpu(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    named = ("-o", "a.plan", "--engine", "tensorrt-rtx", "--shapes", "16,32,64")
    assert export(*INT8, *GENEROUS, "-q", *named, "--layers", "layers.json") == 0
    card = parse_card(Path("a.json").read_text())
    assert card.precision == "int8"
    assert card.to_json().encode() in Path("a.plan").read_bytes()
    report = json.loads(Path("layers.json").read_text())
    assert report.keys() == {"int8", "engine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--int8",), "--int8 needs --calibration"),
        (("--calibration", "phantoms"), "--calibration is about INT8"),
        (("--fp16", "--collector", "max"), "--collector is about INT8"),
        ((*INT8, "--gate-ppb", "3"), "--gate-ppb is for the other precisions"),
    ],
)
def test_what_contradicts_itself_is_a_usage_error(arguments, message, folder, capsys) -> None:
    assert export(*arguments) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["tiny.pth"]


@pytest.mark.usefixtures("quick")
def test_an_empty_folder_leaves_no_file(folder: Path, capsys) -> None:
    (folder / "maps").mkdir()
    assert export("--int8", "--calibration", "maps", "-o", "a.onnx", "-q") == 3
    assert "maps: no field maps for the calibration" in capsys.readouterr().err
    assert not (folder / "a.onnx").exists()


def test_a_model_in_place_of_weights_is_told_apart(
    folder: Path, graphs: dict[str, onnx.ModelProto], any_model: Callable[..., Path], capsys
) -> None:
    quantised = any_model("ir2qsm", quantised=True)
    assert export(*INT8, weights=str(quantised), network="ir2qsm") == 7
    assert "quantised to INT8 already" in capsys.readouterr().err
    assert export(*INT8, weights=str(quantised)) == 7
    assert "its card says ir2qsm, not tv-unet" in capsys.readouterr().err
    assert export(*INT8, weights=str(any_model("ir2qsm")), network="ir2qsm") == 7
    assert "an exported model, no weights" in capsys.readouterr().err
    (folder / "b.onnx").write_bytes(b"\x08\x0a\xff\xff")
    assert export(*INT8, weights="b.onnx") == 7
    assert "damaged" in capsys.readouterr().err


def test_quantised_weights_are_refused(folder: Path, tiny_tv_unet: Network, capsys) -> None:
    state = tiny_tv_unet.state_dict()
    state["last.weight"] = (state["last.weight"] * 100).to(torch.int8)
    torch.save(state, "tiny8.pth")
    assert export(*INT8, weights="tiny8.pth") == 7
    assert "last.weight is quantised already (int8)" in capsys.readouterr().err


@pytest.fixture
def any_model(graphs: dict[str, onnx.ModelProto], folder: Path) -> Callable[..., Path]:
    """Return a function that writes a graph with the card of its network."""

    def write(name: str, *, quantised: bool = False) -> Path:
        model = graphs[name]
        layers = layers_of(model)
        made = quantiser_of(model, layers).quantised(model, layers) if quantised else model
        copy = onnx.ModelProto()
        copy.CopyFrom(made)
        card = provisional_card(REGISTRY[name], IR2QSM((2, 4)), Choices(), "none", "0" * 64)
        path = folder / f"{name}{'-int8' * quantised}.onnx"
        path.write_bytes(with_card(copy, card))
        return path

    return write
