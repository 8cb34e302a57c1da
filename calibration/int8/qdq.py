"""Writing INT8 into a graph as explicit Q/DQ, placed as TensorRT fuses it best.

- A convolution takes its activation through one QuantizeLinear and DequantizeLinear, with one
  scale for the tensor, and INT8 weights through a DequantizeLinear with a scale for each output
  channel. All is symmetric: the zero point is 0.
- What follows a convolution is not quantised before its activation function, and not at all where
  nothing in INT8 takes it. A bias stays as it is; TensorRT refuses INT32 ones.
- Of a residual add only the shortcut is quantised: the engine fuses the add into the convolution
  that makes the other branch.
- What a Concat or MaxPool joins shares a scale, so that it moves INT8 values without rescaling.
  A Concat joins them written as INT8: OpenVINO, moving Q/DQ in front of it by itself, loses the
  scale on CPUs without AMX.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qsm_deploy.calibration.graph.nodes import replace_nodes

LARGEST = 127
SHARING = frozenset({"Concat", "MaxPool"})
Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Int8Layer:
    """What may be in INT8: a convolution with its weights, or a residual add with its shortcut.

    Attributes
    ----------
    output
        The output of its node, by which it is known.
    kind
        The operator.
    activation
        The tensor that is quantised: the input of a convolution, the shortcut of an add.
    partner
        The initializer with the weights, or for an add the convolution it is fused into.
    """

    output: str
    kind: Literal["Conv", "ConvTranspose", "Add"]
    activation: str
    partner: str


@dataclass(frozen=True)
class Quantiser:
    """Writes INT8 into the graphs of one network.

    Attributes
    ----------
    amax
        Ranges by tensor.
    weights
        In FP32, by initializer.
    """

    amax: Mapping[str, float]
    weights: Mapping[str, Weights]

    @classmethod
    def from_model(
        cls, model: onnx.ModelProto, layers: Sequence[Int8Layer], amax: Mapping[str, float]
    ) -> "Quantiser":
        """Take the weights of the layers from the graph in FP32."""
        names = {layer.partner for layer in layers}
        tensors = (tensor for tensor in model.graph.initializer if tensor.name in names)
        return cls(amax, {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors})

    def quantised(self, model: onnx.ModelProto, layers: Sequence[Int8Layer]) -> onnx.ModelProto:
        """Return a graph, in FP32 or FP16, with these layers in INT8."""
        return insert_qdq(model, layers, self.amax, self.weights)


def insert_qdq(
    model: onnx.ModelProto,
    layers: Sequence[Int8Layer],
    amax: Mapping[str, float],
    weights: Mapping[str, Weights],
) -> onnx.ModelProto:
    """Return a graph with these layers in INT8.

    Parameters
    ----------
    model
        In the precision that the layers fall back to; scales have the type of what they scale.
        Not changed.
    layers
        What an engine fuses is in :func:`fused_layers`; any one may be tried alone.
    amax
        The range of each layer's activation, positive.
    weights
        In FP32, by the names that the layers give.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    amax = shared_ranges(model.graph, layers, amax)
    _Inserter(whole.graph, amax, weights).insert({layer.output: layer for layer in layers})
    return whole


def fused_layers(layers: Sequence[Int8Layer]) -> list[Int8Layer]:
    """Return the layers without the adds whose convolution is not among them."""
    convolutions = {layer.output for layer in layers if layer.kind != "Add"}
    return [layer for layer in layers if layer.kind != "Add" or layer.partner in convolutions]


def shared_ranges(
    graph: onnx.GraphProto, layers: Sequence[Int8Layer], amax: Mapping[str, float]
) -> dict[str, float]:
    """Return the range of each layer's activation, the largest of those that share a scale."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while name in leader:
            name = leader[name]
        return name

    for node in graph.node:
        if node.op_type in SHARING:
            for name in node.input:
                if find(name) != find(node.output[0]):
                    leader[find(name)] = find(node.output[0])
    tensors = {layer.activation for layer in layers}
    widest: dict[str, float] = {}
    for name in tensors:
        widest[find(name)] = max(widest.get(find(name), 0.0), amax[name])
    return {name: widest[find(name)] for name in tensors}


def scale_from(amax: NDArray[np.floating], element: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Return ``amax / 127`` in the type of what it scales, rounded up and never 0.

    INT8 values are made with the rounded scale, so that rounding it clips nothing.
    """
    exact = np.asarray(amax, dtype=np.float64) / LARGEST
    scale = exact.astype(element)
    low = scale.astype(np.float64) < exact
    scale = np.where(low, np.nextafter(scale, element.type(np.inf)), scale)
    smallest = np.nextafter(element.type(0), element.type(1))
    return np.asarray(np.maximum(scale, smallest), dtype=element)


