"""Which layers of a graph may be in INT8: of what may be in FP16, less.

Those convolutions that take features. A convolution that takes an input or an estimate, so the
first of a network and of each iteration, starts in FP16, and so does one whose values gate others.
A residual add may take its shortcut in INT8.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

import onnx

from qsm_deploy.calibration.graph.nodes import CONVOLUTIONS, ELEMENTWISE
from qsm_deploy.calibration.int8.qdq import Int8Layer

GATES = frozenset({"Sigmoid"})


@dataclass(frozen=True)
class FloatGraphs:
    """A network's graph in floating point, of standard operators.

    Attributes
    ----------
    exact
        In FP32.
    half
        The same in FP16 where that is tolerated.
    reduced
        The first outputs of the nodes that are in FP16 there.
    """

    exact: onnx.ModelProto
    half: onnx.ModelProto
    reduced: frozenset[str]


def int8_layers(graph: onnx.GraphProto, reduced: Set[str]) -> list[Int8Layer]:
    """Return what may be in INT8, in the order of the graph.

    Parameters
    ----------
    graph
        Topologically sorted, all in FP32, its weights initializers.
    reduced
        The first outputs of the nodes that may compute in FP16.
    """
    gating = _gating(graph, reduced)
    made_by = {node.output[0]: node for node in graph.node}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found: list[Int8Layer] = []
    for node in graph.node:
        output = node.output[0]
        if output not in reduced or output in gating:
            continue
        if node.op_type in CONVOLUTIONS and node.input[0] in reduced:
            grouped = _attribute(node, "group", 1) > 1 and node.op_type == "ConvTranspose"
            if not grouped:  # whose axis of output channels is not one of the weights
                kind: Literal["Conv", "ConvTranspose"] = (
                    "Conv" if node.op_type == "Conv" else "ConvTranspose"
                )
                found.append(Int8Layer(output, kind, node.input[0], node.input[1]))
        elif node.op_type == "Add" and not shapes.keys() & set(node.input):
            direct = [name for name in node.input if made_by[name].op_type == "Conv"]
            known = {layer.output for layer in found}
            if len(direct) == 1 and direct[0] in known and node.input[0] != node.input[1]:
                (shortcut,) = (name for name in node.input if name != direct[0])
                found.append(Int8Layer(output, "Add", shortcut, direct[0]))
    return found


def kept_from_int8(
    graph: onnx.GraphProto, reduced: Set[str]
) -> dict[str, tuple[Literal["fp16", "fp32"], str]]:
    """Return the precision of every other convolution, by its output, and why."""
    gating = _gating(graph, reduced)
    may = {layer.output for layer in int8_layers(graph, reduced)}
    found: dict[str, tuple[Literal["fp16", "fp32"], str]] = {}
    for node in graph.node:
        output = node.output[0]
        if node.op_type not in CONVOLUTIONS or output in may:
            continue
        if output not in reduced:
            found[output] = "fp32", "returns the output, an estimate of it, or what FP32 takes"
        elif output in gating:
            found[output] = "fp16", "gates, or is gated"
        elif node.input[0] not in reduced:
            found[output] = "fp16", "takes an input or an estimate"
        else:
            found[output] = "fp16", "a transposed convolution in groups"
    return found


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _gating(graph: onnx.GraphProto, reduced: Set[str]) -> set[str]:
    """Return the convolutions whose values, past activation functions, gate or are gated."""
    made_by = {node.output[0]: node for node in graph.node}
    waiting = [
        name
        for node in graph.node
        if node.op_type in GATES or (node.op_type == "Mul" and set(node.input) <= reduced)
        for name in node.input
    ]
    met: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in met or name not in made_by:
            continue
        met.add(name)
        if made_by[name].op_type in ELEMENTWISE:
            waiting.extend(made_by[name].input)
    return {name for name in met if made_by[name].op_type in CONVOLUTIONS}
