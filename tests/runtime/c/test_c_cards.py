"""One list of cards, whole, at the limits and beyond, and damaged: both runtimes say the same."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qsm_deploy.kernels.errors import CardError
from qsm_deploy.runtime.card.card import (
    LARGEST,
    MAX_BYTES,
    METADATA_KEY,
    MOST,
    RANGES,
    TASKS,
    UNITS,
    GeometryLimits,
    ModelCard,
    Task,
    Tiles,
)
from qsm_deploy.runtime.card.read import card_from
from qsm_deploy.runtime.sessions.int8 import sums_in_int32
from qsm_deploy.runtime.sessions.open import open_session
from tests.fuzz.damage import damaged_json

TRIES = 3000
VOLUME = ["n", 1, "x", "y", "z"]
OF_THE_CARD = ("the model's card", "contradictory card", "has no model card")

Says = Callable[[str], str]


@pytest.fixture
def full(tkd_card: ModelCard) -> ModelCard:
    """Return a card in which everything that has a range is there."""
    constants = {"mask_erosion_voxels": 1.0, "iterations": 3.0, "cg_steps": 5.0}
    limits = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 5.0)
    return replace(tkd_card, constants=constants, geometry=limits)


@pytest.fixture
def in_c(fake: Any, call_error: Any, tmp_path: Path) -> Says:
    """Return what says what the C library makes of a card: "" for nothing."""

    def says(text: str) -> str:
        path = tmp_path / "card.onnx"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            fake.open(path).close()
        except call_error as error:
            return str(error)
        return ""

    return says


def in_python(text: str) -> str:
    try:
        card_from(text, Path("card.onnx"))
    except CardError as error:
        return str(error)
    return ""


def agreed(text: str, in_c: Says) -> bool:
    """Return whether a card is accepted, which both must say, whether C runs its network or not."""
    here, there = in_python(text), in_c(text)
    refused = any(words in there for words in OF_THE_CARD)
    assert bool(here) == refused, (text, here, there)
    assert "\n" not in here + there
    return not here


def changed(card: ModelCard, path: str, value: Any) -> str:
    """Return a card's JSON with one field set."""
    *folders, name = path.split(".")
    inner = fields = json.loads(card.to_json())
    for folder in folders:
        inner = inner[folder]
    inner[name] = value
    return json.dumps(fields)


@pytest.mark.parametrize("path", list(RANGES))
def test_ranges_end_where_they_end(path: str, full: ModelCard, in_c: Says) -> None:
    for limit, away in zip(RANGES[path], (-1, 1), strict=True):
        assert agreed(changed(full, path, limit), in_c), limit
        beyond = limit + away * (1 if limit < LARGEST else 0.01 * limit)
        assert not agreed(changed(full, path, beyond), in_c), beyond


@pytest.mark.parametrize(
    ("path", "value", "accepted"),
    [
        ("precision", "int8", True),
        ("precision", "fp8", False),
        ("network", "x" * 99, True),
        ("network", "a\nb", False),
        ("network", "\x7f", False),
        ("network", "µ", False),
        ("network", "\u202egnp", False),
        ("network", "\ud800", False),
        ("licence", "$\\frac{$ \\ / ~", True),
        ("options", {"a": "b", "": ""}, True),
        ("options", {"a\tb": "x"}, False),
        ("constants", {"a": 10**30, "b": -0.0, "c": 5e-324}, True),
        ("constants", {"a": LARGEST, "b": -LARGEST}, True),
        ("constants", {"a": 10**39}, False),
        ("constants", {"a": math.nextafter(LARGEST, math.inf)}, False),
        ("constants", {"a": math.nan}, False),
        ("constants", {"a": True}, False),
        ("memory", {}, True),
        ("memory.openvino.fixed_bytes", MOST, True),
        ("memory.openvino.fixed_bytes", MOST + 1, False),
        ("memory.openvino.fixed_bytes", 10**400, False),
        ("memory.openvino.bytes_per_voxel", 0, False),
        ("inputs", [], False),
        *(("axes", axes, True) for axes in ("RAS", "LPS", "IPR")),
        *(("axes", axes, False) for axes in ("", "RA", "RASI", "RLS", "ras", "RA\\n", None, 1)),
        ("output.shape", ["n"], False),
        ("output.shape", ["n", 2, "x", "y", "z"], True),
        ("patchable", "split", False),
        *(("pad_front", front, True) for front in ("ceil", "floor", "none")),
        *(("pad_front", front, False) for front in ("half", 0, None)),
        ("further_outputs", [], True),
        ("further_outputs", None, False),
        ("further_outputs", [{"name": "mask", "unit": "1", "shape": VOLUME}], False),
        ("tiles", None, True),
        ("tiles", {}, False),
        ("schema", 1.0, False),
        ("schema", True, False),
    ],
)
def test_what_a_field_may_be(path, value, accepted, full: ModelCard, in_c: Says) -> None:
    assert agreed(changed(full, path, value), in_c) == accepted


