"""Both backends on one tiny model: they agree, follow shapes, and refuse what is no model."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.errors import (
    CardError,
    DataError,
    EngineError,
    MissingDependencyError,
    UsageError,
)
from qsm_deploy.runtime.card.card import METADATA_KEY, MemoryUse, ModelCard, TensorInfo
from qsm_deploy.runtime.card.read import read_card
from qsm_deploy.runtime.model import open_model
from qsm_deploy.runtime.sessions.open import (
    choose_backend,
    installed_backends,
    open_session,
    require_backend,
)
from qsm_deploy.runtime.sessions.session import Backend
from tests.export.table import SMALL

SPEC = REGISTRY["tv-unet"]
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")
CARD = replace(
    provisional_card(SPEC, SMALL["tv-unet"](), Choices(), "none", "0" * 64),
    memory=dict.fromkeys(BACKENDS, MemoryUse(10**6, 1000)),
)
VOLUME = CARD.output.shape
TAKEN = (("chi_ppm", "ppm"), ("r2prime_hz", "Hz"))
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

Tensors = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return SMALL["tv-unet"]().eval()


@pytest.fixture(scope="module")
def proto(network: Network, kept_traces: None) -> onnx.ModelProto:
    return onnx_from_module(network)


@pytest.fixture(scope="module")
def model(proto: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    path.write_bytes(with_card(proto, CARD))
    return path


def inputs(*shape: int) -> Tensors:
    rng = np.random.default_rng(sum(shape))
    shapes = {tensor.name: shape if tensor.is_volume else (1,) for tensor in CARD.inputs}
    return {n: 0.02 * rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}


def relative(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_backends_agree_with_each_other_and_torch_at_every_shape(model, network) -> None:
    sessions = [open_session(model, backend) for backend in BACKENDS]
    for shape in ((1, 1, 16, 16, 16), (1, 1, 8, 20, 12), (2, 1, 8, 8, 8), (1, 1, 16, 16, 16)):
        tensors = inputs(*shape)
        with torch.inference_mode():
            expected = network(*map(torch.from_numpy, tensors.values())).numpy()
        outputs = [session.run(tensors) for session in sessions]
        assert all(o.shape == shape and o.dtype == np.float32 for o in outputs)
        assert relative(outputs[0], outputs[1]) <= 1e-6
        assert max(relative(o, expected) for o in outputs) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_belongs_to_the_caller(model, backend: Backend) -> None:
    session = open_session(model, backend)
    tensors = inputs(1, 1, 8, 8, 8)
    first = session.run(tensors)
    kept = first.copy()
    session.run({name: -3 * value for name, value in tensors.items()})
    assert np.array_equal(first, kept)
    first[:] = 0
    assert np.array_equal(session.run(tensors), kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_session_says_what_it_is(model, backend: Backend) -> None:
    session = open_session(model, backend, threads=1)
    assert (session.backend, session.precision, session.card) == (backend, "fp32", CARD)
    assert session.version.split(".")[0].isdigit()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_do_not_fit_are_an_engine_error(model, backend: Backend) -> None:
    session = open_session(model, backend)
    with pytest.raises(EngineError, match="failed"):
        session.run(inputs(1, 2, 8, 8, 8))
    assert session.run(inputs(1, 1, 8, 8, 8)).shape == (1, 1, 8, 8, 8)


def test_bf16_runs_where_the_cpu_can_and_is_refused_where_not(model) -> None:
    if not HAS_BF16:
        with pytest.raises(EngineError, match=r"no bf16 instructions.*--precision fp32"):
            open_session(model, "openvino", precision="bf16")
        return
    tensors = inputs(1, 1, 16, 16, 16)
    session = open_session(model, "openvino", precision="bf16")
    assert session.precision == "bf16"
    difference = relative(session.run(tensors), open_session(model, "openvino").run(tensors))
    assert 1e-5 < difference < 0.1


def test_a_cpu_without_bf16_is_told_so(model, monkeypatch) -> None:
    monkeypatch.setattr(openvino.Core, "get_property", lambda *arguments: ["FP32", "INT8"])
    with pytest.raises(EngineError, match=r"it has FP32, INT8.*--precision fp32"):
        open_session(model, "openvino", precision="bf16")


@pytest.fixture
def altered(proto: onnx.ModelProto, tmp_path: Path) -> Callable[[str | None], Path]:
    def write(card: str | None) -> Path:
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        onnx.helper.set_model_props(changed, {} if card is None else {METADATA_KEY: card})
        path = tmp_path / "altered.onnx"
        path.write_bytes(changed.SerializeToString())
        return path

    return write


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, "has no model card; export it with qsm-export"),
        ("{", "not JSON"),
        ('{"schema": 99}', "schema 99"),
        (CARD.to_json().replace('"priors":[', '"priors_":['), r"unknown field card\.priors_"),
        (
            replace(CARD, priors=(), anchor=None, inputs=CARD.inputs[:1]).to_json(),
            "contradicts the graph",
        ),
        (
            replace(
                CARD,
                priors=(),
                anchor=None,
                task="local_field+chi+r2prime->chi_positive+chi_negative",
                inputs=(CARD.inputs[0], *(TensorInfo(n, u, VOLUME) for n, u in TAKEN)),
                output=TensorInfo("chi_positive_ppm", "ppm", VOLUME),
                further_outputs=(TensorInfo("chi_negative_ppm", "ppm", VOLUME),),
            ).to_json(),
            "contradicts the graph.*chi_positive_ppm, chi_negative_ppm",
        ),
    ],
)
def test_a_card_that_is_missing_or_wrong_is_refused(altered, backend, card, message) -> None:
    with pytest.raises(CardError, match=message) as caught:
        open_session(altered(card), backend)
    assert caught.value.exit_code == 4


def test_read_card_accepts_what_agrees() -> None:
    names = list(reversed(SPEC.inputs))
    card: ModelCard = read_card(Path("m.onnx"), CARD.to_json(), names, ["chi_ppm"])
    assert card == CARD


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [None, 0, 100, 1500])
def test_garbage_and_truncated_files_are_refused(model, tmp_path, backend, kept) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"this is no protobuf" * 50 if kept is None else model.read_bytes()[:kept])
    with pytest.raises(EngineError, match=r"broken\.onnx"):
        open_session(path, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_files_and_other_kinds_are_refused(tmp_path, backend: Backend) -> None:
    with pytest.raises(DataError, match="no such model file"):
        open_session(tmp_path / "none.onnx", backend)
    (tmp_path / "model.pth").touch()
    with pytest.raises(EngineError, match=r"\.onnx"):
        open_session(tmp_path / "model.pth", backend)


def test_the_fastest_backend_is_chosen_and_the_reason_given() -> None:
    assert installed_backends() == ("openvino", "onnxruntime")
    assert choose_backend("auto", "fp32") == ("openvino", "the fastest CPU backend installed")
    for backend in BACKENDS:
        assert choose_backend(backend, "fp32") == (backend, "asked for")
    assert choose_backend("auto", "bf16")[0] == "openvino"
    assert choose_backend("openvino", "bf16")[0] == "openvino"
    with pytest.raises(UsageError, match="--backend openvino"):
        choose_backend("onnxruntime", "bf16")


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "qsm_deploy.runtime.sessions.openvino", raising=False)


@pytest.mark.usefixtures("without_openvino")
def test_without_openvino_onnxruntime_takes_over_and_says_so(model) -> None:
    backend, reason = choose_backend("auto", "fp32")
    assert (backend, reason) == ("onnxruntime", "openvino, which is faster, is not installed")
    assert open_session(model, backend).run(inputs(1, 1, 8, 8, 8)).shape == (1, 1, 8, 8, 8)


@pytest.mark.usefixtures("without_openvino")
def test_openvino_asked_for_but_missing_names_the_extra(model) -> None:
    for call in (lambda: open_session(model, "openvino"), lambda: require_backend("openvino")):
        with pytest.raises(MissingDependencyError, match=r"\.\[openvino\]"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bare_dipole_node_says_how_to_export_instead(backend, tmp_path) -> None:
    volume = ["n", 1, "x", "y", "z"]
    names = ("local_field_ppm", "chi_ppm")
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, volume) for n in names]
    node = helper.make_node("DipoleConv", [names[0]], [names[1]], domain="qsm")
    graph = helper.make_graph([node], "bare", tensors[:1], tensors[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("qsm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: CARD.to_json()})
    path = tmp_path / "bare.onnx"
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"no operator qsm::DipoleConv; export .* matmul"):
        open_session(path, backend)


@pytest.fixture
def write_graph(tmp_path: Path) -> Callable[..., Path]:
    """Return what writes a graph from ``sum``, that of its inputs, to ``chi_ppm``, with a card."""

    def write(nodes: list[onnx.NodeProto], kind: int, **constants: Any) -> Path:
        given = [
            helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in CARD.inputs
        ]
        output = helper.make_tensor_value_info("chi_ppm", kind, None)
        values = [onnx.numpy_helper.from_array(np.array(v), k) for k, v in constants.items()]
        first = helper.make_node("Sum", list(SPEC.inputs), ["sum"])
        graph = helper.make_graph([first, *nodes], "other", given, [output], values)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        helper.set_model_props(model, {METADATA_KEY: CARD.to_json()})
        onnx.save(model, tmp_path / "other.onnx")
        return tmp_path / "other.onnx"

    return write


def node(operator: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, ["sum", *inputs], ["chi_ppm"], **attributes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("made", "kind", "seen"),
    [
        (node("ReduceMean", "axes"), 1, r"\(1, 1, 1, 1, 1\) of float32"),
        (node("ReduceMean", keepdims=0), 1, r"\(\) of float32"),
        (node("Squeeze", "first"), 1, r"\(1, 8, 12, 16\) of float32"),
        (node("MaxPool", kernel_shape=[2, 2, 2]), 1, r"\(1, 1, 7, 11, 15\) of float32"),
        (node("Concat", "sum", "sum", axis=1), 1, r"\(1, 3, 8, 12, 16\) of float32"),
        (node("Cast", to=11), 11, r"\(1, 1, 8, 12, 16\) of float64"),
    ],
    ids=["one voxel", "a number", "four axes", "smaller", "channels", "double"],
)
def test_an_output_of_another_shape_or_type_than_the_card_says(
    backend, made, kind, seen, write_graph
) -> None:
    constants = {"axes": [2, 3, 4], "first": [0]}
    used = {name: value for name, value in constants.items() if name in made.input}
    session = open_session(write_graph([made], kind, **used), backend)
    with pytest.raises(EngineError, match=rf"gives {seen}, its card says \(1, 1, 8, 12, 16\)"):
        session.run(inputs(1, 1, 8, 12, 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_that_is_not_finite_is_no_map(backend: Backend, write_graph) -> None:
    nothing = helper.make_node("Mul", ["sum", "zero"], ["nothing"])
    undefined = helper.make_node("Div", ["nothing", "nothing"], ["chi_ppm"])
    opened = open_model(write_graph([nothing, undefined], 1, zero=np.float32(0)), backend=backend)
    field = 0.02 * np.random.default_rng(0).standard_normal((8, 8, 8), dtype=np.float32)
    field[:4] = 0  # outside the mask
    with pytest.raises(EngineError, match=r"the map has \d+ NaN or Inf voxels"):
        opened.reconstruct(field, voxel_size_mm=(1, 1, 1), b0_direction=(0, 0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_that_is_no_utf8_is_an_engine_error(backend, model, tmp_path, capfd) -> None:
    path = tmp_path / "latin.onnx"
    path.write_bytes(model.read_bytes().replace(b'"tv-unet"', b'"tv-\xff\xff\xff\xff"'))
    with pytest.raises(EngineError, match=r"latin\.onnx: .*cannot load it"):
        open_session(path, backend)
    assert capfd.readouterr().out == ""
