"""A graph of ONNX as a PyTorch module: for files that something else made.

Integers of rank 0 and 1 (shapes, axes, pads) are Python's own while the graph runs, so that a trace
for any size goes through them. What depends on nothing but constants is computed once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional

from qsm_deploy.export.graph.torch_operators import OPERATORS, Attributes
from qsm_deploy.kernels.errors import ExportError

OWN_DOMAINS = ("", "ai.onnx")
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
LAST = 2**31  # an end of a slice from here on means the end
# operators whose further inputs are numbers
WITH_NUMBERS = frozenset({"Clip", "Pad", "Resize", "Upsample"})
Value = Any  # a tensor, or integers of Python: one, or a list of them


class TorchGraph(nn.Module):
    """(n, c, x, y, z) volumes, and whatever a graph takes besides, to its outputs.

    Parameters
    ----------
    model
        Functions of its own inlined, weights inside. Half precision is computed in float32.
    name
        For messages.

    Raises
    ------
    ExportError
        If it holds operators that cannot be run here; the message names them.
    """

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        super().__init__()
        graph = model.graph
        unknown = sorted(
            {
                f"{node.domain}::{node.op_type}" if node.domain else node.op_type
                for node in graph.node
                if node.domain not in OWN_DOMAINS
                or node.op_type not in OPERATORS.keys() | OTHERS.keys() | {"Constant"}
            }
        )
        if unknown:
            raise ExportError(
                f"{name}: operators that cannot become PyTorch here: {', '.join(unknown)}; export "
                "the network from the module that it was made of, with --module"
            )
        self.name = name
        self.constants: dict[str, Value] = {}
        self.buffers_of: dict[str, str] = {}
        for tensor in graph.initializer:
            self._keep(tensor.name, numpy_helper.to_array(tensor))
        self.takes = [i.name for i in graph.input if i.name not in self._known()]
        self.gives = [o.name for o in graph.output]
        self.nodes: list[tuple[onnx.NodeProto, Attributes]] = []
        opsets = list(model.opset_import)
        for node in graph.node:
            if all(n in self._known() for n in node.input if n):
                self._fold(node, opsets)
            else:
                attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                self.nodes.append((node, attributes))
        for node, _ in self.nodes:
            if node.op_type in WITH_NUMBERS:  # what they are must be known when a graph is traced
                for name in self.buffers_of.keys() & set(node.input[1:]):
                    self.constants[name] = self._array(name).tolist()
        self.last = {n: i for i, (node, _) in enumerate(self.nodes) for n in node.input}

    def _known(self) -> set[str]:
        return self.constants.keys() | self.buffers_of.keys()

    def _fold(self, node: onnx.NodeProto, opsets: Sequence[Any]) -> None:
        """Compute a node of constants as the ONNX package defines it."""
        names = list(dict.fromkeys(n for n in node.input if n))
        function = helper.make_function(
            *("constants", "one_node", names, [n for n in node.output if n], [node], opsets)
        )
        found = ReferenceEvaluator(function).run(
            None, {n: np.asarray(self._array(n)) for n in names}, attributes={}
        )
        for name, value in zip([n for n in node.output if n], found, strict=True):
            self._keep(name, np.asarray(value))

    def _array(self, name: str) -> Any:
        if name in self.constants:
            return np.array(self.constants[name], dtype=np.int64)
        return getattr(self, self.buffers_of[name]).numpy()

    def _keep(self, name: str, array: Any) -> None:
        if np.issubdtype(array.dtype, np.integer) and array.ndim <= 1:
            self.constants[name] = array.tolist()
            return
        if array.dtype not in (np.int32, np.int64, np.bool_):
            array = array.astype(np.float32)
        self.buffers_of[name] = f"constant_{len(self.buffers_of)}"
        self.register_buffer(self.buffers_of[name], torch.from_numpy(np.array(array)))

    def forward(self, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for the inputs, both in the order of the graph."""
        values: dict[str, Value] = dict(zip(self.takes, given, strict=True))
        values |= {n: getattr(self, buffer) for n, buffer in self.buffers_of.items()}
        values |= self.constants
        for i, (node, attributes) in enumerate(self.nodes):
            inputs = [values[n] if n else None for n in node.input]
            results = _compute(node, attributes, inputs)
            values |= zip(node.output, results, strict=False)
            for name in node.input:
                if self.last.get(name) == i and name not in self.gives:
                    values.pop(name, None)
        outputs = tuple(values[n] for n in self.gives)
        return outputs[0] if len(outputs) == 1 else outputs


