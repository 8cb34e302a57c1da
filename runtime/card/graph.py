"""What may stand in a model's graph to be run: nothing that can go on without an end.

Networks here are written out, step by step. A loop of another's making may never end, and functions
that call functions twice each make of a small file a graph that fills the memory when it is loaded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.read import Span, fields, not_whole, onnx_file, read, whole

# fields of onnx.proto, in a model, a graph, a function, a node, and an attribute
GRAPH, FUNCTION = 7, 25
GRAPH_NODE = 1
FUNCTION_NAME, FUNCTION_NODE, FUNCTION_DOMAIN = 1, 7, 10
OPERATOR, ATTRIBUTE, NODE_DOMAIN = 4, 5, 7
SUBGRAPH, SUBGRAPHS = 6, 11

DEEPEST = 8  # functions called by functions, branches in branches
MOST_NODES = 100_000  # with every function in the place of its call; the largest network has 3,000

Name = tuple[bytes, bytes]  # of an operator: its domain, and its own
BRANCH: Name = b"", b"If"


def require_bounded_graph(path: Path) -> None:
    """Refuse a model that may run, or grow as it is loaded, without a bound known beforehand.

    Of a plan that is its graph.

    Raises
    ------
    EngineError
        If it has loops, branches or functions nested deeper than ``DEEPEST``, functions that call
        themselves, or would have more than ``MOST_NODES`` nodes, or if the file is damaged.
    """
    calls: dict[Name | None, list[Name]] = {}  # of the graph itself under no name
    try:
        with onnx_file(path) as graph, graph.open("rb") as file:
            for number, span in fields(file, whole(file), (GRAPH, FUNCTION)):
                if number == GRAPH:
                    calls.setdefault(None, []).extend(_nodes(file, span, GRAPH_NODE, path))
                else:
                    called = _name(file, span, FUNCTION_DOMAIN, FUNCTION_NAME)
                    calls.setdefault(called, []).extend(_nodes(file, span, FUNCTION_NODE, path))
    except ValueError:
        raise not_whole(path) from None
    before, sizes = {}, dict.fromkeys(calls, 0)
    for _ in range(DEEPEST + 2):  # each round is right for one level more
        before, sizes = (
            sizes,
            {
                name: sum(1 + sizes.get(called, 0) for called in called_here)
                for name, called_here in calls.items()
            },
        )
    if sizes != before:
        raise _refusal(path, f"functions more than {DEEPEST} deep, or that call themselves")
    if (nodes := max(sizes.values(), default=0)) > MOST_NODES:
        raise _refusal(path, f"{nodes} nodes when written out, at most {MOST_NODES} are run")


def _nodes(file: BinaryIO, span: Span, number: int, path: Path, deep: int = 0) -> Iterator[Name]:
    """Yield what each node of a graph or a function calls, those of branches included."""
    if deep > DEEPEST:
        raise _refusal(path, f"branches more than {DEEPEST} deep")
    for _, node in fields(file, span, (number,)):
        yield (name := _name(file, node, NODE_DOMAIN, OPERATOR))
        for _, attribute in fields(file, node, (ATTRIBUTE,)):
            for _, graph in fields(file, attribute, (SUBGRAPH, SUBGRAPHS)):
                if name != BRANCH:
                    operator = name[1][:40].decode("ascii", "backslashreplace")
                    raise _refusal(path, f"{operator!r}, which repeats a graph and may never end")
                yield from _nodes(file, graph, GRAPH_NODE, path, deep + 1)


def _name(file: BinaryIO, span: Span, domain: int, own: int) -> Name:
    found = {number: read(file, text) for number, text in fields(file, span, (domain, own))}
    place = found.get(domain, b"")
    return b"" if place == b"ai.onnx" else place, found.get(own, b"")


def _refusal(path: Path, what: str) -> EngineError:
    return EngineError(f"{path}: its graph has {what}; export the network with qsm-export")
