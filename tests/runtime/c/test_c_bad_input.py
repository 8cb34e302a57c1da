"""What a host can do wrong: a status, one line, and an engine that goes on."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qsm_deploy.runtime.card.card import (
    METADATA_KEY,
    TASKS,
    UNITS,
    ModelCard,
    TensorInfo,
    Tiles,
)
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from tests.runtime.card.unbounded_graphs import UNBOUNDED, save_disguised, save_graph

USAGE, DATA, ENGINE, MEMORY, CANCELLED = 2, 3, 4, 6, 130
SHAPE = (12, 9, 10)


def volumes(shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros(shape, np.uint8)
    mask[2:, 1:, :-1] = 1
    field = np.random.default_rng(1).normal(0, 0.03, shape).astype(np.float32)
    return field, mask


@pytest.fixture
def engine(open_engine: Callable[..., Any]) -> Any:
    return open_engine(BUNDLED_MODEL)


def damaged(path: Path, what: str) -> None:
    data = BUNDLED_MODEL.read_bytes()
    if what == "directory":
        path.mkdir()
    elif what != "missing":
        made = {
            "empty": b"",
            "text": b"not a model",
            "truncated": data[: len(data) // 2],
            "zeros": b"\x08" + bytes(1000),
            "no graph": b"\x08\x0a",
        }
        path.write_bytes(made[what])


@pytest.mark.parametrize(
    ("what", "status", "words"),
    [
        ("missing", DATA, "no such model file"),
        ("directory", DATA, "no such model file"),
        ("empty", ENGINE, "not an .onnx model"),
        ("text", ENGINE, "not an .onnx model"),
        ("truncated", ENGINE, "truncated or damaged: cannot load it"),
        ("zeros", ENGINE, "truncated or damaged: cannot load it"),
        ("no graph", ENGINE, "OpenVINO cannot load it"),
    ],
)
def test_what_is_no_model_is_refused(
    library: Any, call_error: Any, tmp_path: Path, what: str, status: int, words: str
) -> None:
    path = tmp_path / "model.onnx"
    damaged(path, what)
    with pytest.raises(call_error, match=words) as caught:
        library.open(path)
    assert caught.value.status == status
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_needs_a_card_that_fits_its_graph(
    library: Any, call_error: Any, card: ModelCard, write_model: Callable[..., Path]
) -> None:
    with pytest.raises(call_error, match="has no model card"):
        library.open(write_model(None))
    path = write_model(card)
    model = onnx.load(path)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other_ppm"
    onnx.save(model, path)
    with pytest.raises(call_error, match="contradicts the graph: inputs local_field_ppm -> chi_"):
        library.open(path)
    prior = replace(
        card,
        pipeline="lpcnn",
        patchable="split",
        inputs=(TensorInfo("prior_input", "1", card.output.shape),),
        constants={"alpha": 1.0, "iterations": 3.0},
        normalisation={"chi_mean": 0.0, "chi_std": 1.0},
    )
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA_KEY: prior.to_json()})
    onnx.save(model, path)
    with pytest.raises(call_error, match="use the Python runtime, qsm-run, or export it as one"):
        library.open(path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"pad_front": "none"}, ""),
        ({"task": "phase->chi"}, "takes a phase, this library takes fields; use"),
        ({"task": "phase->local_field"}, "takes a phase, this library takes fields; use"),
        (
            {"task": "local_field+chi+r2prime->chi_positive+chi_negative"},
            "gives chi_positive_ppm, chi_negative_ppm, this library gives one map; use",
        ),
        ({"constants": {"unmasked": 1.0}}, "takes the field outside the mask too, which this"),
        ({"constants": {"unmasked": 0.0}}, ""),
        ({"tiles": Tiles((8,) * 3, (4,) * 3, (4,) * 3, "edge", "none")}, "runs in tiles that lie"),
        ({"tiles": Tiles((8,) * 3, (4,) * 3, (2,) * 3, "zero", "ramp")}, "runs in tiles that lie"),
        ({"tiles": Tiles((8,) * 3, (4,) * 3, (4,) * 3, "zero", "none")}, ""),
        (
            {"pipeline": "nextqsm", "constants": {"iterations": 6.0, "lambda_1": 0.1}},
            "is the CNN of pipeline nextqsm, whose other steps this library does not know; use the "
            "Python runtime, qsm-run$",
        ),
    ],
)
def test_what_this_library_lacks_is_refused_by_name(
    fields: dict[str, Any], says: str, card: ModelCard, fake: Any, call_error: Any, tmp_path: Path
) -> None:
    if "task" in fields:
        first, besides, (gives, *further) = TASKS[fields["task"]]
        shape = card.output.shape
        fields = fields | {
            "inputs": tuple(TensorInfo(n, UNITS[n], shape) for n in (first, *besides)),
            "output": TensorInfo(gives, "ppm", shape),
            "further_outputs": tuple(TensorInfo(n, "ppm", shape) for n in further),
        }
    if fields.keys() & {"tiles", "pipeline"}:
        fields = fields | {"patchable": "no", "why_whole": "so it is"}
    if "pipeline" in fields:
        fields = fields | {"inputs": (TensorInfo("prior_input", "1", card.output.shape),)}
    path = tmp_path / "model.onnx"
    path.write_text(replace(card, **fields).to_json())
    if not says:
        fake.open(path).close()
        return
    with pytest.raises(call_error, match=f"model.onnx: twice {says}") as caught:
        fake.open(path)
    assert caught.value.status == ENGINE
    assert "qsm-run" in str(caught.value)


def test_the_card_can_be_read(open_engine: Callable[..., Any], engine: Any) -> None:
    assert engine.card == onnx.load(BUNDLED_MODEL).metadata_props[0].value


@pytest.fixture
def write_graph(card: ModelCard, tmp_path: Path) -> Callable[..., Path]:
    """Return what writes a model of nodes from ``local_field_ppm`` to ``chi_ppm``, with a card."""

    def write(
        nodes: list[onnx.NodeProto], kind: int = onnx.TensorProto.FLOAT, **constants: Any
    ) -> Path:
        field = onnx.helper.make_tensor_value_info("local_field_ppm", 1, card.output.shape)
        chi = onnx.helper.make_tensor_value_info("chi_ppm", kind, None)
        values = [onnx.numpy_helper.from_array(np.array(v), k) for k, v in constants.items()]
        graph = onnx.helper.make_graph(nodes, "made", [field], [chi], values)
        opset = onnx.helper.make_opsetid("", 20)
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
        onnx.helper.set_model_props(model, {METADATA_KEY: card.to_json()})
        onnx.save(model, tmp_path / "made.onnx")
        return tmp_path / "made.onnx"

    return write


def node(operator: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(operator, ["local_field_ppm", *inputs], ["chi_ppm"], **attributes)


@pytest.mark.parametrize(
    ("made", "constants", "seen"),
    [
        (node("MaxPool", kernel_shape=[2, 2, 2]), {}, r"\(1, 1, 11, 11, 11\) of f32"),
        (node("Concat", "local_field_ppm", axis=1), {}, r"\(1, 2, 12, 12, 12\) of f32"),
        (node("ReduceMean", keepdims=0), {}, r"\(\) of f32"),
        (node("Cast", to=11), {"kind": 11}, r"\(1, 1, 12, 12, 12\) of f64"),
    ],
    ids=["smaller", "two channels", "a number", "double"],
)
def test_a_network_that_gives_something_else_is_refused(
    made: Any, constants: Any, seen: str, write_graph: Any, open_engine: Any, call_error: Any
) -> None:
    says = rf"the model of twice gives {seen}, its card says \(1, 1, 12, 12, 12\) of f32"
    with pytest.raises(call_error, match=says) as caught:
        open_engine(write_graph([made], **constants)).reconstruct(*volumes())
    assert caught.value.status == ENGINE


def test_a_network_that_gives_nan_is_refused(
    write_graph: Any, open_engine: Any, call_error: Any
) -> None:
    nothing = onnx.helper.make_node("Mul", ["local_field_ppm", "zero"], ["nothing"])
    undefined = onnx.helper.make_node("Div", ["nothing", "nothing"], ["chi_ppm"])
    engine = open_engine(write_graph([nothing, undefined], zero=np.float32(0)))
    with pytest.raises(call_error, match="the network returned 1080 NaN or Inf voxels") as caught:
        engine.reconstruct(*volumes())
    assert caught.value.status == ENGINE


@pytest.mark.parametrize("what", UNBOUNDED)
def test_a_graph_without_a_bound_is_refused_before_it_is_read(
    what: str, card: ModelCard, library: Any, call_error: Any, tmp_path: Path
) -> None:
    nodes, functions, _ = UNBOUNDED[what]
    says = "No conversion rule" if functions else "its graph has (a loop or a branch|100001 nodes)"
    path = save_graph(nodes, functions, card, tmp_path / "x.onnx")
    start = time.monotonic()
    with pytest.raises(call_error, match=f"x.onnx: .*{says}") as caught:
        library.open(path)
    assert time.monotonic() - start < 20
    assert caught.value.status == ENGINE


def test_a_node_with_a_field_number_that_libraries_cut_off(
    card: ModelCard, library: Any, call_error: Any, tmp_path: Path
) -> None:
    path = save_disguised(card, tmp_path / "x.onnx")
    with pytest.raises(call_error, match=r"x.onnx: not a valid .onnx model"):
        library.open(path)


def test_an_engine_goes_on_after_an_error(engine: Any, call_error: Any) -> None:
    field, mask = volumes()
    first = engine.reconstruct(field, mask)
    bad = field.copy()
    bad[5, 5, 5] = np.inf
    wrong: list[tuple[int, str, tuple[Any, ...], dict[str, Any]]] = [
        (DATA, "1 of 720 voxels", (bad, mask), {}),
        (DATA, "mask is empty", (field, 0 * mask), {}),
        (DATA, "zero in the whole mask", (0 * field, mask), {}),
        (DATA, "looks like Hz", (1000 * field, mask), {}),
        (DATA, "voxel size must be", (field, mask, (1, 0, 1)), {}),
        (DATA, "B0 direction", (field, mask, (1, 1, 1), (0, 0, 0)), {}),
        *(
            (USAGE, f"axes are '{axes}', expected three letters", (field, mask), {"axes": text})
            for axes, text in (("LP", b"LP"), ("LPR", b"LPR"), ("las", b"las"), ("RASI", b"RASI"))
        ),
        (USAGE, "struct_size", (field, mask), {"struct_size": 48}),
        (USAGE, "not a multiple of the network's divisor 4", (field, mask), {"patch": 30}),
        (MEMORY, "would need .* MiB in the stage", (field, mask), {"memory_limit_bytes": 1000}),
        (MEMORY, "the limit is 1 MiB", (field, mask), {"patch": 24, "memory_limit_bytes": 10**6}),
    ]
    for status, words, arguments, params in wrong:
        with pytest.raises(call_error, match=words) as caught:
            engine.reconstruct(*arguments, **params)
        assert caught.value.status == status
        np.testing.assert_array_equal(engine.reconstruct(field, mask), first)


def test_a_field_of_unlikely_size_is_noted(
    engine: Any, collect: Callable[[list[str]], Any]
) -> None:
    lines: list[str] = []
    field, mask = volumes()
    engine.reconstruct(field / 100, mask, log=collect(lines))
    assert "usually it lies between 0.002 and 0.3" in lines[0]


def test_cancelling_stops_between_patches(
    card: ModelCard,
    write_model: Callable[..., Path],
    open_engine: Callable[..., Any],
    call_error: Any,
    cancel: Callable[..., Any],
    progress: Callable[..., Any],
) -> None:
    engine = open_engine(write_model(card))
    seen: list[tuple[int, int]] = []
    shows = progress(lambda done, total: seen.append((done, total)))
    field, mask = volumes((24, 24, 24))
    params = {"patch": 12, "overlap": 4, "progress": shows}
    with pytest.raises(call_error, match="cancelled by the caller") as caught:
        engine.reconstruct(field, mask, cancel=cancel(lambda: len(seen) == 3), **params)
    assert caught.value.status == CANCELLED
    assert [done for done, _ in seen] == [1, 2, 3]
    seen.clear()
    engine.reconstruct(field, mask, cancel=cancel(lambda: False), **params)
    assert seen[-1] == (seen[-1][1],) * 2
    assert len(seen) == seen[-1][1]


def test_cancelling_stops_a_network_while_it_runs(
    write_graph: Any, open_engine: Any, call_error: Any, cancel: Callable[..., Any]
) -> None:
    names = ["local_field_ppm", *(f"v{n}" for n in range(60)), "chi_ppm"]
    channels = [1, *[12] * 60, 1]
    random, nodes, weights = np.random.default_rng(2), [], {}
    for n, (takes, gives) in enumerate(pairwise(channels)):
        shape = (gives, takes, 3, 3, 3)
        weights[f"w{n}"] = random.normal(0, (27 * takes) ** -0.5, shape).astype(np.float32)
        nodes += [onnx.helper.make_node("Conv", [names[n], f"w{n}"], [names[n + 1]], pads=[1] * 6)]
    engine = open_engine(write_graph(nodes, **weights), threads=1)
    field, mask = volumes((64, 64, 64))
    first = engine.reconstruct(field, mask)  # compiles it
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2  # twice before the one run begins

    start = time.monotonic()
    with pytest.raises(call_error, match="cancelled by the caller") as caught:
        engine.reconstruct(field, mask, cancel=cancel(stop))
    stopped = time.monotonic()
    assert (caught.value.status, asked) == (CANCELLED, 3)
    np.testing.assert_array_equal(engine.reconstruct(field, mask, cancel=cancel(int)), first)
    assert stopped - start < (time.monotonic() - stopped) / 3


def test_a_slow_callback_holds_up_its_own_engine_only(
    open_engine: Callable[..., Any], progress: Callable[..., Any]
) -> None:
    engines = [open_engine(BUNDLED_MODEL, threads=1) for _ in range(2)]
    field, mask = volumes()
    ended: dict[str, float] = {}
    entered, release = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        entered.set()
        assert release.wait(60)

    def call(name: str, engine: Any, **params: Any) -> None:
        engine.reconstruct(field, mask, **params)
        ended[name] = time.monotonic()

    slow = threading.Thread(
        target=call, args=("slow", engines[0]), kwargs={"progress": progress(hold)}
    )
    slow.start()
    assert entered.wait(60)
    waiting = threading.Thread(target=call, args=("same engine", engines[0]))
    waiting.start()
    call("other engine", engines[1])
    assert "same engine" not in ended
    release.set()
    slow.join()
    waiting.join()
    assert ended["other engine"] < ended["slow"] <= ended["same engine"] + 1e-3


def test_a_device_is_refused_where_there_is_none(library: Any, engine: Any) -> None:
    status = library.c.qsm_reconstruct_device(engine.handle, None, None, None, None)
    assert status in (USAGE, ENGINE)
    assert library.c.qsm_last_error()


def test_two_tkd_thresholds_make_two_maps(
    tkd_card: ModelCard, write_model: Callable[..., Path], open_engine: Callable[..., Any]
) -> None:
    maps = []
    for threshold in (0.1, 0.3):
        made = replace(tkd_card, priors=(replace(tkd_card.priors[0], threshold=threshold),))
        path = write_model(made, f"{threshold}.onnx")
        maps.append(open_engine(path).reconstruct(*volumes()))
    assert np.abs(maps[0]).max() > 1.5 * np.abs(maps[1]).max()