def priors_of(card: ModelCard, *changes: dict[str, Any]) -> str:
    """Return a card's JSON with one prior map for each change of its first."""
    fields = json.loads(card.to_json())
    fields["priors"] = [fields["priors"][0] | change for change in changes]
    return json.dumps(fields)


NAME, FIELD = "tkd_chi_ppm", "tv_field_ppm"
OF_TV = {"method": "tv", "threshold": None}
TV_FIELD = {"name": FIELD, "method": "tv_field", "threshold": None}


@pytest.mark.parametrize(
    ("changes", "accepted"),
    [
        ([{}], True),
        ([], False),  # but the network takes it
        ([{}, {}], False),
        ([{}, {"name": "more_ppm"}], False),
        ([{"name": "mask"}, {}], False),
        ([{"name": "a\nb"}], False),
        ([OF_TV], True),
        ([OF_TV | {"threshold": 0.2}], False),
        ([OF_TV | {"of": FIELD}], False),
        ([{"method": "medi"}], False),
        ([{"threshold": None}], False),
        *(([{"threshold": threshold}], True) for threshold in (5e-324, 0.5, 2 / 3)),
        *(
            ([{"threshold": threshold}], False)
            for threshold in (0, -0.1, 0.667, 1, math.inf, "0.1")
        ),
        *(([{"steps": steps}], True) for steps in (1, 1000)),
        *(([{"steps": steps}], False) for steps in (0, 1001, 10**9, 2**60, 1.0, True)),
        *(([{"of": of}], False) for of in (FIELD, "mask", NAME, "", None)),
        ([TV_FIELD, {"of": FIELD}], True),
        ([TV_FIELD | {"method": "tv_residual"}, {"of": FIELD}], True),
        ([TV_FIELD | {"method": "tv"}, {"of": FIELD}], False),
        ([TV_FIELD | {"method": "tkd", "threshold": 0.1}, {"of": FIELD}], False),
        ([{"of": FIELD}, TV_FIELD], False),  # not yet made
    ],
)
def test_what_prior_maps_there_may_be(changes, accepted, full: ModelCard, in_c: Says) -> None:
    assert agreed(priors_of(full, *changes), in_c) == accepted


@pytest.mark.parametrize(
    ("anchor", "accepted"),
    [
        (None, True),
        ({"prior": NAME, "threshold": 0.15}, True),
        ({"prior": NAME, "threshold": 0}, False),
        ({"prior": NAME, "threshold": 0.7}, False),
        ({"prior": NAME}, False),
        ({"prior": "local_field_ppm", "threshold": 0.15}, False),
        ({"prior": "mask", "threshold": 0.15}, False),
        (NAME, False),
    ],
)
def test_what_a_map_may_be_anchored_to(anchor, accepted, full: ModelCard, in_c: Says) -> None:
    assert agreed(changed(full, "anchor", anchor), in_c) == accepted


@pytest.mark.parametrize(
    ("path", "value", "accepted"),
    [
        ("priors", None, False),
        ("priors", {}, False),
        ("tkd", None, True),
        ("tkd", {}, False),
        ("tkd", {"threshold": 0.2, "pad_voxels": 8, "masked": True}, False),
        ("pipeline", "tkd+cnn", False),
        ("pipeline", "after", False),  # which makes nothing of its field
    ],
)
def test_prior_maps_took_the_place_of_tkd(path, value, accepted, full, in_c: Says) -> None:
    assert agreed(changed(full, path, value), in_c) == accepted


