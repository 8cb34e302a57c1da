"""The TensorRT plugin in Python, with the classes of TensorRT-RTX and the host twin for a GPU.

TensorRT-RTX has TensorRT's plugin classes and registry, but takes no plugin into a network. So no
engine is built here.
"""

import gc
import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest

from qsm_deploy.export.dipole import node as dipole_node
from qsm_deploy.kernels import tensorrt_plugin
from qsm_deploy.kernels.cuda_library import CudaLibrary
from qsm_deploy.kernels.dipole import dipole_convolve, tikhonov, tkd
from qsm_deploy.kernels.errors import (
    EngineError,
    GeometryError,
    MissingDependencyError,
    UsageError,
)
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.tensorrt_plugin import (
    DipoleNode,
    check_inputs,
    plugin_creator,
    register_dipole_plugin,
    workspace_bytes,
)

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
GEOMETRY = Geometry((6, 7, 8), (0.5, 0.75, 2.0), (0.25, -0.5, 0.75))
SIZES = (2, 3, *GEOMETRY.shape)
NUMPY = {
    "dipole": lambda x: dipole_convolve(x, GEOMETRY),
    "dipole_squared": lambda x: dipole_convolve(x, GEOMETRY, power=2),
    "tkd": lambda x: tkd(x, GEOMETRY, threshold=0.15),
    "tikhonov": lambda x: tikhonov(x, GEOMETRY, lam=0.02),
}


@pytest.fixture
def library(twin):
    return CudaLibrary(twin)


@pytest.fixture
def creator(library):
    return plugin_creator(trt, library)


def text(value: bytes):
    return trt.PluginField("multiplier", np.frombuffer(value, np.int8), trt.PluginFieldType.CHAR)


def numbers(name: str, *values: float, dtype=np.float32, kind=trt.PluginFieldType.FLOAT32):
    return trt.PluginField(name, np.array(values, dtype), kind)


def made(creator, *fields):
    collection = trt.PluginFieldCollection(list(fields))
    return creator.create_plugin("node", collection, trt.TensorRTPhase.BUILD)


def tensor(*sizes: int, type=trt.DataType.FLOAT, format=trt.TensorFormat.LINEAR):
    described = trt.PluginTensorDesc()
    described.dims, described.type, described.format = sizes, type, format
    return described


def range_of(smallest, largest):
    described = trt.DynamicPluginTensorDesc()
    described.desc = tensor(*largest)
    described.min, described.max = trt.Dims(smallest), trt.Dims(largest)
    return described


def test_the_creator_takes_the_attributes_of_the_node(creator):
    kinds = {
        onnx.AttributeProto.FLOAT: trt.PluginFieldType.FLOAT32,
        onnx.AttributeProto.STRING: trt.PluginFieldType.CHAR,
    }
    attributes = {a.name: kinds[a.type] for a in dipole_node.DEFAULTS}
    assert {f.name: f.type for f in creator.field_names} == attributes
    assert (creator.name, creator.plugin_version) == (dipole_node.NODE, "1")
    assert tensorrt_plugin.INPUTS == dipole_node.INPUTS
    assert dipole_node.DOMAIN == tensorrt_plugin.ONNX_DOMAIN
    defaults = {a.name: onnx.helper.get_attribute_value(a) for a in dipole_node.DEFAULTS}
    node = made(creator).node
    assert node.multiplier == defaults["multiplier"].decode()
    assert (np.float32(node.threshold), np.float32(node.lam)) == (
        np.float32(defaults["threshold"]),
        np.float32(defaults["lambda"]),
    )


