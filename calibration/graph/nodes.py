"""Kinds of nodes, new ones for a graph, and what then holds no longer."""

from collections.abc import Sequence

import onnx

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Gelu", "Add", "Sub", "Mul"})


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Give a graph other nodes, in place: without stale types, and weights that none uses."""
    del graph.node[:]
    graph.node.extend(nodes)
    # what the exporter said of types holds no longer
    graph.ClearField("value_info")
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