@pytest.mark.parametrize(
    ("name", "unit", "shape", "accepted"),
    [
        (NAME, "ppm", ["n", 1, "x", "y", "z"], True),
        (NAME, "ppb", ["n", 1, "x", "y", "z"], False),
        (NAME, "ppm", ["n", 2, "x", "y", "z"], False),
        (NAME, "ppm", [1], False),
        ("field_noise_ppm", "ppm", [1], True),
        ("field_noise_ppm", "1", [1], False),
    ],
)
def test_inputs_made_of_the_field(name, unit, shape, accepted, full, in_c: Says) -> None:
    fields = json.loads(full.to_json())
    made = {"name": name, "unit": unit, "shape": shape}
    fields["inputs"] = [t for t in fields["inputs"] if t["name"] != name] + [made]
    assert agreed(json.dumps(fields), in_c) == accepted
    fields["inputs"] = fields["inputs"][::-1]  # the field is not the first
    assert not agreed(json.dumps(fields), in_c)


@pytest.mark.parametrize(
    ("old", "new", "accepted"),
    [
        ('"iterations":3.0', '"iterations":3e0', True),
        ('"iterations":3.0', '"iterations":3', True),
        ('"iterations":3.0', '"iterations":03', False),
        ('"iterations":3.0', '"iterations":1e999', False),
        ('"iterations":3.0', '"other":1e-999', True),
        ('"iterations":3.0', '"other":0.' + "0" * 400 + "1", True),
        ('"iterations":3.0', '"iterations":NaN', False),
        ('"schema":1', '"schema":1,"schema":1', False),
        ('"iterations":3.0', '"iterations":3.0,"iterations":3.0', False),
        ("tkd-twice", "tkd\\u002dtwice\\/", True),
        ("tkd-twice", "\\ud83d\\ude00", False),
        ("tkd-twice", "\\u12", False),
        ("{", "\ufeff{", False),
        ("{", "{\0", False),
        ("{", " \t\r\n{ ", True),
        ("{", "\f{", False),
    ],
)
def test_how_it_may_be_written(old: str, new: str, accepted: bool, full, in_c: Says) -> None:
    text = full.to_json()
    assert text.count(old) >= 1
    assert agreed(text.replace(old, new, 1), in_c) == accepted


def test_a_field_that_came_later_may_be_missing(full: ModelCard, in_c: Says) -> None:
    fields = json.loads(full.to_json())
    assert "axes" not in fields
    assert agreed(replace(full, axes="LPS").to_json(), in_c)
    del fields["priors"][0]["threshold"]
    assert not agreed(json.dumps(fields), in_c)
    fields["priors"][0]["method"] = "tv"
    assert agreed(json.dumps(fields), in_c)
    for name in fields:
        assert not agreed(json.dumps({k: v for k, v in fields.items() if k != name}), in_c)


def test_both_say_the_same_of_wrong_axes(full: ModelCard, in_c: Says) -> None:
    text = changed(full, "axes", "LPR")
    here, there = in_python(text), in_c(text)
    assert "contradictory card: axes are 'LPR', expected three letters" in here
    assert there.endswith(here.removeprefix("card.onnx: "))


def test_how_long_it_may_be(full: ModelCard, in_c: Says) -> None:
    text = full.to_json()
    longest = text + " " * (MAX_BYTES - len(text))
    assert agreed(longest, in_c)
    assert not agreed(longest + " ", in_c)


@pytest.mark.parametrize("pipeline", ["lpcnn", "modl", "spinet", "nextqsm"])
def test_the_numbers_of_a_loop(pipeline: str, full: ModelCard, in_c: Says) -> None:
    fields = json.loads(full.to_json()) | {"pipeline": pipeline, "patchable": "split", "priors": []}
    volume = {"unit": "1", "shape": ["n", 2, "x", "y", "z"]}
    fields["inputs"] = [volume | {"name": "prior_input"}]
    fields["output"] = volume | {"name": "prior_output"}
    names = ("alpha", "step", "lambda", "p", "chi_mean", "chi_std", "field_mean", "field_std")
    fields["normalisation"] = dict.fromkeys((*names, "lambda_1"), 1.0)
    assert agreed(json.dumps(fields), in_c)
    assert agreed(json.dumps(fields | {"patchable": "no", "why_whole": "so it is"}), in_c)
    for task in TASKS:
        assert agreed(json.dumps(fields | {"task": task}), in_c) == (task == "local_field->chi")
    assert not agreed(json.dumps(fields | {"further_outputs": [fields["output"]]}), in_c)
    names += ("lambda_1",)
    for name in ("lambda_1" if pipeline == "nextqsm" else "chi_std", "iterations"):
        holder = fields["normalisation" if name in names else "constants"]
        value = holder.pop(name)
        assert not agreed(json.dumps(fields), in_c)
        holder[name] = value


