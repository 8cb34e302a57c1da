"""The model card: canonical, small, and strict about every single field."""

import copy
import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsm_deploy.kernels.errors import CardError
from qsm_deploy.runtime.card.card import (
    MAX_BYTES,
    Anchor,
    GeometryLimits,
    MemoryUse,
    ModelCard,
    PriorMap,
    ReceptiveField,
    TensorInfo,
    Tiles,
    Verification,
    parse_card,
)

GRID = ("n", 1, "x", "y", "z")
FIELD = "local_field_ppm"
CARD = ModelCard(
    schema=1,
    network="priors",
    task="local_field->chi",
    pipeline="cnn",
    inputs=tuple(TensorInfo(name, "ppm", GRID) for name in (FIELD, "rest", "tkd", "tv")),
    output=TensorInfo("chi_ppm", "ppm", GRID),
    divisor=4,
    patchable="yes",
    why_whole=None,
    receptive_field=ReceptiveField(theoretical=40, halo=8, energy_kept=0.999),
    geometry=GeometryLimits((1.0, 1.0, 1.2), 0.1, (0.0, 0.0, 1.0), 5.0),
    normalisation={"chi_mean": 0.1},
    constants={"iterations": 3.0},
    options={"residual": "input"},
    precision="fp32",
    memory={"onnxruntime": MemoryUse(2_000_000, 700)},
    verified=Verification("pytorch", 0.004, ((64, 64, 64), (60, 72, 48))),
    weights_sha256="ab" * 32,
    licence="MIT",
    doi="10.1000/xyz",
    made_by="qsm-deploy 0.1.0",
    priors=(
        PriorMap("rest", "tv_residual", FIELD, 6),
        PriorMap("tkd", "tkd", "rest", 4, threshold=0.12),
        PriorMap("tv", "tv", FIELD, 6),
    ),
)
REST, TKD, TV = CARD.priors
PHASE = TensorInfo("phase_rad", "rad", GRID)
CHI = CARD.output
BLOCKS = Tiles((16, 16, 24), (8, 8, 16), (4, 4, 12), "edge", "ramp")
SEPARATES = replace(
    CARD,
    task="local_field+chi+r2prime->chi_positive+chi_negative",
    inputs=(CARD.inputs[0], CHI, TensorInfo("r2prime_hz", "Hz", GRID)),
    output=TensorInfo("chi_positive_ppm", "ppm", GRID),
    further_outputs=(TensorInfo("chi_negative_ppm", "ppm", GRID),),
    priors=(),
    patchable="no",
    why_whole="its authors run it in blocks",
    pad_front="none",
    tiles=BLOCKS,
)
NOISE = TensorInfo("field_noise_ppm", "ppm", (1,))
FIELDS = json.loads(CARD.to_json())
NULLABLE = {
    "doi",
    "why_whole",
    "receptive_field.halo",
    "receptive_field.theoretical",
    *(f"geometry.{name}" for name in FIELDS["geometry"]),
}
# an empty list is of the right type, even of inputs, which then contradict the pipeline
OF_ANY_LENGTH = {"inputs", "output.shape", "verified.shapes", "priors"}
FREE = {"options", "memory", "normalisation", "constants"}  # their keys are names, not fields


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every field, containers before their content."""
    for name, inner in value.items():
        yield prefix + name
        if isinstance(inner, dict):
            yield from paths(inner, f"{prefix}{name}.")


def at(fields: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Return the object that holds a field, and the field's own name."""
    *parents, name = path.split(".")
    for parent in parents:
        fields = fields[parent]
    return fields, name


def with_tv(**said: Any) -> tuple[TensorInfo, ...]:
    """Return the inputs of the card with something else about the last, a prior map."""
    return (*CARD.inputs[:3], replace(CARD.inputs[3], **said))


def changed(path: str, value: Any) -> str:
    fields = copy.deepcopy(FIELDS)
    holder, name = at(fields, path)
    holder[name] = value
    return json.dumps(fields)


