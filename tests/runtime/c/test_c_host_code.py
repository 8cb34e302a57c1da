"""The library's own code under sanitizers and valgrind, with a fake engine in place of OpenVINO."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qsm_deploy.runtime.card.card import ModelCard, TensorInfo
from qsm_deploy.runtime.card.plan_file import read_plan
from tests.runtime.card.malformed_plans import MALFORMED

FUZZ_RUNS, FUZZ_SECONDS = 20_000, 60
SUPPRESSIONS = Path(__file__).with_name("valgrind.supp")


def changed(card: dict[str, Any], path: str, value: Any) -> str:
    """Return a card with one field set, or removed where the value is ``...``."""
    *folders, name = path.split(".")
    inner = card = json.loads(json.dumps(card))
    for folder in folders:
        inner = inner[folder]
    if value is ...:
        del inner[name]
    else:
        inner[name] = value
    return json.dumps(card)


@pytest.fixture
def refused_models(fake_models: Path, card: ModelCard) -> dict[str, Path]:
    """Return models that must be refused, by what is wrong."""
    taken = TensorInfo("phase_rad", "rad", card.output.shape)
    phase = replace(card, task="phase->chi", inputs=(taken,))
    text = (fake_models / "tkd.onnx").read_text()
    fields = json.loads(text)

    def prior(**said: Any) -> str:
        return changed(fields, "priors", [fields["priors"][0] | said])

    texts = {
        "empty": "",
        "not JSON": "\x08\x0aonnx",
        "truncated": text[: len(text) // 2],
        "more after the end": text + "}",
        "embedded zero": text.replace("{", "{\0", 1),
        "deep": "[" * 3_000,
        "a list": "[]",
        "a name twice": text.replace('{"', '{"schema":1,"', 1),
        "bad escape": text.replace("tkd-twice", "\\q"),
        "half a surrogate at the end": '{"schema":1,"network":"\\ud800\\u',
        "number with a plus": text.replace('"divisor":4', '"divisor":+4'),
        "number with a leading zero": text.replace('"divisor":4', '"divisor":04'),
        "a huge number": text.replace('"divisor":4', '"divisor":1e999'),
        "a long number": text.replace('"divisor":4', f'"divisor":{"9" * 400}'),
        "control character": text.replace("tkd-twice", "tkd\ntwice"),
        "schema": changed(fields, "schema", 2),
        "missing field": changed(fields, "output.unit", ...),
        "unknown field": changed(fields, "memory.openvino.more", 1),
        "divisor of zero": changed(fields, "divisor", 0),
        "divisor of text": changed(fields, "divisor", "4"),
        "divisor with a point": changed(fields, "divisor", 4.0),
        "divisor beyond reason": changed(fields, "divisor", 2**40),
        "tkd of before": changed(fields, "tkd", {"threshold": 0.2}),
        "method": prior(method="medi"),
        "no threshold": prior(threshold=None),
        "large threshold": prior(threshold=0.7),
        "no steps": prior(steps=0),
        "steps beyond reason": prior(steps=10**9),
        "of nothing": prior(of="tv_field_ppm"),
        "name taken": prior(name="mask"),
        "no priors": changed(fields, "priors", []),
        "no inputs": changed(fields, "inputs", []),
        "pipeline": changed(fields, "pipeline", "magic"),
        "unrolled": changed(fields, "pipeline", "lpcnn"),
        "phase": phase.to_json(),
        "another task": changed(fields, "task", "total_field->chi"),
        "further outputs": changed(fields, "further_outputs", [fields["output"]]),
        "tiles": changed(fields, "tiles", {"size": [8, 8]}),
        "why_whole": changed(fields, "patchable", "no"),
        "endless": changed(fields, "receptive_field.halo", None),
        "memory": changed(fields, "memory", {}),
        "negative memory": changed(fields, "memory.openvino.fixed_bytes", -5),
        "one limit": changed(fields, "geometry.voxel_tolerance", 0.1),
        "two-vector": changed(fields, "geometry.voxel_size_mm", [1, 1]),
        "constants": changed(fields, "constants", {"a": True}),
        "unit": changed(fields, "output.unit", "ppb"),
        "no axes": changed(fields, "axes", "LPR"),
        "axes of null": changed(fields, "axes", None),
    }
    paths = {}
    for n, (what, content) in enumerate(texts.items()):
        paths[what] = fake_models / f"bad{n}.onnx"
        paths[what].write_text(content)
    engine = read_plan(fake_models / "both.plan").engine
    for n, (what, (_, make)) in enumerate(MALFORMED.items()):
        paths[what] = fake_models / f"bad{n}.plan"
        paths[what].write_bytes(make(engine, text.encode()))
    return paths


@pytest.fixture
def arguments(fake_models: Path, refused_models: dict[str, Path]) -> list[str]:
    return [str(fake_models), *map(str, refused_models.values())]


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_find_nothing(
    build_fake: Callable[..., Path],
    drive: Callable[..., str],
    arguments: list[str],
    refused_models: dict[str, Path],
) -> None:
    printed = drive(build_fake("address,undefined"), *arguments).splitlines()
    assert len(printed) == len(refused_models), "one line for each refused model"
    lines = dict(zip(refused_models, printed, strict=True))
    for what, words in {
        "empty": "has no model card",
        "schema": "another schema",
        "missing field": "lacks card.output.unit",
        "unknown field": "unknown field card.memory.openvino.more",
        "tkd of before": "unknown field card.tkd",
        "method": "wrong card.priors[0].method, expected tkd or tv or tv_field or tv_residual",
        "steps beyond reason": "takes 1000000000 steps, expected 1 to 1000",
        "divisor of text": "wrong card.divisor, expected a whole number",
        "phase": "use the Python runtime",
        "no axes": "contradictory card: axes are 'LPR', expected three letters such as RAS or LPS",
        "deep": "not JSON (too deep",
    }.items():
        assert words in lines[what]


@pytest.mark.slow
def test_valgrind_finds_nothing(
    plain_driver: Path, drive: Callable[..., str], arguments: list[str]
) -> None:
    valgrind = shutil.which("valgrind")
    if not valgrind:
        pytest.skip("no valgrind")
    before = [
        valgrind,
        "--quiet",
        "--error-exitcode=9",
        "--leak-check=full",
        "--show-leak-kinds=all",
    ]
    before += ["--errors-for-leak-kinds=all", f"--suppressions={SUPPRESSIONS}"]
    drive(plain_driver, *arguments, before=before)


@pytest.mark.slow
def test_damaged_cards_and_parameters_under_sanitizers(
    build_fake: Callable[..., Path],
    drive: Callable[..., str],
    fake_models: Path,
    note_counts: Callable[..., None],
) -> None:
    fuzz = build_fake("address,undefined", source="fuzz.cpp")
    cards = [
        fake_models / f"{name}.onnx"
        for name in ("cnn", "tkd", "priors", "eroded", "lps", "total", "tiles", "axial", "nan")
    ]
    models = [str(path) for path in (*cards, fake_models / "both.plan")]
    said = drive(fuzz, str(fake_models), str(FUZZ_RUNS), str(FUZZ_SECONDS), *models)
    runs, refused, opened, mapped = map(int, said.split())
    assert runs > FUZZ_RUNS // 20, "so slow that it shows nothing"
    assert refused > runs // 4
    assert opened > mapped > runs // 20
    what = "cards, parameters and scans in the C library"
    note_counts(what, inputs=runs, refused=refused, other=opened)