def _compute(node: onnx.NodeProto, a: Attributes, inputs: Sequence[Value]) -> Sequence[Value]:
    kind = node.op_type
    if not any(isinstance(v, Tensor) for v in inputs) and kind in INTEGERS:
        return [INTEGERS[kind](a, *inputs)]
    if kind in OPERATORS:
        like = next(v for v in inputs if isinstance(v, Tensor))
        tensors = [
            v if v is None or isinstance(v, Tensor) else torch.as_tensor(v, dtype=like.dtype)
            for v in inputs
        ]
        return [OPERATORS[kind](a, *tensors)]
    made = OTHERS[kind](a, *inputs)
    return made if isinstance(made, tuple) else [made]


def _given(a: Attributes, name: str, value: Value, default: Any = None) -> Any:
    """Return an argument that older operator sets have as an attribute."""
    return a.get(name, default) if value is None else value


def _text(a: Attributes, name: str, default: str) -> str:
    value = a.get(name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def _clip(a: Attributes, x: Tensor, least: Value = None, most: Value = None) -> Tensor:
    low, high = (
        float(v) if (v := _given(a, n, given)) is not None else None
        for n, given in (("min", least), ("max", most))
    )
    return x.clamp(min=low, max=high)


def _cast(a: Attributes, x: Value) -> Value:
    if not isinstance(x, Tensor):
        number: Any = torch.sym_float if a["to"] in FLOATS else torch.sym_int  # sizes stay free
        return [number(n) for n in x] if isinstance(x, list) else number(x)
    if a["to"] in FLOATS:
        return x.float()
    return x.bool() if a["to"] == onnx.TensorProto.BOOL else x.long()


def _gather(a: Attributes, x: Value, index: Value) -> Value:
    axis = a.get("axis", 0)
    if not isinstance(x, Tensor):
        return [x[i] for i in index] if isinstance(index, list) else x[index]
    if isinstance(index, int):
        return x.select(axis, index)
    at = torch.as_tensor(index)
    shape = (*x.shape[:axis], *at.shape, *x.shape[axis:][1:])
    return x.index_select(axis, at.flatten()).reshape(shape)


def _slice(
    a: Attributes,
    x: Value,
    starts: Value = None,
    ends: Value = None,
    axes: Value = None,
    steps: Value = None,
) -> Value:
    starts, ends = _given(a, "starts", starts), _given(a, "ends", ends)
    axes = _given(a, "axes", axes, list(range(len(starts))))
    steps = [1] * len(starts) if steps is None else steps
    if not isinstance(x, Tensor):
        return x[starts[0] : None if ends[0] >= LAST else ends[0] : steps[0]]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise ExportError("an operator Slice with a negative step cannot be run here")
        cut: list[Any] = [slice(None)] * x.ndim
        cut[axis] = slice(start, None if isinstance(end, int) and end >= LAST else end, step)
        x = x[tuple(cut)]
    return x


def _pad(
    a: Attributes, x: Tensor, pads: Value = None, value: Value = None, axes: Value = None
) -> Tensor:
    pads = _given(a, "pads", pads)
    axes = list(range(x.ndim)) if axes is None else [n % x.ndim for n in axes]
    ends = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    ends = {axis: pair for axis, pair in ends.items() if pair != (0, 0)}
    if not ends:
        return x
    both = [n for axis in range(x.ndim - 1, min(ends) - 1, -1) for n in ends.get(axis, (0, 0))]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(
        _text(a, "mode", "constant")
    )
    if mode is None:
        raise ExportError(f"an operator Pad with mode {_text(a, 'mode', '')} cannot be run here")
    if mode == "constant":
        filled = _given(a, "value", value, 0.0)
        return functional.pad(x, both, value=float(filled))
    both += [0, 0] * (x.ndim - 2 - len(both) // 2)
    return functional.pad(x, both, mode=mode)


def _resize(
    a: Attributes, x: Tensor, roi: Value = None, scales: Value = None, sizes: Value = None
) -> Tensor:
    scales = scales or None
    mode, where = _text(a, "mode", "nearest"), _text(a, "coordinate_transformation_mode", "")
    if a.get("axes") or mode not in ("nearest", "linear"):
        raise ExportError(f"an operator Resize with mode {mode} or axes cannot be run here")
    chosen: dict[str, Any] = {"mode": "nearest"}
    if mode == "linear":
        chosen = {"mode": "trilinear" if x.ndim == 5 else "bilinear"}
        chosen["align_corners"] = where == "align_corners"
    if sizes:
        return functional.interpolate(x, size=list(sizes[2:]), **chosen)
    assert scales is not None
    size = [math.floor(n * s) for n, s in zip(x.shape[2:], scales[2:], strict=True)]
    if all(float(s).is_integer() for s in scales[2:]):
        size = [n * int(s) for n, s in zip(x.shape[2:], scales[2:], strict=True)]
    return functional.interpolate(x, size=size, **chosen)


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduced(a: Attributes, x: Tensor, axes: Value = None) -> Tensor:
        axes = _given(a, "axes", axes, list(range(x.ndim)))
        return function(x, dim=tuple(axes), keepdim=bool(a.get("keepdims", 1)))

    return reduced


def _reshape(a: Attributes, x: Tensor, shape: Value) -> Tensor:
    if a.get("allowzero"):
        return x.reshape(shape)
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


def _squeeze(a: Attributes, x: Value, axes: Value = None) -> Value:
    axes = _given(a, "axes", axes)
    if not isinstance(x, Tensor):
        return x[0]
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(a: Attributes, x: Value, axes: Value = None) -> Value:
    axes = _given(a, "axes", axes)
    if not isinstance(x, Tensor):
        return [x]
    rank = x.ndim + len(axes)
    for axis in sorted(n % rank for n in axes):
        x = x.unsqueeze(axis)
    return x


def _split(a: Attributes, x: Tensor, split: Value = None) -> tuple[Tensor, ...]:
    axis, split = a.get("axis", 0), _given(a, "split", split)
    if split is None:
        return torch.chunk(x, a["num_outputs"], dim=axis)
    return torch.split(x, split, dim=axis)


def _instance_norm(a: Attributes, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=shift, eps=a.get("epsilon", 1e-5))


def _shape(a: Attributes, x: Tensor) -> list[Any]:
    return list(x.shape)[a.get("start", 0) : a.get("end")]


def _gemm(a: Attributes, x: Tensor, y: Tensor, bias: Any = 0.0) -> Tensor:
    x = x.transpose(0, 1) if a.get("transA") else x
    y = y.transpose(0, 1) if a.get("transB") else y
    product: Tensor = a.get("alpha", 1.0) * (x @ y) + a.get("beta", 1.0) * bias
    return product


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


# what moves values about, and what takes integers besides a tensor
OTHERS: dict[str, Callable[..., Any]] = {
    "Identity": lambda a, x: x,
    "Dropout": lambda a, x, *ratio: x,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda a, *parts: torch.cat(parts, dim=a["axis"]),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: x.mean(dim=tuple(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda a, x: x.amax(dim=tuple(range(2, x.ndim)), keepdim=True),
    "InstanceNormalization": _instance_norm,
    "MatMul": lambda a, x, y: x @ y,
    "Max": lambda a, x, y: torch.maximum(x, y),
    "Min": lambda a, x, y: torch.minimum(x, y),
    "Pad": _pad,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": lambda a, x: torch.softmax(x, dim=a.get("axis", -1)),
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
    "Upsample": lambda a, x, scales=None: _resize(a, x, None, _given(a, "scales", scales)),
    "Floor": lambda a, x: torch.floor(x),
}


def _each(function: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    def on_integers(a: Attributes, x: Value, y: Value) -> Value:
        if not isinstance(x, list) and not isinstance(y, list):
            return function(x, y)
        count = max(len(v) for v in (x, y) if isinstance(v, list))
        both = [v * count if isinstance(v, list) and len(v) == 1 else v for v in (x, y)]
        each = [v if isinstance(v, list) else [v] * count for v in both]
        return [function(n, m) for n, m in zip(*each, strict=True)]

    return on_integers


def _joined(a: Attributes, *parts: list[Any]) -> list[Any]:
    return [n for part in parts for n in part]


# of integers alone
INTEGERS: dict[str, Callable[..., Value]] = {
    "Add": _each(lambda n, m: n + m),
    "Sub": _each(lambda n, m: n - m),
    "Mul": _each(lambda n, m: n * m),
    "Div": _each(lambda n, m: n / m if isinstance(n, float | torch.SymFloat) else n // m),
    "Concat": _joined,
    "Floor": lambda a, x: [math.floor(n) for n in x] if isinstance(x, list) else math.floor(x),
}


def single_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with its own functions inlined."""
    return inliner.inline_local_functions(model) if model.functions else model


def shapes_of(model: onnx.ModelProto) -> Mapping[str, tuple[int | None, ...]]:
    """Return the shapes of a graph's inputs, its outputs too; ``None`` for a free axis."""
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in (*model.graph.input, *model.graph.output)
    }