every_path = pytest.mark.parametrize("path", list(paths(FIELDS)))
every_object = pytest.mark.parametrize(
    "path", [p for p in paths(FIELDS) if isinstance(at(FIELDS, p)[0][at(FIELDS, p)[1]], dict)]
)


def test_the_canonical_form_is_read_back():
    text = CARD.to_json()
    assert parse_card(text) == CARD
    assert parse_card(json.dumps(FIELDS, indent=4)).to_json() == text
    assert text.isascii()
    assert " " not in text.replace("qsm-deploy 0.1.0", "")
    assert list(FIELDS) == sorted(FIELDS)


def test_an_anchor_is_read_back():
    anchored = replace(CARD, anchor=Anchor("tv", 0.15))
    assert parse_card(anchored.to_json()) == anchored
    text = anchored.to_json().replace('"threshold":0.15', '"threshold":"0.15"')
    with pytest.raises(CardError, match=r"card\.anchor\.threshold"):
        parse_card(text)


def test_a_card_without_optional_values_is_read_back():
    plain = replace(
        CARD,
        inputs=CARD.inputs[:1],
        priors=(),
        doi=None,
        geometry=GeometryLimits(None, None, None, None),
        options={},
        memory={},
    )
    assert parse_card(plain.to_json()) == plain


def test_a_card_of_a_separation_in_tiles_is_read_back():
    assert parse_card(SEPARATES.to_json()) == SEPARATES
    assert [tensor.name for tensor in SEPARATES.outputs] == ["chi_positive_ppm", "chi_negative_ppm"]
    fields = json.loads(SEPARATES.to_json())
    assert fields["pad_front"] == "none"
    for name in ("further_outputs", "pad_front", "tiles"):
        assert name not in FIELDS, "as readers from before expect it"
    for where, value in {"pad_front": "half", "further_outputs": None, "tiles": []}.items():
        with pytest.raises(CardError, match=rf"card\.{where}"):
            parse_card(json.dumps(fields | {where: value}))
    for name, value in {"size": [16, 16], "kept": [8.0, 8, 8], "beyond": "wrap"}.items():
        with pytest.raises(CardError, match=rf"card\.tiles\.{name}"):
            parse_card(json.dumps(fields | {"tiles": fields["tiles"] | {name: value}}))


@pytest.mark.parametrize(
    ("size", "kept", "stride", "blend"),
    [
        (16, 8, 4, "none"),
        (15, 8, 8, "none"),
        (8, 16, 16, "none"),
        (4097, 4097, 4097, "none"),
        (16, 8, 8, "mean"),
        (16, 16, 0, "mean"),
        (16, 16, 17, "mean"),
        (16, 8, 3, "ramp"),
        (16, 8, 7, "ramp"),
    ],
)
def test_tiles_that_leave_gaps_are_refused(size, kept, stride, blend):
    tiles = Tiles((16, size, 16), (16, kept, 16), (16, stride, 16), "zero", blend)
    with pytest.raises(
        CardError, match=f"tiles of {size} voxels, {kept} kept every {stride}, blen"
    ):
        replace(SEPARATES, tiles=tiles)


def test_axes_are_those_of_the_scanner_unless_it_says_so():
    assert CARD.axes == "RAS"
    assert "axes" not in FIELDS
    assert parse_card(changed("axes", "RAS")) == CARD
    other = replace(CARD, axes="LPS")
    assert other.to_json().startswith('{"axes":"LPS",')
    assert parse_card(other.to_json()) == other


def test_a_card_from_before_there_were_prior_maps_is_read():
    assert parse_card(json.dumps(FIELDS | {"tkd": None})) == CARD
    settings = {"threshold": 0.12, "pad_voxels": 8, "masked": True}
    with pytest.raises(CardError, match=r"unknown field card\.tkd"):
        parse_card(json.dumps(FIELDS | {"tkd": settings}))


def test_a_card_does_not_change():
    with pytest.raises(FrozenInstanceError):
        CARD.network = "other"  # type: ignore[misc]


