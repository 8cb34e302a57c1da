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

What of this may be in INT8 is in :mod:`qsm_deploy.calibration.int8.layers`.
"""

from collections import defaultdict
from collections.abc import Mapping, Set

import onnx

from qsm_deploy.calibration.graph.nodes import CONVOLUTIONS, ELEMENTWISE

FOLLOWING = ELEMENTWISE | {"Concat", "MaxPool", "AveragePool"}
VOLUME_RANK = 5


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
