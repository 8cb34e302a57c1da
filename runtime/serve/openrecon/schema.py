"""The rules of OpenReconSchema 1.1.0, which the label of an image must keep."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

Json = dict[str, Any]

MOST_PARAMETERS = 14
CHOICES = {
    "emitter": ("raw", "image"),
    "injector": ("compleximage", "image"),
    "content_qualification_type": ("PRODUCT", "SERVICE", "RESEARCH"),
}
LEAST = {
    "port": -math.inf,
    "min_count_required_gpus": 0,
    "min_required_gpu_memory": 0,
    "min_required_memory": 0,
    "min_count_required_cpu_cores": 1,
}
FLAGS = ("can_process_adjustment_data", "can_use_gpu", "require_readout_filter_off")
OPTIONAL = {
    "content_qualification_type",
    "can_process_adjustment_data",
    "require_readout_filter_off",
    "min_count_required_gpus",
    "min_required_gpu_memory",
}
REGULATORY = (
    "device_trade_name",
    "production_identifier",
    "manufacturer_address",
    "made_in",
    "manufacture_date",
    "material_number",
    "gtin",
    "udi",
    "safety_advices",
    "special_operating_instructions",
    "additional_relevant_information",
)
# what a parameter of each type has besides id, type, label and information
PARAMETER_FIELDS: dict[str, set[str]] = {
    "boolean": {"default"},
    "string": {"default", "isLargeText"},
    "choice": {"default", "values"},
    "int": {"default", "minimum", "maximum", "unit"},
    "double": {"default", "minimum", "maximum", "unit"},
}
LARGEST_INT = 2**31
PARAMETER_ID = re.compile(r"[A-Za-z0-9]+")
NUMBER = r"(0|[1-9]\d*)"
SEMANTIC_VERSION = re.compile(rf"{NUMBER}\.{NUMBER}\.{NUMBER}([-+][0-9A-Za-z.+-]+)?")


def label_faults(label: Mapping[str, Any]) -> Iterator[str]:
    """Yield what breaks the rules of OpenReconSchema 1.1.0, or of hosts beyond it.

    This server neither uses nor writes ``channel_compression`` and ``license_string``, which the
    schema allows; here they are faults.
    """
    for part, kind in (("general", dict), ("reconstruction", dict), ("parameters", list)):
        if not isinstance(label.get(part), kind):
            yield f"{part} is missing"
            return
    if more := label.keys() - {"general", "reconstruction", "parameters"}:
        yield f"{min(more)} is unknown"
    yield from _general_faults(label["general"])
    yield from _reconstruction_faults(label["reconstruction"])
    yield from _parameter_faults(label["parameters"])


def _general_faults(general: Json) -> Iterator[str]:
    texts, english = {"version", "vendor", "id"}, {"name", "information"}
    yield from (f"general.{n} is no text" for n in texts if not isinstance(general.get(n), str))
    yield from (f"general.{n}.en is no text" for n in english if not _english(general.get(n)))
    if more := general.keys() - texts - english - {"regulatory_information"}:
        yield f"general.{min(more)} is unknown"
    if not SEMANTIC_VERSION.fullmatch(str(general.get("version"))):
        yield f"general.version {general.get('version')!r} is not major.minor.patch"
    regulatory = general.get("regulatory_information")
    if not isinstance(regulatory, dict) or regulatory.keys() != set(REGULATORY):
        yield f"general.regulatory_information has not just {', '.join(REGULATORY)}"
    elif not all(isinstance(value, str) for value in regulatory.values()):
        yield "general.regulatory_information is not all text"


def _reconstruction_faults(reconstruction: Json) -> Iterator[str]:
    known = {"transfer_protocol", *CHOICES, *LEAST, *FLAGS}
    if more := reconstruction.keys() - known:
        yield f"reconstruction.{min(more)} is unknown"
    if lacking := known - OPTIONAL - {"require_readout_filter_off"} - reconstruction.keys():
        yield f"reconstruction.{min(lacking)} is missing"
    for name, value in reconstruction.items():
        wrong = f"reconstruction.{name} is {value!r}"
        if name == "transfer_protocol" and value != {"protocol": "ISMRMRD", "version": "1.4.1"}:
            yield wrong
        elif name in CHOICES and value not in CHOICES[name]:
            yield f"{wrong}, not one of {', '.join(CHOICES[name])}"
        elif name in LEAST and not (_whole(value) and value >= LEAST[name]):
            yield f"{wrong}, not a whole number from {LEAST[name]}"
        elif name in FLAGS and not isinstance(value, bool):
            yield f"{wrong}, not true or false"


def _parameter_faults(parameters: list[Any]) -> Iterator[str]:
    if len(parameters) > MOST_PARAMETERS:
        yield f"{len(parameters)} parameters, at most {MOST_PARAMETERS} are allowed"
    if not all(isinstance(parameter, dict) for parameter in parameters):
        yield "a parameter is no object"
        return
    names = [parameter.get("id") for parameter in parameters]
    if len(set(map(str, names))) < len(names):
        yield "two parameters of the same id"
    if [p.get("type") for p in parameters if p.get("id") == "config"] != ["choice"]:
        yield "there must be one parameter config of type choice"
    for name, parameter in zip(names, parameters, strict=True):
        if not isinstance(name, str) or not PARAMETER_ID.fullmatch(name):
            yield f"the parameter id {name!r} is not of letters and digits"
        yield from _value_faults(str(name), parameter)


def _value_faults(name: str, parameter: Json) -> Iterator[str]:
    kind = parameter.get("type")
    if not isinstance(kind, str) or kind not in PARAMETER_FIELDS:
        yield f"{name}.type is {kind!r}, not one of {', '.join(PARAMETER_FIELDS)}"
        return
    fields = PARAMETER_FIELDS[kind]
    if more := parameter.keys() - fields - {"id", "type", "label", "information"}:
        yield f"{name}.{min(more)} is unknown"
    if lacking := fields - parameter.keys() - {"unit", "isLargeText"}:
        yield f"{name}.{min(lacking)} is missing"
        return
    if not _english(parameter.get("label")):
        yield f"{name}.label.en is no text"
    if not _english(parameter.get("information", {"en": ""})):
        yield f"{name}.information.en is no text"
    default = parameter["default"]
    if kind == "boolean" and not isinstance(default, bool):
        yield f"{name}.default {default!r} is not true or false"
    elif kind == "string" and not isinstance(default, str):
        yield f"{name}.default {default!r} is no text"
    elif kind == "choice" and default not in _choice_ids(parameter["values"]):
        yield f"{name}.default {default!r} is not among its values"
    elif kind in ("int", "double"):
        yield from _number_faults(name, parameter)


def _number_faults(name: str, parameter: Json) -> Iterator[str]:
    low, default, high = (parameter[n] for n in ("minimum", "default", "maximum"))
    for value in (low, default, high):
        whole = _whole(value) and abs(value) <= LARGEST_INT
        tenths = isinstance(value, int | float) and math.isclose(value * 10, round(value * 10))
        if not (whole if parameter["type"] == "int" else tenths and not isinstance(value, bool)):
            yield f"{name} has {value!r}, not a {parameter['type']} (a double is in steps of 0.1)"
            return
    if not low <= default <= high:
        yield f"{name}.default {default} is not within {low} to {high}"
    unit = parameter.get("unit", {"en": "-"})
    if not _english(unit) or not 1 <= len(unit["en"]) <= 3:
        yield f"{name}.unit.en is not of one to three letters"


def _choice_ids(values: Any) -> list[str]:
    """Return the ids of a choice; none if one is malformed."""
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        return []
    well = all(v.keys() == {"id", "name"} and isinstance(v["id"], str) for v in values)
    return [v["id"] for v in values] if well and all(_english(v["name"]) for v in values) else []


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _english(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("en"), str)