def test_a_card_that_does_not_fit_is_refused():
    room = MAX_BYTES - len(CARD.to_json())
    full = replace(CARD, licence=CARD.licence + "x" * room)
    assert len(full.to_json()) == MAX_BYTES
    with pytest.raises(CardError, match=f"{MAX_BYTES + 1} bytes, at most {MAX_BYTES}"):
        replace(full, licence=full.licence + "x").to_json()
    with pytest.raises(CardError, match="bytes"):  # six ASCII bytes a letter
        replace(CARD, licence="µ" * (room // 2)).to_json()


@every_path
def test_a_missing_field_is_named(path):
    if path.split(".")[0] in FREE:
        path = path.split(".")[0]
    fields = copy.deepcopy(FIELDS)
    holder, name = at(fields, path)
    del holder[name]
    with pytest.raises(CardError) as caught:
        parse_card(json.dumps(fields))
    # without its prior maps a card is one whose inputs nothing makes
    assert path in ("schema", "priors") or f"card.{path}" in str(caught.value)


@every_object
def test_an_unknown_field_is_named(path):
    fields = copy.deepcopy(FIELDS)
    holder, name = at(fields, path)
    holder[name]["surprise"] = []
    with pytest.raises(CardError, match=rf"card\.{path}\.surprise"):
        parse_card(json.dumps(fields))


def test_an_unknown_field_at_the_top_is_named():
    with pytest.raises(CardError, match=r"unknown field card\.surprise"):
        parse_card(json.dumps(FIELDS | {"surprise": 1}))


@every_path
def test_a_value_of_the_wrong_type_is_named(path):
    holder, name = at(FIELDS, path)
    right = holder[name]
    for wrong in (None, True, 1, 1.5, "text", [], [None], {}, {"a": 1}, float("nan"), 10**400):
        fits = (
            (wrong is None and path in NULLABLE)
            or (type(wrong) is type(right) and type(wrong) in (int, bool, str))
            or (isinstance(right, float) and wrong in (1, 1.5))
            or (path in FREE and wrong == {})
            or (path in ("normalisation", "constants") and wrong == {"a": 1})
            or (path == "why_whole" and wrong == "text")  # which then contradicts patchable
            or (path in OF_ANY_LENGTH and wrong == [])
        )
        if not fits:
            with pytest.raises(CardError) as caught:
                parse_card(changed(path, wrong))
            named = f"card.{path}" in str(caught.value)
            assert named or path == "schema", (wrong, str(caught.value))


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("inputs", [{"name": "local_field_ppm", "unit": "ppm"}], "card.inputs[0].shape"),
        ("output.shape", ["n", 1, "x", "y", 1.5], "card.output.shape[4]"),
        ("geometry.voxel_size_mm", [1, 1], "card.geometry.voxel_size_mm"),
        ("geometry.voxel_size_mm", [1, 1, "1"], "card.geometry.voxel_size_mm[2]"),
        ("verified.shapes", [[64, 64]], "card.verified.shapes[0]"),
        ("priors", [{"name": "a"}], "card.priors[0].method"),
        ("priors", [FIELDS["priors"][0] | {"steps": 1.5}], "card.priors[0].steps"),
        ("priors", [FIELDS["priors"][0] | {"method": "medi"}], "card.priors[0].method"),
        ("memory.onnxruntime", {"fixed_bytes": 1}, "card.memory.onnxruntime.bytes_per_voxel"),
        ("pipeline", "gan", "card.pipeline"),
        ("patchable", "perhaps", "card.patchable"),
        ("precision", "fp8", "card.precision"),
        ("divisor", 2**53 + 1, "card.divisor"),
        ("memory.onnxruntime.fixed_bytes", 10**400, "card.memory.onnxruntime.fixed_bytes"),
        ("network", "\ud800", "card.network"),
        ("licence", "one\nother", "card.licence"),
        ("licence", "µ", "card.licence"),
        ("constants", {"a": 1e39}, "card.constants.a"),
    ],
)
def test_what_is_wrong_deep_inside_is_named(path, value, where):
    with pytest.raises(CardError) as caught:
        parse_card(changed(path, value))
    assert where in str(caught.value)


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_refused_first(schema):
    with pytest.raises(CardError, match=r"this version reads 1; export the model again"):
        parse_card(json.dumps({"schema": schema, "anything": "else"}))