@pytest.mark.parametrize("multiplier", NUMPY)
def test_what_is_serialised_makes_the_same_plugin(creator, multiplier):
    plugin = made(
        creator, text(multiplier.encode()), numbers("threshold", 0.25), numbers("lambda", 0.5)
    )
    assert plugin.node == DipoleNode(multiplier, 0.25, 0.5)
    copy = plugin.clone().attach_to_context(None)
    del plugin
    gc.collect()
    fields = copy.get_fields_to_serialize()
    assert [(f.name, f.size) for f in fields] == [
        ("multiplier", len(multiplier)),
        ("threshold", 1),
        ("lambda", 1),
    ]
    again = creator.create_plugin("node", fields, trt.TensorRTPhase.RUNTIME)
    assert again.node == copy.node


def test_the_end_of_the_text_may_be_counted(creator):
    assert made(creator, text(b"tkd\0")).node.multiplier == "tkd"


def test_the_largest_threshold_may_be_rounded_to_float32(creator):
    made(creator, text(b"tkd"), numbers("threshold", 2 / 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([text(b"cube")], "unknown multiplier 'cube'; known are dipole"),
        ([numbers("treshold", 0.1)], "no field 'treshold'"),
        ([numbers("threshold", 0.1, 0.2)], "threshold must be one number"),
        (
            [numbers("lambda", 0.1, dtype=np.float64, kind=trt.PluginFieldType.FLOAT64)],
            "'lambda' of type FLOAT64",
        ),
        ([text(b"tkd"), numbers("threshold", 0.67)], r"\(0, 2/3\]"),
        ([text(b"tikhonov"), numbers("lambda", 0.0)], "positive and finite"),
    ],
)
def test_fields_that_cannot_be(creator, fields, message):
    with pytest.raises(UsageError, match=message):
        made(creator, *fields)


@pytest.mark.parametrize("multiplier", NUMPY)
def test_it_is_the_operator(creator, twin_device, multiplier):
    memory = twin_device.memory
    plugin = made(
        creator, text(multiplier.encode()), numbers("threshold", 0.15), numbers("lambda", 0.02)
    ).attach_to_context(None)
    x = np.random.default_rng(0).standard_normal(SIZES, dtype=np.float32)
    vectors = np.float32(GEOMETRY.voxel_size_mm), np.float32(GEOMETRY.b0_direction)
    held = [memory.upload(array) for array in (x, *vectors, np.full_like(x, np.nan))]
    described = [tensor(*SIZES), tensor(3), tensor(3)]
    plugin.on_shape_change(described, described[:1])
    room, _held = memory.upload(np.zeros(plugin.workspace_bytes, np.uint8))
    pointers = [pointer for pointer, _ in held]
    plugin.enqueue(described, described[:1], pointers[:3], pointers[3:], room, 0)
    y = memory.download(held[3][1])
    for index in np.ndindex(SIZES[:2]):
        expected = NUMPY[multiplier](x[index])
        assert np.linalg.norm(y[index] - expected) <= 1e-6 * np.linalg.norm(expected)


def test_another_shape_than_it_was_told_is_refused(creator):
    plugin = made(creator)
    described = [tensor(*SIZES), tensor(3), tensor(3)]
    with pytest.raises(EngineError, match="another shape"):
        plugin.enqueue(described, described[:1], [8, 8, 8], [8], 256, 0)
    plugin.on_shape_change(described, described[:1])
    other = [tensor(2, 3, 7, 6, 8), tensor(3), tensor(3)]
    with pytest.raises(EngineError, match="another shape"):
        plugin.enqueue(other, other[:1], [8, 8, 8], [8], 256, 0)


def test_only_linear_float32_is_taken(creator):
    plugin = made(creator)
    for position in range(4):
        tensors = [range_of((3,), (3,)) for _ in range(4)]
        assert plugin.supports_format_combination(position, tensors, 3)
        tensors[position].desc = tensor(3, type=trt.DataType.HALF)
        assert not plugin.supports_format_combination(position, tensors, 3)
        tensors[position].desc = tensor(3, format=trt.TensorFormat.CHW32)
        assert not plugin.supports_format_combination(position, tensors, 3)
    assert plugin.get_output_data_types([trt.DataType.FLOAT] * 3) == [trt.DataType.FLOAT]
    assert plugin.num_outputs == 1


