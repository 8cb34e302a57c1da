"""The node ``qsm::DipoleConv`` as the TensorRT plugin reads it: fields, shapes, workspace."""

import ctypes
import struct
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from typing import ClassVar

import onnx
import pytest

from qsm_deploy.export.graph import dipole_node as dipole_node
from qsm_deploy.kernels.cuda_abi import Dipole, Multiplier, Status

TEXT, FLOAT32, OTHER = range(3)  # qsm::FieldType


class Field(Structure):
    _fields_: ClassVar = [
        ("name", c_char_p),
        ("data", c_void_p),
        ("type", c_int32),
        ("length", c_int32),
    ]


class Node(Structure):
    _fields_: ClassVar = [("multiplier", c_int32), ("threshold", c_float), ("lam", c_float)]


class Shape(Structure):
    _fields_: ClassVar = [("sizes", POINTER(c_int64)), ("rank", c_int32)]


def field(name: str, data: bytes | None, kind: int, length: int | None = None) -> Field:
    length = len(data or b"") // (4 if kind == FLOAT32 else 1) if length is None else length
    return Field(name.encode(), ctypes.cast(c_char_p(data), c_void_p), kind, length)


def text(name: str, value: bytes) -> Field:
    return field(name, value, TEXT)


def number(name: str, *values: float) -> Field:
    return field(name, struct.pack(f"{len(values)}f", *values), FLOAT32)


def shape(*sizes: int) -> Shape:
    return Shape((c_int64 * len(sizes))(*sizes), len(sizes))


def read(twin, *fields: Field) -> Node:
    node = Node(-1, -1, -1)
    status = twin.node_twin_read((Field * len(fields))(*fields), len(fields), ctypes.byref(node))
    assert status == Status.OK, twin.qsm_cuda_last_error()
    return node


@pytest.mark.parametrize("multiplier", [m for m in Multiplier if m <= Multiplier.TIKHONOV])
def test_fields_become_a_node_and_the_node_its_fields(twin, multiplier):
    name = multiplier.name.lower().encode()
    node = read(twin, text("multiplier", name), number("lambda", 0.5), number("threshold", 0.25))
    assert (node.multiplier, node.threshold, node.lam) == (multiplier, 0.25, 0.5)
    written = (Field * 3)()
    twin.node_twin_fields(ctypes.byref(node), written)
    assert [f.name for f in written] == [b"multiplier", b"threshold", b"lambda"]
    assert ctypes.string_at(written[0].data, written[0].length) == name
    again = read(twin, *written)
    assert bytes(again) == bytes(node)


def test_what_is_not_given_is_as_the_schema_has_it(twin):
    node = read(twin)
    defaults = {a.name: onnx.helper.get_attribute_value(a) for a in dipole_node.DEFAULTS}
    written = (Field * 3)()
    twin.node_twin_fields(ctypes.byref(node), written)
    assert [f.name.decode() for f in written] == list(defaults)
    assert Multiplier(node.multiplier).name.lower() == defaults["multiplier"].decode()
    assert (node.threshold, node.lam) == (
        c_float(defaults["threshold"]).value,
        c_float(defaults["lambda"]).value,
    )
    assert len(dipole_node.INPUTS) == 3


def test_the_end_of_the_text_may_be_counted(twin):
    assert read(twin, text("multiplier", b"tkd\0")).multiplier == Multiplier.TKD


@pytest.mark.parametrize("threshold", [2 / 3, 1e-3])
def test_a_threshold_as_files_keep_it(twin, threshold):
    read(twin, text("multiplier", b"tkd"), number("threshold", threshold))