@pytest.mark.parametrize(
    ("pipeline", "constants", "missing"),
    [
        ("lpcnn", (), "alpha, iterations"),
        ("modl", ("step",), "iterations"),
        ("spinet", (), "lambda"),
    ],
)
def test_a_loop_without_its_numbers_is_refused(pipeline, constants, missing):
    grid = ("n", 2, "x", "y", "z")
    card = {"pipeline": pipeline, "priors": (), "patchable": "split"}
    card |= {"constants": dict.fromkeys(constants, 1.0)}
    tensors = {
        "inputs": (TensorInfo("prior_input", "1", grid),),
        "output": TensorInfo("prior_output", "1", grid),
    }
    with pytest.raises(CardError, match=f"pipeline {pipeline} has no {missing}"):
        replace(CARD, **card, **tensors)


def test_a_refusal_is_a_line_that_can_be_read():
    for path, value in (("network", "x\n" * 500), ("divisor", 10**400), ("schema", "\n" * 900)):
        with pytest.raises(CardError) as caught:
            parse_card(changed(path, value))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


def test_a_name_is_there_once_and_can_be_printed():
    for name in ('"schema":1,"schema":1', '"a\\nb":1', '"\\ud800":1'):
        with pytest.raises(CardError, match="a name twice, or of other than printable ASCII"):
            parse_card(CARD.to_json().replace('"schema":1', name))


@pytest.mark.parametrize("text", ["", "{", "not json", "[1]", "1", "null", '"card"', "[" * 100_000])
def test_what_is_no_card_is_refused(text):
    with pytest.raises(CardError, match="the model's card"):
        parse_card(text)


