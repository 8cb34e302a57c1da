"""Graphs that may run or grow without end are refused before any library sees them."""

import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from qsm_deploy.export.graph.dipole_function import dipole_functions
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.blocks import fold_batch_norm
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.card.graph import DEEPEST, require_bounded_graph
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import BACKENDS, Backend
from tests.export.table import SMALL, shallow
from tests.runtime.card.unbounded_graphs import (
    UNBOUNDED,
    branch,
    call,
    functions,
    save_disguised,
    save_graph,
)

Write = Callable[..., Path]


@pytest.fixture
def write(card: ModelCard, tmp_path: Path) -> Write:
    """Return what writes a model of nodes and functions, with a card."""
    return lambda nodes, made=(): save_graph(nodes, made, card, tmp_path / "x.onnx")


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("what", UNBOUNDED)
def test_what_has_no_bound_is_refused(write: Write, what: str, backend: Backend) -> None:
    nodes, made, says = UNBOUNDED[what]
    path = write(nodes, made)
    start = time.monotonic()
    with pytest.raises(EngineError, match=rf"x\.onnx: its graph has .*{says}") as caught:
        open_session(path, backend)
    assert time.monotonic() - start < 20
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (4, False)


def test_branches_and_functions_may_be_so_deep(write: Write) -> None:
    require_bounded_graph(write([branch(DEEPEST)]))
    require_bounded_graph(write([call(f"f{DEEPEST}")], functions(DEEPEST, 2)))


def test_the_bundled_network_is_bounded() -> None:
    require_bounded_graph(BUNDLED_MODEL)


def test_the_dipole_operator_as_functions_is_bounded(write: Write) -> None:
    require_bounded_graph(write([call("f1")], [*functions(1, 1), *dipole_functions()]))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALL))
def test_every_network_that_is_exported_is_bounded(name: str, kept_traces: None, tmp_path) -> None:
    with shallow():
        network = SMALL[name]().eval()
        if "unrolled" in name or "loopnet" in name:
            fold_batch_norm(network)
        onnx.save(onnx_from_module(network), tmp_path / "x.onnx")
    require_bounded_graph(tmp_path / "x.onnx")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_node_with_a_field_number_that_libraries_cut_off(backend, card, tmp_path) -> None:
    path = save_disguised(card, tmp_path / "x.onnx")
    with pytest.raises(EngineError, match=r"x.onnx: not a valid .onnx model"):
        open_session(path, backend)
