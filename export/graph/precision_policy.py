"""Which operators of a graph may compute in a reduced precision, and which stay in FP32.

The convolutions of a network carry nearly all of its work and forgive rounding; what carries
susceptibility or field in ppm does not: FP16 knows 1 ppm to 1 ppb. A reduced precision is for

- convolutions of volumes with weights of their own, and
- activations, sums, products, pooling and concatenation of what these return, and of nothing else.

So these stay in FP32 by themselves: inputs and output, everything that touches them outside a
convolution (scaling, masks, the residual), every dipole operator with its matrices and
multipliers, attention maps, and normalisations that are not folded. Three rules keep convolutions:

- what is met first on the way back from the output: the last 1x1x1 convolution, and what makes the
  global residual. IR2QSM's fusion is such a last convolution, of estimates that stay in FP32 too;
- what returns one channel, since that is an estimate of the output and no feature;
- what only operators in FP32 take: rounding it would cost accuracy and save nothing.

INT8 is for less: for those of these convolutions that take features. A convolution that takes an
input or an estimate, so the first of a network and of each iteration, starts in FP16, and so does
one whose values gate others. A residual add may take its shortcut in INT8.
"""

from collections import defaultdict
from collections.abc import Mapping, Set
from typing import Literal

import onnx

from qsm_deploy.calibration.int8.qdq import Int8Layer

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Gelu", "Add", "Sub", "Mul"})
FOLLOWING = ELEMENTWISE | {"Concat", "MaxPool", "AveragePool"}
VOLUME_RANK = 5
GATES = frozenset({"Sigmoid"})


def reducible_nodes(graph: onnx.GraphProto) -> frozenset[str]:
    """Return the first outputs of the nodes that may compute in a reduced precision.

    Parameters
    ----------
    graph
        Topologically sorted, all in FP32, its weights initializers.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    kept = _convolutions_before_output(graph)
    reduced: set[str] = set()
    for node in graph.node:
        if node.op_type in CONVOLUTIONS:
            may = node.output[0] not in kept and _has_own_weights(node, shapes)
        else:
            may = node.op_type in FOLLOWING and _takes_only(node, reduced, shapes)
        if may:
            reduced.add(node.output[0])
    return frozenset(reduced - _only_for_fp32(graph, reduced))


def int8_layers(graph: onnx.GraphProto) -> list[Int8Layer]:
    """Return what may be in INT8, in the order of the graph.

    Parameters
    ----------
    graph
        As for :func:`reducible_nodes`.
    """
    reduced = reducible_nodes(graph)
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


def kept_from_int8(graph: onnx.GraphProto) -> dict[str, tuple[Literal["fp16", "fp32"], str]]:
    """Return the precision of every other convolution, by its output, and why."""
    reduced = reducible_nodes(graph)
    gating = _gating(graph, reduced)
    may = {layer.output for layer in int8_layers(graph)}
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


def _has_own_weights(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    shape = shapes.get(node.input[1], ())
    returns_estimate = node.op_type == "Conv" and shape[:1] == (1,)
    return len(shape) == VOLUME_RANK and not returns_estimate


def _takes_only(
    node: onnx.NodeProto, reduced: Set[str], constants: Mapping[str, tuple[int, ...]]
) -> bool:
    computed = [name for name in node.input if name not in constants]
    return bool(computed) and all(name in reduced for name in computed)


def _convolutions_before_output(graph: onnx.GraphProto) -> set[str]:
    """Return the first convolutions on every way back from the output."""
    made_by = {name: node for node in graph.node for name in node.output}
    met: set[str] = set()
    waiting = [value.name for value in graph.output]
    while waiting:
        name = waiting.pop()
        if name in met or name not in made_by:
            continue
        met.add(name)
        if made_by[name].op_type not in CONVOLUTIONS:
            waiting.extend(made_by[name].input)
    return met


def _only_for_fp32(graph: onnx.GraphProto, reduced: Set[str]) -> set[str]:
    """Return the convolutions whose values only operators in FP32 take that are none themselves."""
    takers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            takers[name].append(node)
    return {
        node.output[0]
        for node in graph.node
        if node.op_type in CONVOLUTIONS and node.output[0] in reduced
        if not any(
            taker.op_type in CONVOLUTIONS or taker.output[0] in reduced
            for taker in takers[node.output[0]]
        )
    }
