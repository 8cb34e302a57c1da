"""Graphs that may run or grow without end are refused before any library sees them."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from qsm_deploy.export.graph.dipole_function import dipole_functions
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.blocks import fold_batch_norm
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.card import METADATA_KEY, ModelCard
from qsm_deploy.runtime.card.graph import DEEPEST, MOST_NODES, require_bounded_graph
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import BACKENDS, Backend
from tests.export.table import SMALL, shallow

SHAPE = ("n", 1, "x", "y", "z")
IN, OUT = "local_field_ppm", "chi_ppm"
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]

Write = Callable[..., Path]


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


@pytest.fixture
def write(card: ModelCard, tmp_path: Path) -> Write:
    """Return what writes a model of a node and functions, with a card."""

    def write(node: onnx.NodeProto, made: Sequence[onnx.FunctionProto] = ()) -> Path:
        yes = helper.make_tensor("yes", TensorProto.BOOL, (), [True])
        graph = helper.make_graph([node], "g", [value(IN)], [value(OUT)], [yes])
        model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10, functions=made)
        helper.set_model_props(model, {METADATA_KEY: card.to_json()})
        onnx.save(model, tmp_path / "x.onnx")
        return tmp_path / "x.onnx"

    return write


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("place", ["the graph", "a function", "a branch"])
def test_a_loop_is_refused(write: Write, place: str, backend: Backend) -> None:
    placed = {"the graph": loop(), "a function": call("f"), "a branch": in_branch(loop())}
    made = [function("f", [loop()])] if place == "a function" else []
    path = write(placed[place], made)
    start = time.monotonic()
    with pytest.raises(
        EngineError, match=r"x\.onnx: its graph has 'Loop', which repeats"
    ) as caught:
        open_session(path, backend)
    assert time.monotonic() - start < 5
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (4, False)


def test_branches_end_as_every_graph_does(write: Write) -> None:
    require_bounded_graph(write(branch(DEEPEST)))
    with pytest.raises(EngineError, match=f"branches more than {DEEPEST} deep"):
        require_bounded_graph(write(branch(DEEPEST + 1)))


def test_functions_may_call_functions_so_deep(write: Write) -> None:
    require_bounded_graph(write(call(f"f{DEEPEST}"), functions(DEEPEST, 2)))
    with pytest.raises(EngineError, match=f"functions more than {DEEPEST} deep"):
        require_bounded_graph(write(call(f"f{DEEPEST + 1}"), functions(DEEPEST + 1, 1)))
    with pytest.raises(EngineError, match="or that call themselves"):
        require_bounded_graph(write(call("f"), [function("f", [call("f")])]))


def test_what_grows_as_it_is_loaded_is_refused(write: Write) -> None:
    start = time.monotonic()
    with pytest.raises(EngineError, match=rf"\d{{9}} nodes when written out, at most {MOST_NODES}"):
        require_bounded_graph(write(call("f6"), functions(6, 60)))
    assert time.monotonic() - start < 5


def test_the_bundled_network_is_bounded() -> None:
    require_bounded_graph(BUNDLED_MODEL)


def test_the_dipole_operator_as_functions_is_bounded(write: Write) -> None:
    require_bounded_graph(write(call("f1"), [*functions(1, 1), *dipole_functions()]))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALL))
def test_every_network_that_is_exported_is_bounded(name: str, kept_traces: None, tmp_path) -> None:
    with shallow():
        network = SMALL[name]().eval()
        if "unrolled" in name or "loopnet" in name:
            fold_batch_norm(network)
        onnx.save(onnx_from_module(network), tmp_path / "x.onnx")
    require_bounded_graph(tmp_path / "x.onnx")
