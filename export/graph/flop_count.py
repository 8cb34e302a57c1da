"""The arithmetic of a graph: convolutions and matrix products, counted at a shape.

A multiplication and an addition are two operations. What else a graph computes is not counted:
activations, sums and copies take memory traffic, hardly arithmetic.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, inliner, shape_inference

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.read import graph_in

FLOAT = 4  # bytes
COUNTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What a graph computes at one shape.

    Attributes
    ----------
    flop
        Operations of the convolutions and matrix products.
    traffic_bytes
        What these read and write if each touches its float32 inputs and its output once: the
        least without fusing, and more than a graph needs that stays in the cache.
    """

    flop: float
    traffic_bytes: float

    def times(self, count: int) -> "Work":
        """Return the work of several runs."""
        return Work(self.flop * count, self.traffic_bytes * count)


def count_work(path: Path, inputs: Mapping[str, Shape]) -> Work:
    """Return the work of one run of a model file.

    The shapes inside follow from those of the inputs, except where a graph makes its matrices as
    it runs: there they are taken from a run.

    Parameters
    ----------
    path
        An ONNX file, or a plan with a graph.
    inputs
        The shape of every input.

    Raises
    ------
    EngineError
        If shapes have to be taken from a run, and ONNX Runtime does not run the file.
    """
    model = inliner.inline_local_functions(onnx.load_model_from_string(graph_in(path)))
    for value in model.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        for dimension, size in zip(dimensions, inputs[value.name], strict=True):
            dimension.dim_value = size
    del model.graph.value_info[:]  # sizes as they were at export, by letters
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    nodes = [node for node in model.graph.node if node.op_type in COUNTED]
    shapes = _inferred(shape_inference.infer_shapes(model, data_prop=True))
    needed = {name for node in nodes for name in (*node.input[:2], node.output[0])}
    if unknown := sorted(needed - shapes.keys()):
        shapes |= _observed(path, model, unknown, inputs)
    each = [(_flop(node, shapes), _traffic(node, shapes)) for node in nodes]
    return Work(math.fsum(flop for flop, _ in each), math.fsum(traffic for _, traffic in each))


def _flop(node: NodeProto, shapes: Mapping[str, Shape]) -> float:
    first, second = (shapes[name] for name in node.input[:2])
    output = math.prod(shapes[node.output[0]])
    if node.op_type == "Conv":  # weights (out, in / groups, kernel...)
        return 2.0 * output * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weights (in, out / groups, kernel...)
        return 2.0 * math.prod(first) * math.prod(second[1:])
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return 2.0 * output * first[0 if attributes.get("transA") else -1]


def _traffic(node: NodeProto, shapes: Mapping[str, Shape]) -> float:
    return FLOAT * sum(math.prod(shapes[name]) for name in (*node.input[:2], node.output[0]))


def _inferred(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the shapes that are known in full, by name."""
    graph = model.graph
    found: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and isinstance(node.attribute[0].t, TensorProto):
            found[node.output[0]] = tuple(node.attribute[0].t.dims)
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        sizes = [d.dim_value for d in kind.shape.dim if d.HasField("dim_value")]
        if kind.HasField("shape") and len(sizes) == len(kind.shape.dim):
            found[value.name] = tuple(sizes)
    return found


def _observed(
    path: Path, model: onnx.ModelProto, names: list[str], inputs: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Return the shapes that tensors have in a run, on inputs of ones."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    from qsm_deploy.runtime.sessions.onnxruntime import UNREADABLE

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    for name in names:
        probe.graph.node.append(helper.make_node("Shape", [name], [f"{name} shape"]))
        probe.graph.output.append(
            helper.make_tensor_value_info(f"{name} shape", TensorProto.INT64, None)
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(probe.SerializeToString(), options)
        ones = {name: np.ones(shape, dtype=np.float32) for name, shape in inputs.items()}
        sizes = session.run(None, ones)
    except (*UNREADABLE, RuntimeException) as error:
        raise EngineError(
            f"{path}: the sizes inside cannot be counted ({str(error).splitlines()[0]})"
        ) from error
    return {name: tuple(map(int, size)) for name, size in zip(names, sizes, strict=True)}
