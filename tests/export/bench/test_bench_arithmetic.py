"""The arithmetic of graphs against counts by hand and by PyTorch, and the measured peak."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from qsm_deploy.export import write_network
from qsm_deploy.export.bench import device_peak
from qsm_deploy.export.bench.device_peak import measure_peak
from qsm_deploy.export.graph.flop_count import Work, count_work
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL

FLOAT = 4


def write(path, nodes, shape, weights, functions=()):
    """Write a graph of one input ``x`` with letters for its sizes, and of float weights."""
    free = [f"n{axis}" for axis in range(len(shape))]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, free)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in weights.items()]
    graph = helper.make_graph(nodes, "test", [value], [output], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("test", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("kind", "attributes", "shape", "weight", "flop", "numbers"),
    [
        # outputs times multiplications and additions for each; input, weight, output
        ("Conv", {"pads": [1] * 6}, (1, 2, 8, 6, 4), (3, 2, 3, 3, 3),
         3 * 192 * 2 * 54, 384 + 162 + 576),
        ("Conv", {"strides": [2] * 3}, (1, 2, 8, 6, 4), (3, 2, 2, 2, 2),
         3 * 24 * 2 * 16, 384 + 48 + 72),
        ("Conv", {"group": 2}, (2, 4, 5, 5, 5), (4, 2, 1, 1, 1),
         4 * 250 * 2 * 2, 1000 + 8 + 1000),
        ("ConvTranspose", {"strides": [2] * 3}, (1, 4, 3, 3, 3), (4, 2, 2, 2, 2),
         4 * 27 * 2 * 16, 108 + 64 + 432),
        ("MatMul", {}, (3, 5, 7), (7, 11), 3 * 5 * 11 * 2 * 7, 105 + 77 + 165),
        ("Gemm", {}, (5, 7), (7, 11), 5 * 11 * 2 * 7, 35 + 77 + 55),
        ("Gemm", {"transA": 1}, (7, 5), (7, 11), 5 * 11 * 2 * 7, 35 + 77 + 55),
        ("Mul", {}, (7, 5), (5,), 0, 0),
    ],
    ids=["conv", "strided", "grouped", "transposed", "matmul", "gemm", "gemm turned", "mul"],
)  # fmt: skip
def test_counts_by_hand(tmp_path, kind, attributes, shape, weight, flop, numbers):
    node = helper.make_node(kind, ["x", "w"], ["y"], **attributes)
    path = write(tmp_path / "m.onnx", [node], shape, {"w": weight})
    assert count_work(path, {"x": shape}) == Work(flop, FLOAT * numbers)


def test_a_function_counts_as_what_it_does(tmp_path):
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    opset = helper.make_opsetid("", 20)
    function = helper.make_function("test", "Product", ["a", "b"], ["c"], body, [opset])
    node = helper.make_node("Product", ["x", "w"], ["y"], domain="test")
    path = write(tmp_path / "m.onnx", [node], (5, 7), {"w": (7, 11)}, [function])
    assert count_work(path, {"x": (5, 7)}).flop == 5 * 11 * 2 * 7


def test_several_runs_are_as_many_times_the_work():
    assert Work(3.0, 5.0).times(4) == Work(12.0, 20.0)


def test_pytorch_counts_the_same(tmp_path, tiny_ir2qsm, quick):
    path = tmp_path / "m.onnx"
    onnx.save(write_network.onnx_from_module(tiny_ir2qsm, "matmul"), path)
    shape = (1, 1, 24, 16, 8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        tiny_ir2qsm(torch.zeros(shape))
    assert count_work(path, {"local_field_ppm": shape}).flop == counter.get_total_flops()


@pytest.mark.parametrize("scale", [1, 2])
def test_the_bundled_network_takes_what_its_registry_says(scale):
    shape = (1, 1, 64 * scale, 64, 64)
    spec = REGISTRY["tv-unet"]
    inputs = dict.fromkeys(spec.inputs, shape) | {"field_noise_ppm": (1,)}
    expected = scale * 2 * spec.gmac_64 * 1e9
    assert count_work(BUNDLED_MODEL, inputs).flop == pytest.approx(expected, rel=2e-3)


def test_a_matrix_that_a_graph_makes_as_it_runs(tmp_path):
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("ReduceSum", ["s", "all"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "eleven"], ["end"]),
        helper.make_node("Range", ["zero", "end", "one"], ["row"]),
        helper.make_node("Unsqueeze", ["row", "first"], ["rows"]),
        helper.make_node("Expand", ["rows", "tall"], ["matrix"]),
        helper.make_node("MatMul", ["x", "matrix"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, (5, 7), {})
    model = onnx.load(path)
    for name, value in (
        *(("zero", np.float32(0)), ("one", np.float32(1)), ("eleven", np.float32(11))),
        *(("all", np.int64([0, 1])), ("first", np.int64([0])), ("tall", np.int64([7, 1]))),
    ):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.save(model, path)
    assert count_work(path, {"x": (5, 7)}) == Work(5 * 11 * 2 * 7, FLOAT * (35 + 77 + 55))


def test_a_graph_that_does_not_run_cannot_be_counted(tmp_path):
    nodes = [
        helper.make_node("Strange", ["x"], ["z"], domain="test"),
        helper.make_node("MatMul", ["z", "w"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, (5, 7), {"w": (7, 11)})
    with pytest.raises(EngineError, match="the sizes inside cannot be counted"):
        count_work(path, {"x": (5, 7)})


def test_the_peak_of_a_cpu(monkeypatch):
    monkeypatch.setattr(device_peak, "EDGE", {"cpu": 128})
    monkeypatch.setattr(device_peak, "COPIED_BYTES", 2**20)
    peak = measure_peak("cpu", {"fp32", "bf16", "int8"})
    assert list(peak.flop_per_second) == ["bf16", "fp32"]
    assert 1e8 < peak.flop_per_second["fp32"] < 1e14
    assert 1e7 < peak.bytes_per_second < 1e13


def test_a_gpu_that_pytorch_cannot_use_has_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure_peak("cuda:0", {"fp32"}) is None
