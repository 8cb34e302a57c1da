"""Q/DQ lies where TensorRT fuses it best, and computes what it says."""

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from qsm_deploy.calibration.graph.graph_run import GraphRun
from qsm_deploy.calibration.int8.qdq import (
    Int8Layer,
    fused_layers,
    insert_qdq,
    is_quantised,
    quantised_weights,
    scale_from,
    shared_ranges,
)

# a residual block, a pooled branch and a concatenation
TEXT = """<ir_version: 10, opset_import: ["": 20]>
g (float[1, 4, x, y, z] a) => (float[1, 4, x, y, z] h) {
  b = Conv <pads=[1, 1, 1, 1, 1, 1]> (a, w1)
  r = Relu (b)
  c = Conv <pads=[1, 1, 1, 1, 1, 1]> (r, w2, bias)
  d = Add (c, r)
  e = Relu (d)
  p = MaxPool <kernel_shape=[2, 2, 2], strides=[2, 2, 2]> (e)
  u = ConvTranspose <strides=[2, 2, 2]> (p, w3)
  v = Concat <axis=1> (u, e)
  h = Conv (v, w4)
}"""
SHAPES = {
    "w1": (4, 4, 3, 3, 3),
    "w2": (4, 4, 3, 3, 3),
    "w3": (4, 4, 2, 2, 2),
    "w4": (4, 8, 1, 1, 1),
}
LAYERS = (
    Int8Layer("c", "Conv", "r", "w2"),
    Int8Layer("d", "Add", "r", "c"),
    Int8Layer("u", "ConvTranspose", "p", "w3"),
    Int8Layer("h", "Conv", "v", "w4"),
)
AMAX = {"r": 2.0, "p": 3.0, "v": 4.0}


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    bias = rng.normal(0, 0.1, 4).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(bias, "bias"))
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="module")
def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.fixture(scope="module")
def quantised(model: onnx.ModelProto, weights) -> onnx.ModelProto:
    quantised = insert_qdq(model, LAYERS, AMAX, weights)
    onnx.checker.check_model(quantised, full_check=True)
    return quantised


def inputs_of(model: onnx.ModelProto) -> dict[str, list[str]]:
    return {node.output[0]: list(node.input) for node in model.graph.node}


def test_each_tensor_is_quantised_once_where_int8_takes_it(quantised: onnx.ModelProto) -> None:
    counts = Counter(node.op_type for node in quantised.graph.node)
    assert counts["QuantizeLinear"] == 4  # r, p, and both parts of v
    assert counts["DequantizeLinear"] == 3 + 3  # r, p, v and the weights
    assert counts["Concat"] == 1  # of INT8
    taken = inputs_of(quantised)
    assert taken["c"] == ["r_dequantised", "w2_dequantised", "bias"]
    assert taken["u"] == ["p_dequantised", "w3_dequantised"]
    assert taken["b"] == ["a", "w1"]
    assert taken["v_int8"] == ["u_int8", "e_int8"]
    assert taken["e_int8"] == ["e", "v_scale", "int8_zero"]


def test_nothing_lies_between_a_convolution_and_what_follows_it(quantised) -> None:
    taken = inputs_of(quantised)
    assert taken["r"] == ["b"]
    assert taken["e"] == ["d"]
    assert taken["d"] == ["c", "r_dequantised"]  # one branch of the add, the shortcut


def test_biases_stay_and_all_is_symmetric(quantised: onnx.ModelProto) -> None:
    kinds = {t.name: t.data_type for t in quantised.graph.initializer}
    assert TensorProto.INT32 not in kinds.values()
    assert kinds["bias"] == TensorProto.FLOAT
    for node in quantised.graph.node:
        if node.op_type.endswith("tizeLinear"):
            zero = next(t for t in quantised.graph.initializer if t.name == node.input[2])
            assert not numpy_helper.to_array(zero).any()
    assert not {"w2", "w3", "w4"} & kinds.keys()


def test_what_a_concat_or_a_pool_joins_shares_its_scale(quantised, model) -> None:
    scales = {t.name: numpy_helper.to_array(t) for t in quantised.graph.initializer}
    assert scales["p_scale"] == scales["v_scale"] == pytest.approx(4 / 127, rel=1e-6)
    assert scales["r_scale"] == pytest.approx(2 / 127, rel=1e-6)
    assert shared_ranges(model.graph, LAYERS[2:3], AMAX) == {"p": 3.0}


def test_an_add_needs_its_convolution(model, weights) -> None:
    assert fused_layers(LAYERS[1:]) == list(LAYERS[2:])
    assert fused_layers(LAYERS) == list(LAYERS)
    taken = inputs_of(insert_qdq(model, LAYERS[1:2], AMAX, weights))
    assert taken["d"] == ["c", "r_dequantised"]  # alone, to see what it costs
    assert taken["c"] == ["r", "w2", "bias"]


@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 3, 3, 3), 0), ((3, 8, 2, 2, 2), 1)])
def test_weights_are_off_by_half_a_step_of_their_own_channel(shape, axis: int) -> None:
    rng = np.random.default_rng(0)
    spread = np.geomspace(1e-3, 10, 8).reshape([8 if n == axis else 1 for n in range(5)])
    w = (rng.standard_normal(shape) * spread).astype(np.float32)
    for element in (np.float32, np.float16):
        q, scale = quantised_weights(w, axis, np.dtype(element))
        assert scale.dtype == element
        assert scale.shape == (8,)
        step = scale.astype(np.float64).reshape(spread.shape)
        assert np.abs(q * step - w).max(initial=0, where=step > 0) <= step.max() / 2
        assert (np.abs(q * step - w) <= step * 0.5001).all()
        assert np.abs(q.astype(int)).max() in (126, 127)


@pytest.mark.parametrize("element", [np.float32, np.float16])
def test_a_scale_is_never_zero_and_clips_nothing(element: type) -> None:
    amax = np.array([0.0, 1e-12, 1e-6, 1e-3, 0.7, 900.0])
    scale = scale_from(amax, np.dtype(element))
    assert (scale > 0).all()
    assert (scale.astype(np.float64) * 127 >= amax).all()
    assert scale[4] == pytest.approx(0.7 / 127, rel=2e-3)


def test_it_computes_what_it_says(quantised, model, weights) -> None:
    x = np.random.default_rng(2).standard_normal((1, 4, 4, 6, 8), dtype=np.float32)
    (r,) = GraphRun(model, ["r"]).look({"a": x})
    run = GraphRun(quantised, ["r_dequantised", "c"])
    got, c = run.look({"a": x})
    step = scale_from(np.array(2.0), np.dtype(np.float32))
    np.testing.assert_array_equal(got, np.clip(np.rint(r / step), -128, 127) * step)
    q, scale = quantised_weights(weights["w2"], 0, np.dtype(np.float32))
    exact = model.graph.node[2]
    alone = helper.make_graph(
        [exact],
        "alone",
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, got.shape)],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, c.shape)],
        [
            numpy_helper.from_array(q * scale.reshape(-1, 1, 1, 1, 1), "w2"),
            numpy_helper.from_array(weights["bias"], "bias"),
        ],
    )
    imports, version = model.opset_import, model.ir_version
    expected = GraphRun(helper.make_model(alone, opset_imports=imports, ir_version=version)).run(
        {"r": got}
    )
    np.testing.assert_allclose(c, expected, atol=1e-6)


def test_quantised_graphs_are_told_from_others(quantised, model) -> None:
    assert is_quantised(quantised)
    assert not is_quantised(model)
