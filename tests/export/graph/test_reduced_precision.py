"""A reduced precision: what stays in FP32, what true rounding costs, and what is refused."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

from qsm_deploy.calibration.budgets import DEFAULTS
from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.cli import main
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.graph.precision_policy import reducible_nodes
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.graph.rounded_run import RoundedRun
from qsm_deploy.export.measure import rounding as rounding_error
from qsm_deploy.export.measure.rounding import Rounding, measure_rounding, require_accuracy
from qsm_deploy.export.measure.verification import SEED
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.errors import AccuracyError, ExportError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import METADATA_KEY, parse_card

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
NEGATION = """<ir_version: 10, opset_import: ["": 20]>
g (float[n, 1, x, y, z] local_field_ppm) => (float[n, 1, x, y, z] chi_ppm)
{ chi_ppm = Neg(local_field_ppm) }"""
SPACING = {"fp16": 2.0**-11, "bf16": 2.0**-8}


@pytest.fixture(scope="module")
def tv_unet_graph(traced: Callable[[str], onnx.ModelProto]) -> onnx.ModelProto:
    return traced("tv-unet")


@pytest.fixture
def small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD", "SHAPE"):
        monkeypatch.setattr(rounding_error, name, (24, 20, 28))
    monkeypatch.setattr(rounding_error, "CORNER", (0, 0, 0))


def volumes(model: onnx.ModelProto, size: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        sizes = [d.dim_value or size for d in value.type.tensor_type.shape.dim]
        sizes[0] = 1 if len(sizes) == 5 else sizes[0]
        feeds[value.name] = rng.standard_normal(sizes, dtype=np.float32) * np.float32(0.1)
    return feeds


def kept(model: onnx.ModelProto) -> list[str]:
    reduced = reducible_nodes(model.graph)
    return [node.op_type for node in model.graph.node if node.output[0] not in reduced]


def convolution_weights(model: onnx.ModelProto, *, reduced: bool) -> set[str]:
    names = reducible_nodes(model.graph)
    return {
        node.input[1]
        for node in model.graph.node
        if node.op_type == "Conv" and (node.output[0] in names) == reduced
    }


@pytest.mark.slow
def test_ir2qsm_keeps_its_estimates_and_their_fusion(tiny_ir2qsm) -> None:
    model = onnx_from_module(tiny_ir2qsm)
    assert sorted(kept(model)) == ["Add"] * 3 + ["Concat"] + ["Conv"] * 3
    assert convolution_weights(model, reduced=False) == {
        *(f"iteration{t}_post_transform.1.weight" for t in (0, 1)),
        "post_transform_conv_block2.0.weight",
    }


def test_tv_unet_keeps_its_scaling_last_convolutions_and_residual(tv_unet_graph) -> None:
    scaling = [*["Div"] * 7, "Mul", "Div", "Mul"]
    end = ["Conv", "Conv", "Add", "Mul", "Add"]
    assert kept(tv_unet_graph) == [*scaling, "Concat", "Concat", *end]
    assert convolution_weights(tv_unet_graph, reduced=False) == {"last.weight", "linear.weight"}


def test_iqsm_keeps_the_features_that_are_its_residual(traced) -> None:
    model = traced("iqsm v2")
    assert kept(model).count("Conv") == 3  # sine, cosine and the last
    assert {"Sin", "Cos", "Div", "Slice", "Add"} <= set(kept(model))


def test_lpcnn_keeps_every_dipole_operator_and_every_estimate(traced) -> None:
    model = traced("lpcnn unrolled", "plugin")
    reduced = reducible_nodes(model.graph)
    kinds = {node.op_type for node in model.graph.node if node.output[0] in reduced}
    assert kinds == {"Conv", "Relu", "Add"}
    assert "DipoleConv" in kept(model)
    assert convolution_weights(model, reduced=False) == {"gen.7.weight"}


@pytest.mark.slow
def test_loopnet_keeps_its_normalisations_and_maps(traced) -> None:
    model = traced("loopnet planes")
    reduced = reducible_nodes(model.graph)
    kinds = {node.op_type for node in model.graph.node if node.output[0] in reduced}
    assert not kinds & {"ReduceMean", "Sqrt", "Div", "Pow", "Sub", "Resize", "Split"}
    ranks = {len(t.dims) for t in model.graph.initializer} - {0, 1}
    flat = {t.name for t in model.graph.initializer if len(t.dims) in (3, 4)}
    assert ranks >= {4, 5}
    assert not convolution_weights(model, reduced=True) & flat


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_is_typed_throughout(precision: str, tv_unet_graph) -> None:
    before = tv_unet_graph.SerializeToString(deterministic=True)
    model = with_precision(tv_unet_graph, precision)
    assert tv_unet_graph.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(model, full_check=True)
    ends = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {TensorProto.FLOAT}
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    types = {t.name: t.data_type for t in model.graph.initializer if len(t.dims) == 5}
    assert sorted(types.values()).count(kind) == 15 - 2
    assert types["last.weight"] == types["linear.weight"] == TensorProto.FLOAT
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert len(casts) == 4  # to the stem and to the last layers, which take the inputs too


def test_a_network_without_convolutions_is_refused() -> None:
    with pytest.raises(ExportError, match="export it in fp32"):
        with_precision(onnx.parser.parse_model(NEGATION), "fp16")


def test_in_fp32_the_run_is_what_onnx_runtime_computes(tv_unet_graph, dipole_network) -> None:
    for model in (tv_unet_graph, onnx_from_module(dipole_network("tkd"))):
        feeds = volumes(model, 8)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        expected = session.run(None, feeds)[0]
        run = RoundedRun(model)
        np.testing.assert_allclose(run.run(feeds), expected, atol=1e-6 * np.abs(expected).max())
        assert not run.largest


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_rounds_as_the_module_does_by_hand(precision, tiny_tv_unet, tv_unet_graph) -> None:
    kind = PRECISIONS[precision]

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(kind).float()

    module = copy.deepcopy(tiny_tv_unet)
    seen = []
    # a sum is what a residual block returns, and what the decoder takes
    module.decoder.register_forward_pre_hook(lambda layer, args: (rounded(args[0]),))
    for name, layer in module.named_modules():
        if name in ("last", "linear"):
            continue
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            layer.weight.data = rounded(layer.weight.data)
            layer.register_forward_pre_hook(lambda layer, args: (rounded(args[0]),))
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d | nn.LeakyReLU | type(module.decoder)):
            layer.register_forward_hook(lambda layer, args, y: seen.append(y) or rounded(y))
    with torch.inference_mode():
        feeds = volumes(tv_unet_graph)
        expected = module(*map(torch.from_numpy, feeds.values())).numpy()
        exact = tiny_tv_unet(*map(torch.from_numpy, feeds.values())).numpy()
    run = RoundedRun(with_precision(tv_unet_graph, precision))
    got = run.run(feeds)
    error = np.abs(got - exact).max()
    assert error > 0.01 * SPACING[precision] * np.abs(exact).max()
    # a sum in another order may fall on the other side of a rounding
    assert np.abs(got - expected).max() <= 0.2 * error
    assert max(run.largest.values()) == pytest.approx(max(float(y.abs().max()) for y in seen), 1e-2)


def test_onnx_runtime_hides_what_the_rounding_costs(traced) -> None:
    model = traced("lpcnn split")
    feeds = volumes(model, 8)
    exact = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    half = with_precision(model, "fp16")
    in_engine = onnxruntime.InferenceSession(half.SerializeToString()).run(None, feeds)[0]
    true = RoundedRun(half).run(feeds)
    assert np.abs(true - exact).max() > 1.2 * np.abs(in_engine - exact).max() > 0


def test_the_box_holds_the_calcification_of_the_head(tiny_tv_unet) -> None:
    head = head_phantom(Geometry(rounding_error.HEAD), seed=SEED)
    first, size = rounding_error.CORNER, rounding_error.SHAPE
    box = tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))
    calcified = head.labels == Label.CALCIFICATION
    assert calcified[box].sum() == calcified.sum() > 40
    assert head.chi_ppm[box].min() < -3
    card = provisional_card(REGISTRY["tv-unet"], tiny_tv_unet, Choices(), "none", "0" * 64)
    scan = rounding_error.calcified_scan(card)
    assert scan.geometry.shape == scan.mask.shape == size
    np.testing.assert_array_equal(scan.measured[0], head.local_field_ppm[box])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least_ppb"), [("tv-unet", 0.003), ("ir2qsm", 0.01)])
def test_bundled_networks_pass_in_fp16_on_a_head_with_a_calcification(
    name: str, least_ppb: float
) -> None:
    spec = REGISTRY[name]
    choices = Choices(spec.chosen_options({}))
    module = build_network(spec, load_state(spec.bundled_file()), choices)
    card = provisional_card(spec, module, choices, "none", "0" * 64)
    model = with_precision(onnx_from_module(module), "fp16")
    rounding = measure_rounding(model, module, replace(card, precision="fp16"))
    require_accuracy(rounding, DEFAULTS["fp16"]["max_ppb"])
    assert least_ppb < rounding.p999_ppb <= 0.3
    assert 0.01 < rounding.max_ppb <= 3
    assert 1e-4 < rounding.fullest[1] < 0.1


@pytest.mark.parametrize(
    ("p999", "largest", "share", "message"),
    [
        (
            0.31,
            0.5,
            0.1,
            r"p99\.9 0\.31 ppb, max 0\.5 ppb in the mask, the gate is p99\.9 0\.3 ppb",
        ),
        (0.1, 3.1, 0.1, r"max 3 ppb; nothing was written"),
        (float("nan"), float("nan"), 0.1, "--gate-ppb"),
        (0.1, 0.5, 1.5, "worst overflows fp16: it returns 1.5 times"),
        (0.1, 0.5, float("nan"), "worst overflows fp16"),
    ],
)
def test_above_the_gate_it_is_refused_with_the_number(p999, largest, share, message) -> None:
    activations = {"first": 0.5, "worst": share, "last": 0.01}
    if share < 0.5:
        activations = {"worst": share}
    rounding = Rounding("fp16", (8, 8, 8), p999, largest, activations)
    with pytest.raises(AccuracyError, match=message) as caught:
        require_accuracy(rounding, 3.0)
    assert caught.value.exit_code == 5


@pytest.fixture
def small_weights(tiny_tv_unet: Network, tmp_path: Path) -> Path:
    # in half precision as in other tests that share the trace
    half = {key: value.half() for key, value in tiny_tv_unet.state_dict().items()}
    torch.save(half, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def export(weights: Path, *arguments: str) -> int:
    return main(["--model", "tv-unet", "--weights", str(weights), *arguments])


@pytest.mark.usefixtures("quick", "small_head")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_command_writes_measures_and_tells(
    precision: str, small_weights: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(small_weights.parent)
    output = f"tv-unet-{precision}.onnx"
    assert export(small_weights, f"--{precision}", "-o", output, "--gate-ppb", "30") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{output}: ")
    assert f"rounded to {precision}: p99.9 " in err
    assert f"by the largest {precision}: " in err
    card = parse_card(Path(output).with_suffix(".json").read_text())
    assert card.precision == precision
    assert f"every operator's output rounded to {precision} in pytorch on 24x20x28: p99.9 " in (
        card.verified.reference
    )
    assert "activations up to" in card.verified.reference
    assert card.verified.max_ppb > 0.01
    running = {"fp16": {"onnxruntime", "openvino"}, "bf16": {"openvino"}}[precision]
    assert card.memory.keys() == running
    assert ("onnxruntime cannot run a file in bf16" in err) == (precision == "bf16")
    stored = {p.key: p.value for p in onnx.load(output).metadata_props}[METADATA_KEY]
    assert parse_card(stored) == card


@pytest.mark.usefixtures("quick", "small_head")
def test_the_command_reports_every_layer_as_json(small_weights, monkeypatch, capsys) -> None:
    monkeypatch.chdir(small_weights.parent)
    arguments = ("--fp16", "-o", "a.onnx", "--json", "--quiet", "--gate-ppb", "30")
    assert export(small_weights, *arguments) == 0
    rounding = json.loads(capsys.readouterr().out)["rounding"]
    assert rounding["precision"] == "fp16"
    assert 0 < rounding["p999_ppb"] <= rounding["max_ppb"]
    assert len(rounding["activations"]) == 29
    assert all(0 < share < 1 for share in rounding["activations"].values())


@pytest.mark.usefixtures("quick", "small_head")
def test_too_much_error_or_an_overflow_leaves_no_file(small_weights, monkeypatch, capsys) -> None:
    folder = small_weights.parent
    monkeypatch.chdir(folder)
    refused = ("--fp16", "-o", "a.onnx", "--quiet", "--gate-ppb", "1e-3")
    assert export(small_weights, *refused) == 5
    assert "rounding to fp16 costs p99.9" in capsys.readouterr().err
    monkeypatch.setitem(rounding_error.LIMITS, "fp16", 1e-3)
    assert export(small_weights, *refused[:-1], "1e9") == 5
    assert "overflows fp16" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["tiny.pth"]


def test_the_run_shows_an_overflow(tv_unet_graph) -> None:
    half = with_precision(tv_unet_graph, "fp16")
    feeds = {name: 1e6 * volume for name, volume in volumes(half).items()}
    run = RoundedRun(half)
    assert not np.isfinite(run.run(feeds)).all()
    assert not np.isfinite(max(run.largest.values()))


def test_two_precisions_at_once_are_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "tv-unet", "--fp16", "--bf16"])
    assert caught.value.code == 2
