"""Plans in the C library: the engine, the graph behind it, and what is no plan."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsm_deploy.kernels.errors import QsmDeployError
from qsm_deploy.runtime.card.plan_file import FOOTER, plan_bytes
from qsm_deploy.runtime.card.read import graph_in, load_card
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from tests.fuzz.damage import damaged
from tests.runtime.card.malformed_plans import MALFORMED

AUTO, CPU, GPU = range(3)
ENGINE = 4
TRIES = 600


@pytest.fixture
def engine_bytes() -> bytes:
    card = load_card(BUNDLED_MODEL)
    options = {"engine": "tensorrt 11.1.0", "gpu": "NVIDIA H200", "plan": "1"}
    card = replace(card, options=card.options | options)
    return b"ftrt\x00{\xff" * 50 + card.to_json().encode() + b"}\x00\xfe" * 500


@pytest.fixture
def plan(engine_bytes: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "x.plan"
    path.write_bytes(plan_bytes(engine_bytes, BUNDLED_MODEL.read_bytes()))
    return path


@pytest.fixture
def said(library: Any, call_error: Any) -> Callable[..., str]:
    """Return what says why a model is refused."""

    def said(path: Path, device: int) -> str:
        with pytest.raises(call_error) as caught:
            library.open(path, device=device)
        assert caught.value.status == ENGINE
        return str(caught.value)

    return said


def test_an_engine_of_another_network_is_refused_as_in_python(
    plan: Path, engine_bytes: bytes, said: Callable[..., str]
) -> None:
    for ours, other in (
        (b'"fp32"', b'"fp16"'),
        (b'"tv-unet"', b'"tv-unit"'),
        (b'256":"', b'256":"f'),
    ):
        engine = engine_bytes.replace(ours, other)
        assert engine != engine_bytes
        plan.write_bytes(plan_bytes(engine, BUNDLED_MODEL.read_bytes()))
        with pytest.raises(QsmDeployError) as caught:
            graph_in(plan)
        assert said(plan, CPU) == str(caught.value)


def test_a_plan_gives_the_map_of_its_graph(plan: Path, open_engine: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((21, 24, 18), np.uint8)
    mask[2:-2, 3:-4, 1:-1] = 1
    scan = rng.normal(0, 0.03, mask.shape), mask, (1, 0.8, 2), (0, 0.5, 1)
    expected = open_engine(BUNDLED_MODEL).reconstruct(*scan)
    assert expected.any()
    for device in (AUTO, CPU):
        engine = open_engine(plan, device=device)
        assert engine.card == open_engine(BUNDLED_MODEL).card
        np.testing.assert_array_equal(engine.reconstruct(*scan), expected)
        np.testing.assert_array_equal(
            engine.reconstruct(*scan, patch=16, overlap=4),
            open_engine(BUNDLED_MODEL).reconstruct(*scan, patch=16, overlap=4),
        )


def test_one_line_says_that_a_cpu_takes_the_place_of_a_gpu(
    plan: Path, open_engine: Callable[..., Any], collect: Callable[[list[str]], Any]
) -> None:
    lines: list[str] = []
    open_engine(plan, log=collect(lines))
    assert lines[:-1] == [
        f"{plan}: this library was built without TensorRT "
        "(-DQSM_TENSORRT_INCLUDE=<folder of NvInferRuntime.h>); its fp32 graph runs on the CPU "
        "instead, in openvino, computed in fp32"
    ]
    asked_for: list[str] = []
    open_engine(plan, device=CPU, log=collect(asked_for))
    assert asked_for == lines[-1:] == [f"{plan}: tv-unet, fp32, on openvino"]


def test_who_asks_for_a_gpu_gets_no_cpu(
    plan: Path, said: Callable[..., str], library: Any, call_error: Any
) -> None:
    assert "x.plan: this library was built without TensorRT" in said(plan, GPU)
    assert "runs .onnx files on the CPU only" in said(BUNDLED_MODEL, GPU)
    with pytest.raises(call_error, match="tv computes on the CPU only"):
        library.open_method("tv", device=GPU)
    for device in (-1, 3):
        with pytest.raises(call_error, match=f"device is {device}, no qsm_device"):
            library.open(plan, device=device)


def refused_in_python(path: Path) -> str:
    with pytest.raises(QsmDeployError) as caught:
        graph_in(path)
    return str(caught.value)


@pytest.mark.parametrize("what", MALFORMED)
def test_both_readers_say_the_same_of_a_malformed_plan(
    plan: Path, engine_bytes: bytes, said: Callable[..., str], what: str
) -> None:
    words, make = MALFORMED[what]
    plan.write_bytes(make(engine_bytes, BUNDLED_MODEL.read_bytes()))
    expected = refused_in_python(plan)
    assert words in expected
    assert said(plan, CPU) == expected
    assert said(plan, AUTO).startswith(expected)
    assert "\n" not in said(plan, AUTO)


def test_both_readers_say_the_same_of_other_plans(
    plan: Path, engine_bytes: bytes, said: Callable[..., str]
) -> None:
    former = engine_bytes.replace(b',"plan":"1"', b"")
    for data in (
        former,
        former.replace(b"tensorrt 11.1.0", b"tensorrt-rtx 1.7}"),
        former[: former.find(b"precision")],
        plan_bytes(engine_bytes, b"no graph"),
        plan_bytes(engine_bytes, bytes(200)),
    ):
        plan.write_bytes(data)
        assert said(plan, CPU) == refused_in_python(plan)
    plan.write_bytes(former)
    assert "for tensorrt 11.1.0, of the former form" in said(plan, CPU)
    assert "export it again; this library was built without TensorRT" in said(plan, AUTO)


@pytest.mark.slow
def test_both_readers_say_the_same_of_damaged_plans(
    plan: Path, library: Any, call_error: Any, note_counts: Callable[..., None]
) -> None:
    whole, graph, dice = plan.read_bytes(), BUNDLED_MODEL.read_bytes(), random.Random(4)
    refused = 0
    for _ in range(TRIES):
        at = dice.choice((0, len(whole) - len(graph), len(whole) - FOOTER.size))
        plan.write_bytes(whole[:at] + damaged(whole[at:], dice))
        try:
            assert graph_in(plan) == graph
            here = ""
        except QsmDeployError as error:
            here = str(error)
        try:
            library.open(plan, device=CPU).close()
            there = ""
        except call_error as error:
            there = str(error)
        assert here == there or ("card" in here and "card" in there)
        refused += bool(here)
    assert refused > TRIES // 2
    note_counts("plans, in Python and in C", inputs=TRIES, refused=refused, same=TRIES - refused)


@pytest.mark.parametrize("size", [*range(54, 66), 119, 120, 127, 128, 1000])
def test_digests_are_right_at_every_length(
    size: int, plan: Path, engine_bytes: bytes, said: Callable[..., str]
) -> None:
    graph = (bytes(range(16, 256)) * 5)[:size]
    plan.write_bytes(plan_bytes(engine_bytes, graph))
    assert "not an .onnx model" in said(plan, CPU)