def test_what_the_two_parts_of_a_network_are_for(full: ModelCard, in_c: Says) -> None:
    for first in ("local_field_ppm", "rough_chi_ppm"):
        fields = of_task(full, "local_field->chi", pipeline="after", inputs=tensors(first))
        for task in TASKS:
            accepted = agreed(json.dumps(fields | {"task": task}), in_c)
            assert accepted == (task == "local_field->chi")


def tensors(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "unit": UNITS[name], "shape": VOLUME} for name in names]


def of_task(card: ModelCard, task: Task, **fields: Any) -> dict[str, Any]:
    """Return the fields of a card of one graph for a task."""
    first, besides, (gives, *further) = TASKS[task]
    made = json.loads(card.to_json()) | {"task": task, "inputs": tensors(first, *besides)}
    made |= {"output": tensors(gives)[0], "further_outputs": tensors(*further), "priors": []}
    return made | fields


@pytest.mark.parametrize("task", list(TASKS))
def test_what_a_task_takes_and_gives(task: Task, full: ModelCard, in_c: Says) -> None:
    assert agreed(json.dumps(of_task(full, task)), in_c)
    for other in TASKS.keys() - {task}:
        assert not agreed(json.dumps(of_task(full, task) | {"task": other}), in_c)
    first, besides, given = TASKS[task]
    for taken in (
        (first, *besides[::-1], "mask"),
        (first, *besides[:1]),
        (first, *besides, "chi_ppm"),
        (first, "r2prime_hz"),
        (*besides, first),
        (first, *besides, "echo_time_s"),
        (first, *besides, "rough_chi_ppm"),
    ):
        agreed(json.dumps(of_task(full, task, inputs=tensors(*taken))), in_c)
    for gives in (given[:1], given[::-1], (*given, "chi_ppm"), (*given, *given)):
        output, *further = tensors(*gives)
        fields = {"output": output, "further_outputs": further}
        assert agreed(json.dumps(of_task(full, task, **fields)), in_c) == (gives == given)


@pytest.mark.parametrize(
    ("sizes", "blend", "accepted"),
    [
        ((32, 16, 16), "none", True),
        ((16, 16, 16), "none", True),
        ((4096, 4096, 4096), "none", True),
        ((4097, 4097, 4097), "none", False),
        ((31, 16, 16), "none", False),
        ((16, 18, 18), "none", False),
        ((16, 0, 0), "none", False),
        ((32, 16, 8), "none", False),
        ((16, 16, 1), "mean", True),
        ((16, 16, 16), "mean", True),
        ((16, 16, 17), "mean", False),
        ((16, 16, 0), "mean", False),
        ((16, 16, -1), "mean", False),
        ((32, 16, 8), "mean", False),
        ((32, 16, 8), "ramp", True),
        ((32, 16, 14), "ramp", True),
        ((32, 16, 15), "ramp", False),
        ((32, 16, 7), "ramp", False),
        ((31, 15, 8), "ramp", True),
        ((16.0, 16, 16), "none", False),
        ((2**53, 2**53, 1), "mean", False),
        ((16, 16, 16), "hann", False),
    ],
)
def test_which_tiles_cover_a_volume(sizes, blend, accepted, full: ModelCard, in_c: Says) -> None:
    whole = {"patchable": "no", "why_whole": "its authors run it in blocks"}
    size, kept, stride = sizes
    tiles = {"size": [size] * 3, "kept": [kept] * 3, "stride": [stride] * 3}
    tiles |= {"beyond": "edge", "blend": blend}
    card = of_task(full, "total_field->local_field", tiles=tiles, divisor=1, **whole)
    assert agreed(json.dumps(card), in_c) == accepted
    for axis in range(3):
        one = {n: [16] * axis + [v[0]] + [16] * (2 - axis) for n, v in list(tiles.items())[:3]}
        agreed(json.dumps(card | {"tiles": tiles | one}), in_c)
    assert not agreed(json.dumps(card | {"patchable": "yes", "why_whole": None}), in_c)
    for damage in ({"beyond": "wrap"}, {"size": [16, 16]}, {"kept": 16}, {"more": 1}):
        assert not agreed(json.dumps(card | {"tiles": tiles | damage}), in_c)
    assert not agreed(json.dumps(json.loads(full.to_json()) | whole | {"tiles": tiles}), in_c)