def quantised_weights(
    weights: Weights, axis: int, element: np.dtype[np.generic]
) -> tuple[NDArray[np.int8], NDArray[np.generic]]:
    """Return INT8 weights and the scale of each output channel, whose axis is given."""
    others = tuple(n for n in range(weights.ndim) if n != axis)
    scale = scale_from(np.abs(weights).max(axis=others), element)
    along = scale.astype(np.float64).reshape([-1 if n == axis else 1 for n in range(weights.ndim)])
    q = np.clip(np.rint(weights / along), -LARGEST, LARGEST)
    return q.astype(np.int8), scale


class _Inserter:
    """Puts what a layer needs in front of it; each tensor and weight is quantised once."""

    def __init__(
        self, graph: onnx.GraphProto, amax: Mapping[str, float], weights: Mapping[str, Weights]
    ) -> None:
        self.graph = graph
        self.amax = amax
        self.weights = weights
        self.types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.made_by = {node.output[0]: node for node in graph.node}
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()

    def insert(self, layers: Mapping[str, Int8Layer]) -> None:
        elements = self._elements(layers)
        self._add(numpy_helper.from_array(np.zeros((), dtype=np.int8), "int8_zero"))
        for node in self.graph.node:
            layer = layers.get(node.output[0])
            if layer is not None:
                at = list(node.input).index(layer.activation)
                element = elements[layer.output]
                node.input[at] = self._activation(layer.activation, element)
                if layer.kind != "Add":
                    axis = 0 if layer.kind == "Conv" else 1
                    node.input[1] = self._weights(layer.partner, axis, element)
            self.nodes.append(node)
        replace_nodes(self.graph, self._needed())

    def _needed(self) -> list[onnx.NodeProto]:
        """Return the nodes that lead to an output; a Concat may only be left of INT8."""
        needed, kept = {value.name for value in self.graph.output}, []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed.update(node.input)
                kept.append(node)
        return kept[::-1]

    def _elements(self, layers: Mapping[str, Int8Layer]) -> dict[str, np.dtype[np.generic]]:
        """Return the type that each layer computes in, which is that of its weights."""
        found = {}
        for output, layer in layers.items():
            convolution = layer.partner if layer.kind == "Add" else output
            kind = self.types[self.made_by[convolution].input[1]]
            found[output] = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
        return found

    def _activation(self, name: str, element: np.dtype[np.generic]) -> str:
        dq, scale = f"{name}_dequantised", f"{name}_scale"
        if dq not in self.made:
            self.made.add(dq)
            value = scale_from(np.array(self.amax[name]), element)
            self._add(numpy_helper.from_array(value, scale))
            self._apply("DequantizeLinear", [self._integers(name, scale), scale, "int8_zero"], dq)
        return dq

    def _integers(self, name: str, scale: str) -> str:
        """Return a tensor in INT8; the parts of a Concat share its scale."""
        q, source = f"{name}_int8", self.made_by.get(name)
        if q not in self.made:
            self.made.add(q)
            if source is not None and source.op_type == "Concat":
                axis = source.attribute[0].i
                parts = [self._integers(part, scale) for part in source.input]
                self._apply("Concat", parts, q, axis=axis)
            else:
                self._apply("QuantizeLinear", [name, scale, "int8_zero"], q)
        return q

    def _apply(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        self.nodes.append(
            helper.make_node(kind, inputs, [output], f"{kind}_{output}", **attributes)
        )

    def _weights(self, name: str, axis: int, element: np.dtype[np.generic]) -> str:
        dq, q, scale, zero = (f"{name}_{what}" for what in ("dequantised", "int8", "scale", "zero"))
        if dq not in self.made:
            self.made.add(dq)
            values, scales = quantised_weights(self.weights[name], axis, element)
            self._add(numpy_helper.from_array(values, q))
            self._add(numpy_helper.from_array(scales, scale))
            self._add(numpy_helper.from_array(np.zeros(scales.shape, dtype=np.int8), zero))
            self._apply("DequantizeLinear", [q, scale, zero], dq, axis=axis)
        return dq

    def _add(self, tensor: onnx.TensorProto) -> None:
        self.graph.initializer.append(tensor)
        self.types[tensor.name] = tensor.data_type


def is_quantised(model: onnx.ModelProto) -> bool:
    """Tell whether a graph holds Q/DQ or INT8 values already."""
    return any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger")
        for node in model.graph.node
    ) or any(tensor.data_type == TensorProto.INT8 for tensor in model.graph.initializer)
