"""Graphs that may run, or grow, without a bound; Python and C refuse them before they are read."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from qsm_deploy.runtime.card.card import METADATA_KEY, ModelCard
from qsm_deploy.runtime.card.graph import DEEPEST, MOST_NODES

SHAPE = ("n", 1, "x", "y", "z")
IN, OUT = "local_field_ppm", "chi_ppm"
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]


def value(name: str, kind: int = TensorProto.FLOAT, shape: Sequence[str | int] = SHAPE):
    return helper.make_tensor_value_info(name, kind, shape)


def call(name: str, source: str = IN, target: str = OUT) -> onnx.NodeProto:
    return helper.make_node(name, [source], [target], domain="own")


def function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    return helper.make_function("own", name, [IN], [OUT], nodes, OPSETS)


def functions(depth: int, calls: int) -> list[onnx.FunctionProto]:
    """Return functions that call the one before, so often; the first adds."""
    made = [function("f1", [helper.make_node("Add", [IN, IN], [OUT])])]
    for n in range(2, depth + 1):
        names = [IN, *(f"v{i}" for i in range(calls - 1)), OUT]
        pairs = pairwise(names)
        made.append(function(f"f{n}", [call(f"f{n - 1}", *pair) for pair in pairs]))
    return made


def loop() -> onnx.NodeProto:
    """Return a loop whose condition is always true."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["again"]),
            helper.make_node("Add", ["so_far", "so_far"], ["sum"]),
        ],
        "body",
        [value("n", TensorProto.INT64, ()), value("go_on", TensorProto.BOOL, ()), value("so_far")],
        [value("again", TensorProto.BOOL, ()), value("sum")],
    )
    return helper.make_node("Loop", ["", "yes", IN], [OUT], body=body)


def in_branch(node: onnx.NodeProto) -> onnx.NodeProto:
    way = helper.make_graph([node], "way", [], [value(OUT)])
    return helper.make_node("If", ["yes"], [OUT], then_branch=way, else_branch=way)


def branch(deep: int) -> onnx.NodeProto:
    """Return a branch in a branch, so deep."""
    return in_branch(branch(deep - 1) if deep > 1 else helper.make_node("Identity", [IN], [OUT]))


def additions(count: int) -> list[onnx.NodeProto]:
    """Return so many nodes, one after the other."""
    names = [IN, *(f"v{n}" for n in range(count - 1)), OUT]
    return [helper.make_node("Add", [a, a], [b]) for a, b in pairwise(names)]


def save_graph(
    nodes: Sequence[onnx.NodeProto],
    functions: Sequence[onnx.FunctionProto],
    card: ModelCard,
    path: Path,
) -> Path:
    """Write a model of nodes and functions, with a card."""
    yes = helper.make_tensor("yes", TensorProto.BOOL, (), [True])
    graph = helper.make_graph(nodes, "g", [value(IN)], [value(OUT)], [yes])
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10, functions=functions)
    helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    onnx.save(model, path)
    return path


# nodes and functions, and what Python says of them
UNBOUNDED = {
    "a loop": ([loop()], [], "'Loop', which repeats a graph"),
    "a loop in a branch": ([in_branch(loop())], [], "'Loop', which repeats a graph"),
    "a loop in a function": ([call("f")], [function("f", [loop()])], "'Loop', which repeats"),
    "branches": ([branch(DEEPEST + 1)], [], f"branches more than {DEEPEST} deep"),
    "deep functions": (
        [call(f"f{DEEPEST + 1}")],
        functions(DEEPEST + 1, 1),
        f"functions more than {DEEPEST} deep",
    ),
    "endless functions": ([call("f")], [function("f", [call("f")])], "or that call themselves"),
    "functions that multiply": ([call("f6")], functions(6, 60), r"\d{9} nodes when written out"),
    "nodes": (additions(MOST_NODES + 1), [], f"at most {MOST_NODES} are run"),
}


def save_disguised(card: ModelCard, path: Path) -> Path:
    """Write a loop as a field of number 2^29 + 1, of which libraries see the lower bits: a node."""
    model = onnx.load(save_graph([loop()], [], card, path))
    hidden = model.graph.node[0].SerializeToString()
    del model.graph.node[:]
    tag, size = (1 << 32) | (1 << 3) | 2, len(hidden)
    graph = model.graph.SerializeToString() + varint(tag) + varint(size) + hidden
    model.ClearField("graph")
    path.write_bytes(model.SerializeToString() + varint(7 << 3 | 2) + varint(len(graph)) + graph)
    return path


def varint(number: int) -> bytes:
    """Return a number as protobuf writes it."""
    more = number >> 7
    return bytes([number & 127 | (128 if more else 0)]) + (varint(more) if more else b"")