@pytest.mark.parametrize(
    ("size", "divisor", "accepted"),
    [
        ((32, 16, 64), 16, True),
        ((32, 16, 64), 32, False),
        ((16, 16, 24), 16, False),
        ((16, 16, 16), 0, False),
        ((16, 16, 16), -4, False),
    ],
)
def test_tiles_are_multiples_of_the_divisor(size, divisor, accepted, full, in_c: Says) -> None:
    fields = {"patchable": "no", "why_whole": "so it is", "divisor": divisor}
    fields["tiles"] = dict.fromkeys(("size", "kept", "stride"), size)
    fields["tiles"] |= {"beyond": "zero", "blend": "none"}
    card = of_task(full, "phase->chi", **fields)
    assert agreed(json.dumps(card), in_c) == accepted


@pytest.mark.slow
def test_damaged_cards(full: ModelCard, in_c: Says, note_counts: Callable[..., None]) -> None:
    dice, fields = random.Random("cards"), json.loads(full.to_json())
    blocks = Tiles((16,) * 3, (8,) * 3, (4,) * 3, "edge", "ramp")
    whole = {
        "tiles": asdict(blocks),
        "patchable": "no",
        "why_whole": "so it is",
        "pad_front": "none",
    }
    tiled = of_task(full, "local_field+chi+r2prime->chi_positive+chi_negative", **whole)
    for kind in (fields, tiled):
        counts = Counter(agreed(damaged_json(kind, dice), in_c) for _ in range(TRIES // 2))
        assert counts[True] > TRIES / 200, counts
        assert counts[False] > TRIES / 4, counts
        seen = {"refused": counts[False], "other": counts[True]}
        note_counts("cards, in Python and in C", inputs=TRIES // 2, **seen)


@pytest.mark.parametrize("options", [{}, {"int8_in": "openvino"}, {"int8_in": "openvin o"}])
def test_a_network_in_int8_gives_what_it_gives_in_python(
    options: dict[str, str], card: ModelCard, open_engine: Callable[..., Any], tmp_path: Path
) -> None:
    made = replace(card, precision="int8", divisor=1, options=options)
    rng = np.random.default_rng(0)
    values = {
        "scale": np.float32(0.003),
        "zero": np.int8(0),
        "weights": rng.integers(-127, 128, (1, 1, 3, 3, 3), dtype=np.int8),
        "steps": np.float32([0.01]),
        "none": np.int8([0]),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["local_field_ppm", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weights", "steps", "none"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["chi_ppm"], pads=[1] * 6),
    ]
    volumes = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, card.output.shape)
        for name in ("local_field_ppm", "chi_ppm")
    ]
    constants = [onnx.numpy_helper.from_array(np.array(v), k) for k, v in values.items()]
    graph = helper.make_graph(nodes, "q", volumes[:1], volumes[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: made.to_json()})
    onnx.save(model, tmp_path / "int8.onnx")
    field = rng.normal(0, 0.05, (12, 10, 9)).astype(np.float32)
    chi = open_engine(tmp_path / "int8.onnx").reconstruct(field, np.ones(field.shape))
    session = open_session(tmp_path / "int8.onnx", "openvino", precision="auto")
    accurate = options.get("int8_in") == "openvino" and sums_in_int32()
    assert session.precision == ("int8" if accurate else "fp32")
    expected = session.run({"local_field_ppm": field[None, None]})[0, 0]
    np.testing.assert_array_equal(chi, expected)
    assert np.abs(expected).max() > 0.05
    other = open_session(
        tmp_path / "int8.onnx", "openvino", precision="fp32" if accurate else "int8"
    )
    assert not np.array_equal(chi, other.run({"local_field_ppm": field[None, None]})[0, 0])