@settings(deadline=None, max_examples=50)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists))
def test_any_other_json_is_refused(value):
    with pytest.raises(CardError):
        parse_card(json.dumps(value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inputs": CARD.inputs[::-1]},
            "total_field_ppm or phase_rad first, the card .'tv'",
        ),
        (
            {"inputs": ()},
            r"total_field_ppm or phase_rad first, the card \[\]",
        ),
        ({"inputs": (*CARD.inputs, CARD.inputs[0])}, "an input twice"),
        ({"pipeline": "lpcnn"}, "takes prior_input first"),
        ({"output": TensorInfo("chi_ppm", "ppb", GRID)}, "chi_ppm in ppb, expected ppm"),
        ({"output": TensorInfo("chi", "ppm", GRID)}, "an unknown tensor chi"),
        ({"output": TensorInfo("chi_ppm", "ppm", ("n", 1, "x", "x", "z"))}, "must have the shape"),
        ({"output": TensorInfo("chi_ppm", "ppm", ("n", "c", "x", "y", "z"))}, "has c channels"),
        ({"inputs": (TensorInfo(FIELD, "ppm", (1,)), *CARD.inputs[1:])}, "is no volume"),
        ({"output": TensorInfo("chi_ppm", "ppm", (1,))}, "chi_ppm, the output, is no volume"),
        ({"patchable": "split"}, "pipeline cnn is patchable: split"),
        ({"patchable": "no"}, "patchable is no, why_whole is None"),
        ({"why_whole": "it is"}, "patchable is yes, why_whole is it is"),
        ({"receptive_field": ReceptiveField(None, None, 1.0)}, "receptive field has no end"),
        ({"priors": ()}, "an unknown tensor rest"),
        ({"pipeline": "after"}, "what is made of a local_field_ppm needs pipeline cnn, and one as"),
        ({"inputs": (PHASE, *CARD.inputs[1:])}, "local_field_ppm needs pipeline cnn, and one as"),
        (
            {"inputs": (PHASE, NOISE), "priors": ()},
            "needs pipeline cnn, and one as the first",
        ),
        ({"priors": (REST, TKD, TV, TV)}, "the prior map tv has a name that is taken"),
        ({"priors": (REST, TKD, replace(TV, name="mask"))}, "the prior map mask has a name that"),
        ({"inputs": CARD.inputs[:3]}, "nothing takes the prior map tv"),
        ({"priors": (TKD, REST, TV)}, "the prior map tkd, tkd, is of rest"),
        ({"priors": (REST, TV, replace(TKD, of="tv"))}, "the prior map tkd, tkd, is of tv"),
        ({"priors": (REST, TKD, replace(TV, of="rest"))}, "the prior map tv, tv, is of rest"),
        ({"priors": (REST, replace(TKD, steps=0), TV)}, "tkd takes 0 steps, expected 1 to 1000"),
        ({"priors": (REST, TKD, replace(TV, steps=1001))}, "tv takes 1001 steps, expected 1 to"),
        ({"priors": (REST, replace(TKD, threshold=None), TV)}, "tkd, tkd, has the threshold None"),
        ({"priors": (REST, TKD, replace(TV, threshold=0.1))}, "tv, tv, has the threshold 0.1"),
        ({"anchor": Anchor("rest", 0.1)}, "the anchor rest is no prior map that the network"),
        ({"anchor": Anchor("mask", 0.1)}, "the anchor mask is no prior map that the network"),
        (
            {"anchor": Anchor("tv", 0.0)},
            r"the anchor has the threshold 0.0, expected in \(0, 2/3\]",
        ),
        ({"priors": (REST, replace(TKD, threshold=0.0), TV)}, r"0.0, expected in \(0, 2/3\]"),
        (
            {"priors": (REST, replace(TKD, threshold=0.7), TV)},
            "tkd has the threshold 0.7, expected",
        ),
        ({"inputs": with_tv(unit="1")}, "tv in 1, expected ppm"),
        ({"inputs": with_tv(shape=(1,))}, "the prior map tv is no volume of one channel"),
        (
            {"inputs": with_tv(shape=("n", 2, "x", "y", "z"))},
            "the prior map tv is no volume of one channel",
        ),
        ({"divisor": 0}, "divisor is 0, expected 1 to 4096"),
        ({"receptive_field": ReceptiveField(-1, -1, 1.0)}, "halo is -1.*field.theoretical is -1"),
        ({"constants": {"mask_erosion_voxels": -1.0}}, "mask_erosion_voxels is -1.0, expected 0"),
        (
            {"constants": {"iterations": 1e300}},
            r"constants.iterations is 1e\+300, expected 1 to 1000",
        ),
        ({"memory": {"openvino": MemoryUse(0, 0)}}, "memory.openvino too small"),
        ({"geometry": GeometryLimits(None, 0.1, None, None)}, "voxel_size_mm and voxel_tolerance"),
        ({"geometry": GeometryLimits(None, None, (0, 0, 1), None)}, "b0_direction and b0_tol"),
        ({"geometry": GeometryLimits((1, 0, 1), 0.1, None, None)}, "expected positive sizes"),
        ({"geometry": GeometryLimits(None, None, (0, 0, 0), 5.0)}, "b0_direction is zero"),
        ({"axes": "LPR"}, "axes are 'LPR', expected three letters such as RAS or LPS"),
        ({"task": "total_field->chi"}, "takes total_field_ppm first and gives .*, not local_field"),
        (
            {"further_outputs": (CHI,)},
            r"gives \('chi_ppm',\), not local_field_ppm and .'chi_ppm', ",
        ),
        (
            {"inputs": (*CARD.inputs, TensorInfo("r2prime_hz", "Hz", GRID))},
            "takes no map besides, not .*'r2prime_hz'",
        ),
        ({"further_outputs": (CHI,), "pipeline": "after"}, "pipeline after gives one output, not"),
        (
            {"task": "phase->chi", "pipeline": "after"},
            "pipeline after is for local_field->chi, not phase->chi",
        ),
        (
            {"tiles": BLOCKS, "divisor": 16},
            r"tiles of \(16, 16, 24\) voxels are no multiples of 16",
        ),
        (
            {"tiles": BLOCKS},
            "tiles are for one graph that runs on nothing else, without prior maps",
        ),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(CardError, match=f"contradictory card: .*{message}.*export the model again"):
        replace(CARD, **changes)