def test_one_shape_gets_what_it_needs_and_several_the_bound(library, creator):
    plugin, operator = made(creator), DipoleNode().operator(SIZES)
    vector = range_of((3,), (3,))
    for smallest, expected in (
        (SIZES, library.dipole_workspace_bytes(operator)),
        ((1, 1, 2, 2, 2), library.dipole_workspace_bound(operator)),
    ):
        inputs = [range_of(smallest, SIZES), vector, vector]
        plugin.configure_plugin(inputs, inputs[:1])
        assert plugin.get_workspace_size(inputs, inputs[:1]) == expected
        assert workspace_bytes(library, DipoleNode(), smallest, SIZES) == expected


def test_shapes_of_inputs():
    check_inputs([(-1,) * 5, (3,), (-1,)])
    for shapes, message in (
        ([(-1,) * 5, (3,)], "DipoleConv takes x, voxel_size_mm, b0_direction"),
        ([(4, 4, 4), (3,), (3,)], r"x \(n, c, x, y, z\)"),
        ([(-1,) * 5, (4,), (3,)], "voxel_size_mm must have the shape"),
        ([(-1,) * 5, (3,), (1, 3)], "b0_direction must have the shape"),
    ):
        with pytest.raises(GeometryError, match=message):
            check_inputs(shapes)


def test_the_output_has_the_shape_of_x(creator, monkeypatch):
    def size(value):
        constant = value is not None
        return SimpleNamespace(is_constant=lambda: constant, get_constant_value=lambda: value)

    copied = []
    monkeypatch.setattr(trt, "DimsExprs", lambda given: copied.append(given) or given)
    x, three = [size(None)] * 5, [size(3)]
    assert made(creator).get_output_shapes([x, three, three], [], None) == [x]
    assert copied == [x]
    with pytest.raises(GeometryError, match="b0_direction"):
        made(creator).get_output_shapes([x, three, [size(4)]], [], None)


@pytest.mark.parametrize("sizes", [(1, 1, 4, 4), (1, 1, 0, 4, 4), (-1, 1, 4, 4, 4)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(GeometryError, match="x must be"):
        DipoleNode().operator(sizes)


def test_without_tensorrt_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qsm-deploy\[tensorrt\]'"):
        register_dipole_plugin()


def test_an_older_tensorrt_is_refused(monkeypatch):
    old = ModuleType("tensorrt")
    old.__version__ = "8.6.1"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(EngineError, match=r"TensorRT 10 or later, this is 8\.6\.1"):
        register_dipole_plugin()


REGISTER = """
import sys
from qsm_deploy.kernels import tensorrt_plugin
print("tensorrt" in sys.modules, "torch" in sys.modules)
import {runtime} as trt
sys.modules["tensorrt"] = trt
for _ in range(2):
    tensorrt_plugin.register_dipole_plugin(library=object())
registry = trt.get_plugin_registry()
found = [c for c in registry.all_creators if c.name == "DipoleConv"]
print([(c.name, c.plugin_version, c.plugin_namespace) for c in found])
creator = registry.get_creator("DipoleConv", "1", "")
print(creator.create_plugin("node", creator.field_names, trt.TensorRTPhase.RUNTIME).node)
"""


@pytest.mark.parametrize("runtime", ["tensorrt_rtx", "tensorrt_lean_bindings", "tensorrt"])
def test_tensorrt_s_registry_takes_it_once(tmp_path, runtime):
    if not importlib.util.find_spec(runtime):
        pytest.skip(f"no TensorRT runtime {runtime}")
    code = REGISTER.format(runtime=runtime)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    imported, found, node = run.stdout.splitlines()[:3]
    assert imported == "False False"
    assert found == "[('DipoleConv', '1', '')]"
    assert node.startswith("DipoleNode(multiplier='dipole', threshold=0.119999")