TKD, TIKHONOV = text("multiplier", b"tkd"), text("multiplier", b"tikhonov")
BAD_FIELDS = [
    ([text("multiplier", b"cube")], "unknown multiplier 'cube'; known are dipole"),
    ([text("multiplier", b"")], "unknown multiplier ''"),
    ([text("multiplier", b"TKD")], "unknown multiplier 'TKD'"),
    ([text("multiplier", b"tkd\0x")], "unknown multiplier 'tkd'"),
    ([text("multiplier", b"x" * 5000)], "unknown multiplier 'xxx"),
    ([field("multiplier", b"tkd", OTHER)], "multiplier must be text"),
    ([field("multiplier", None, TEXT)], "multiplier must be text"),
    ([field("multiplier", b"tkd", TEXT, -1)], "multiplier must be text"),
    ([field("threshold", b"\0" * 8, OTHER, 1)], "threshold must be one float32"),
    ([number("threshold", 0.1, 0.2)], "threshold must be one float32"),
    ([field("lambda", None, FLOAT32, 1)], "lambda must be one float32"),
    ([number("treshold", 0.1)], "unknown field 'treshold'"),
    ([text("", b"x")], "unknown field ''"),
    ([TKD, number("threshold", 0.0)], "(0, 2/3], got 0"),
    ([TKD, number("threshold", 0.67)], "(0, 2/3], got 0.67"),
    ([TKD, number("threshold", float("nan"))], "nan"),
    ([TIKHONOV, number("lambda", 0.0)], "positive and finite"),
    ([TIKHONOV, number("lambda", float("inf"))], "positive and finite"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=[m for _, m in BAD_FIELDS])
def test_fields_that_cannot_be(twin, fields, message):
    node = Node()
    status = twin.node_twin_read((Field * len(fields))(*fields), len(fields), ctypes.byref(node))
    assert status == Status.BAD_MULTIPLIER
    assert message in twin.qsm_cuda_last_error().decode()


ANY = shape(-1, -1, -1, -1, -1)
THREE = shape(3)
GOOD_INPUTS = [
    [ANY, THREE, THREE],
    [shape(2, 1, 16, 16, 16), THREE, THREE],
    [ANY, shape(-1), THREE],
]
BAD_INPUTS = [
    ([ANY, THREE], "x, voxel_size_mm and b0_direction, got 2 inputs"),
    ([ANY, THREE, THREE, THREE], "got 4 inputs"),
    ([shape(4, 4, 4), THREE, THREE], "x must be (n, c, x, y, z), got 3 axes"),
    ([ANY, shape(4), THREE], "voxel_size_mm must have the shape (3)"),
    ([ANY, THREE, shape(1, 3)], "b0_direction must have the shape (3)"),
    ([ANY, THREE, shape()], "b0_direction must have the shape (3)"),
]


@pytest.mark.parametrize("inputs", GOOD_INPUTS)
def test_inputs_of_known_and_unknown_sizes(twin, inputs):
    assert twin.node_twin_check_inputs((Shape * 3)(*inputs), 3) == Status.OK


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS, ids=[m for _, m in BAD_INPUTS])
def test_inputs_that_cannot_be(twin, inputs, message):
    status = twin.node_twin_check_inputs((Shape * len(inputs))(*inputs), len(inputs))
    assert status == Status.BAD_SHAPE
    assert message in twin.qsm_cuda_last_error().decode()


def prepare(twin, x: Shape, other: Shape) -> tuple[int, bool, Dipole]:
    takes_it, op = c_int32(), Dipole()
    node = read(twin, TIKHONOV, number("lambda", 0.25))
    status = twin.node_twin_prepare(
        ctypes.byref(node),
        ctypes.byref(x),
        ctypes.byref(other),
        ctypes.byref(takes_it),
        ctypes.byref(op),
    )
    return status, bool(takes_it), op


def test_samples_and_channels_are_volumes_alike(twin):
    status, takes_it, op = prepare(twin, shape(2, 3, 4, 5, 6), shape(3, 2, 4, 5, 6))
    assert (status, takes_it) == (Status.OK, True)
    assert (op.batch, *op.shape) == (6, 4, 5, 6)
    assert (op.multiplier, op.tikhonov_lambda) == (Multiplier.TIKHONOV, 0.25)


@pytest.mark.parametrize(
    "other", [(2, 3, 4, 6, 5), (1, 3, 4, 5, 6), (2, 3, 4, 5, 7), (2, 3, 4, 5, -1)]
)
def test_another_shape_is_not_prepared(twin, other):
    assert not prepare(twin, shape(2, 3, 4, 5, 6), shape(*other))[1]


@pytest.mark.parametrize(
    ("sizes", "status"),
    [
        ((1, 1, 0, 4, 4), Status.BAD_SHAPE),
        ((1, 1, -1, 4, 4), Status.BAD_SHAPE),
        ((1, 1, 2**32, 4, 4), Status.BAD_SHAPE),
        ((2**20, 2**20, 1, 1, 1), Status.TOO_LARGE),
        ((2**31 - 1, 2**31 - 1, 2**31 - 1, 4, 4), Status.TOO_LARGE),
        ((1, 2, 1024, 1024, 1024), Status.TOO_LARGE),
    ],
)
def test_sizes_that_cannot_be(twin, sizes, status):
    assert prepare(twin, shape(*sizes), shape(*sizes))[0] == status


def workspace(twin, smallest: Shape, largest: Shape) -> tuple[int, int]:
    bytes_, node = c_size_t(), read(twin)
    status = twin.node_twin_workspace(
        ctypes.byref(node), ctypes.byref(smallest), ctypes.byref(largest), ctypes.byref(bytes_)
    )
    return status, bytes_.value


def expected(twin, function: str) -> int:
    op, needed = twin.qsm_cuda_dipole_default(), c_size_t()
    op.batch, op.shape[:] = 2, (6, 7, 8)
    assert getattr(twin, function)(op, needed) == Status.OK
    return needed.value


def test_one_shape_gets_what_it_needs_and_several_the_bound(twin):
    largest = shape(2, 1, 6, 7, 8)
    one = workspace(twin, largest, largest)
    assert one == (Status.OK, expected(twin, "qsm_cuda_dipole_workspace"))
    several = workspace(twin, shape(1, 1, 6, 7, 8), largest)
    assert several == (Status.OK, expected(twin, "qsm_cuda_dipole_workspace_bound"))
    assert several > one


def test_without_a_gpu_only_the_bound_is_known(twin):
    twin.host_twin_set_gpu(Status.NO_GPU)
    largest = shape(2, 1, 6, 7, 8)
    assert workspace(twin, largest, largest)[0] == Status.NO_GPU
    assert workspace(twin, shape(1, 1, 1, 1, 1), largest)[0] == Status.OK
    assert prepare(twin, largest, largest)[0] == Status.NO_GPU
