"""Every way of writing the dipole operator in a file, in every engine, against float64."""

import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as status
from torch import Tensor

from qsm_deploy.export.dipole.op import dipole_conv
from qsm_deploy.export.graph.dipole_lowering import RUN_BY, inline_dipole, lower_dipole
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.network import Network
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.kernels.geometry import Geometry

MULTIPLIERS = ("dipole", "dipole_squared", "tkd", "tikhonov")
GRIDS = {
    "even": Geometry((16, 12, 10)),
    "odd": Geometry((7, 9, 11)),
    "even oblique anisotropic": Geometry((12, 8, 10), (0.6, 0.7, 2.0), (0.6, 0.2, 0.7)),
    "prime oblique anisotropic": Geometry((17, 13, 7), (2.0, 0.6, 0.9), (-0.1, 0.9, 0.4)),
    "flat": Geometry((1, 8, 5), (1.0, 1.0, 3.0), (0.5, 0.5, 0.7)),
    "long x": Geometry((160, 6, 5), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9)),
    "long y": Geometry((5, 257, 6), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9)),
    "long z": Geometry((6, 4, 192), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9)),
}
TOLERANCES = {  # of the norm
    ("matmul", "onnxruntime"): 1e-6,  # 5.2e-7 was seen
    ("matmul", "openvino"): 1e-6,  # 5.6e-7
    ("function", "onnxruntime"): 1e-6,  # 5.2e-7
}
REFUSALS = {
    ("function", "openvino"): "DipoleConv",
    ("plugin", "onnxruntime"): "DipoleConv.* is not a registered function",
    ("plugin", "openvino"): "DipoleConv",
}
Array = NDArray[np.floating]
Run = Callable[[list[Array]], Array]


@pytest.fixture(scope="module")
def graph(dipole_network: Callable[..., Network]) -> Callable[[str, str], onnx.ModelProto]:
    """Return a function that gives the operator of a multiplier in one of the lowerings."""

    @functools.cache
    def of(multiplier: str, dipole_op: str) -> onnx.ModelProto:
        if dipole_op == "plugin":
            return onnx_from_module(dipole_network(multiplier), "plugin")
        return lower_dipole(of(multiplier, "plugin"), dipole_op)

    return of


def opened(model: onnx.ModelProto, backend: str) -> Run:
    data = model.SerializeToString()
    if backend == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(data, options)
        names = [value.name for value in session.get_inputs()]
        return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(data), "CPU", settings)
    return lambda arrays: compiled(arrays)[0]


@pytest.fixture(scope="module")
def running(graph) -> Callable[[str, str, str], Run]:
    """Return a function that opens a lowering of a multiplier in a backend, each once."""
    return functools.cache(
        lambda multiplier, dipole_op, backend: opened(graph(multiplier, dipole_op), backend)
    )


def inputs(geometry: Geometry) -> list[Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 1, *geometry.shape), dtype=np.float32)
    return [x, np.float32(geometry.voxel_size_mm), np.float32(geometry.b0_direction)]


def as_defined(x: Array, *geometry: Array, multiplier: str = "dipole") -> Array:
    """Return the operator in float64, with the parameters of the fixture's network."""
    tensors = [torch.from_numpy(array) for array in (x.astype(np.float64), *geometry)]
    return dipole_conv(*tensors, multiplier, threshold=0.15, lam=0.02).numpy()


