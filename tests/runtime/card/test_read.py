"""Cards out of files that nothing runs: ONNX files and plans, whole, damaged and cut off."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import data, integers

import qsm_deploy.runtime.card.card as card_module
from qsm_deploy.kernels.errors import CardError, EngineError
from qsm_deploy.runtime.card.card import METADATA_KEY, ModelCard, parse_card
from qsm_deploy.runtime.card.plan_file import PlanFile, plan_bytes, read_plan
from qsm_deploy.runtime.card.read import graph_in, load_card
from qsm_deploy.runtime.sessions.open import open_session
from tests.runtime.card.malformed_plans import MALFORMED

BUNDLED = parse_card(
    (Path(card_module.__file__).parents[1] / "models" / "tv-unet.json").read_text()
)
CARD = replace(BUNDLED, precision="fp16", options={"engine": "tensorrt-rtx 1.7"})
BEFORE, AFTER = b"ftrt\x00{\xff" * 50, b"}\x00\xfe" * 500


MODEL = Path(card_module.__file__).parents[1] / "models" / "tv-unet.onnx"


def field(number: int, content: bytes) -> bytes:
    """Return a field of a protobuf message, shorter than 128 bytes or not."""
    size = len(content)
    head = [number << 3 | 2, *([size] if size < 128 else [size & 127 | 128, size >> 7])]
    return bytes(head) + content


def entry(key: str, value: str) -> bytes:
    return field(14, field(1, key.encode()) + field(2, value.encode()))


def test_the_card_of_an_onnx_file_is_read_without_its_graph(tmp_path: Path) -> None:
    assert load_card(MODEL) == BUNDLED
    whole = MODEL.read_bytes()
    fixed = bytes([9 << 3 | 5, *b"four", 10 << 3 | 1, *b"eight..."])
    others = entry("author", "someone") + entry("empty", "") + field(14, b"")
    (tmp_path / "a.onnx").write_bytes(
        b"\x08\x0a" + fixed + others + entry(METADATA_KEY, CARD.to_json())
    )
    assert load_card(tmp_path / "a.onnx") == CARD
    (tmp_path / "a.onnx").write_bytes(whole + entry(METADATA_KEY, CARD.to_json()))
    assert load_card(tmp_path / "a.onnx") == CARD  # of two entries the last, as in a map


def test_reading_it_loads_no_library() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "openvino", "numpy")
    code = (
        "import sys; from pathlib import Path; from qsm_deploy.runtime.card.read import load_card;"
        f"load_card(Path({str(MODEL)!r})); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kept", [2, 5, 30, 5000, -1, -1000])
def test_an_onnx_file_that_is_cut_off_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(MODEL.read_bytes()[:kept])
    with pytest.raises((EngineError, CardError), match=r"cut\.onnx") as caught:
        load_card(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damaged",
    [
        b"\x08",
        b"\x08" + b"\xff" * 10 + b"\x01",
        b"\x08\x0a\x3a\xff\x7f",
        b"\x08\x0a\x3b",
        entry("\x08", "")[:-1],
    ],
)
def test_bytes_that_are_no_message_are_refused(damaged: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x08\x0a" + damaged)
    with pytest.raises(
        EngineError, match=r"a\.onnx: not a valid \.onnx model, truncated or damaged"
    ):
        load_card(path)


@given(drawn=data())
def test_damaged_bytes_never_raise_anything_else(tmp_path_factory, drawn) -> None:
    whole = bytearray(
        b"\x08\x0a" + entry("author", "x" * 200) + entry(METADATA_KEY, CARD.to_json())
    )
    for _ in range(3):
        whole[drawn.draw(integers(1, len(whole) - 1))] = drawn.draw(integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged-{os.getpid()}.onnx"
    path.write_bytes(whole)
    with contextlib.suppress(EngineError, CardError):
        load_card(path)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "x.plan"
    path.write_bytes(BEFORE + CARD.to_json().encode() + AFTER)
    return path


@pytest.mark.parametrize("card", [CARD, replace(CARD, axes="LPS")])
def test_the_card_is_read_out_of_the_bytes(plan: Path, card: ModelCard) -> None:
    plan.write_bytes(BEFORE + card.to_json().encode() + AFTER)
    assert load_card(plan) == card


def test_a_plan_of_the_former_form_has_nothing_for_a_cpu(plan) -> None:
    with pytest.raises(
        EngineError, match=r"tv-unet in fp16 for tensorrt-rtx 1.7, of the former form"
    ) as e:
        open_session(plan, "onnxruntime")
    assert e.value.exit_code == 4
    assert "\n" not in str(e.value)


def test_a_plan_gives_its_parts_and_its_card(plan: Path) -> None:
    card, graph = replace(BUNDLED, options=CARD.options | {"plan": "1"}), MODEL.read_bytes()
    engine = BEFORE + card.to_json().encode() + AFTER
    plan.write_bytes(plan_bytes(engine, graph))
    assert read_plan(plan) == PlanFile(engine, graph)
    assert load_card(plan) == card
    assert graph_in(plan) == graph
    assert open_session(plan, "onnxruntime").card == BUNDLED


@pytest.mark.parametrize(
    "engine",
    [
        replace(BUNDLED, network="ir2qsm", options={"plan": "1"}),
        replace(BUNDLED, weights_sha256="f" * 64, options={"plan": "1"}),
        replace(BUNDLED, precision="int8", options={"plan": "1"}),
        replace(BUNDLED, options={"plan": "1", "residual": "input"}),
        BUNDLED,
    ],
)
def test_an_engine_of_another_network_than_its_graph_is_refused(plan: Path, engine) -> None:
    plan.write_bytes(plan_bytes(b"engine" + engine.to_json().encode(), MODEL.read_bytes()))
    for use in (load_card, graph_in):
        with pytest.raises(CardError, match="its engine and its graph have different cards"):
            use(plan)


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (b"\x08\x0a" + entry("author", "someone"), "has no model card"),
        (plan_bytes(b"engine", MODEL.read_bytes()), r"not an \.onnx model"),
        (MODEL.read_bytes()[:-10], "truncated or damaged|no model card"),
    ],
)
def test_a_graph_that_is_no_model_is_refused(plan: Path, graph: bytes, why: str) -> None:
    engine = replace(BUNDLED, options={"plan": "1"}).to_json().encode()
    plan.write_bytes(plan_bytes(engine, graph))
    with pytest.raises(EngineError, match=why):
        graph_in(plan)


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_plan_is_refused_in_one_line(plan: Path, what: str) -> None:
    card = replace(BUNDLED, options=CARD.options | {"plan": "1"})
    engine = BEFORE + card.to_json().encode() + AFTER
    said, make = MALFORMED[what]
    plan.write_bytes(make(engine, MODEL.read_bytes()))
    for use in (load_card, lambda path: open_session(path, "onnxruntime")):
        with pytest.raises(EngineError, match=rf"x\.plan.*{said}") as caught:
            use(plan)
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 10, len(BEFORE), len(BEFORE) + 300])
def test_a_plan_cut_off_before_its_card_ends_is_refused(plan: Path, kept: int) -> None:
    plan.write_bytes(plan.read_bytes()[:kept])
    with pytest.raises(CardError, match=r"no whole model card.*truncated") as caught:
        open_session(plan, "onnxruntime")
    assert caught.value.exit_code == 4


def test_a_plan_whose_card_is_nested_without_end_is_refused(plan: Path) -> None:
    plan.write_bytes(BEFORE + b'{"constants":' + b"[" * 100_000)
    with pytest.raises(CardError, match=r"x\.plan has no whole model card"):
        load_card(plan)


def test_a_card_longer_than_any_is_refused(tmp_path: Path) -> None:
    text = CARD.to_json().replace("{", "{" + " " * 4000, 1)
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0a" + entry(METADATA_KEY, text))
    with pytest.raises(CardError, match=r"a\.onnx: the model's card has \d+ bytes, at most 4000"):
        load_card(tmp_path / "a.onnx")


def test_a_card_of_another_schema_is_refused_with_the_file(plan: Path) -> None:
    fields = json.loads(CARD.to_json()) | {"schema": 9}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    plan.write_bytes(BEFORE + text.encode() + AFTER)
    with pytest.raises(CardError, match=r"x\.plan: the model's card has schema 9"):
        open_session(plan, "openvino")