def relative_error(seen: Array, expected: Array) -> float:
    return float(np.linalg.norm(seen - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("geometry", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize(("dipole_op", "backend"), TOLERANCES)
def test_it_is_the_operator(running, dipole_op, backend, multiplier, geometry) -> None:
    arrays = inputs(geometry)
    seen = running(multiplier, dipole_op, backend)(arrays)
    assert seen.shape == arrays[0].shape
    expected = as_defined(*arrays, multiplier=multiplier)
    assert relative_error(seen, expected) < TOLERANCES[dipole_op, backend]


@pytest.mark.parametrize(("dipole_op", "backend"), REFUSALS)
def test_engines_that_do_not_take_it_say_so(graph, dipole_op: str, backend: str) -> None:
    with pytest.raises((RuntimeError, status.Fail), match=REFUSALS[dipole_op, backend]):
        opened(graph("dipole", dipole_op), backend)


def test_which_engines_run_which_file_is_known() -> None:
    pairs = {(dipole_op, backend) for dipole_op in RUN_BY for backend in RUN_BY[dipole_op]}
    assert pairs == TOLERANCES.keys()
    assert len(pairs) + len(REFUSALS) == 2 * len(RUN_BY)


@pytest.mark.parametrize("dipole_op", RUN_BY)
def test_the_checker_takes_it_without_this_package(graph, tmp_path: Path, dipole_op: str) -> None:
    onnx.save(graph("tkd", dipole_op), tmp_path / "g.onnx")
    code = "import sys, onnx; onnx.checker.check_model(sys.argv[1], full_check=True)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "g.onnx"], check=True)


@pytest.mark.parametrize("dipole_op", ["function", "plugin"])
def test_the_node_says_what_it_computes(graph, dipole_op: str) -> None:
    model = graph("tkd", dipole_op)
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, "qsm": 1}
    (node,) = model.graph.node
    assert (node.domain, node.op_type) == ("qsm", "DipoleConv")
    assert list(node.input) == [value.name for value in model.graph.input]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {
        "multiplier": b"tkd",
        "threshold": pytest.approx(0.15),
        "lambda": pytest.approx(0.02),
    }


def test_matmul_is_of_standard_operators(graph) -> None:
    model = graph("tikhonov", "matmul")
    assert [o.domain for o in model.opset_import] == [""]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    used = Counter(node.op_type for node in model.graph.node)
    assert "MatMul" in used
    assert "DFT" not in used


def test_functions_can_be_inlined_later(graph) -> None:
    inlined = inline_dipole(graph("tkd", "function"))
    assert inlined.SerializeToString() == graph("tkd", "matmul").SerializeToString()


def test_without_folding_of_constants_the_function_branches(graph) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    arrays = inputs(GRIDS["even oblique anisotropic"])
    for multiplier in MULTIPLIERS:
        data = graph(multiplier, "function").SerializeToString()
        session = onnxruntime.InferenceSession(data, options)
        names = [value.name for value in session.get_inputs()]
        seen = session.run(None, dict(zip(names, arrays, strict=True)))[0]
        assert relative_error(seen, as_defined(*arrays, multiplier=multiplier)) < 1e-6


@pytest.fixture(scope="module")
def chain(dipole_network: Callable[..., Network]) -> onnx.ModelProto:
    """Return a graph of three operators as nodes."""

    class Chain(type(dipole_network("dipole"))):
        def forward(self, x: Tensor, voxel_size_mm: Tensor, b0_direction: Tensor) -> Tensor:
            x = dipole_conv(x + 1, voxel_size_mm, b0_direction)
            x = dipole_conv(2 * x, voxel_size_mm, b0_direction, "dipole_squared")
            return x + dipole_conv(x, voxel_size_mm, b0_direction, "tkd", threshold=0.1)

    return onnx_from_module(Chain("dipole").eval(), "plugin")


@pytest.mark.parametrize(("dipole_op", "backend"), TOLERANCES)
def test_several_operators_share_their_matrices(chain, dipole_op: str, backend: str) -> None:
    model = lower_dipole(chain, dipole_op)
    used = Counter(node.op_type for node in model.graph.node)
    assert used["Cos"] == {"matmul": 3, "function": 0}[dipole_op]
    x, *geometry = inputs(GRIDS["even oblique anisotropic"])
    seen = opened(model, backend)([x, *geometry])
    y = as_defined(2 * as_defined(x, *geometry), *geometry, multiplier="dipole_squared")
    tensors = [torch.from_numpy(array) for array in (y, *geometry)]
    expected = y + dipole_conv(*tensors, "tkd", threshold=0.1).numpy()
    assert relative_error(seen, expected) < TOLERANCES[dipole_op, backend]


@pytest.mark.parametrize(
    ("multiplier", "parameters", "message"),
    [
        ("laplace", {}, "multiplier 'laplace' is unknown; known are dipole, "),
        ("tkd", {"threshold": 0.7}, r"must lie in \(0, 2/3\], got 0.7"),
        ("tikhonov", {"lam": -1.0}, "must be positive and finite, got -1.0"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    dipole_network: Callable[..., Network], multiplier: str, parameters: dict, message: str
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        onnx_from_module(dipole_network(multiplier, **parameters))
    assert "\n" not in str(caught.value)
