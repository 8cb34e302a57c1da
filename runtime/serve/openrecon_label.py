"""What a Siemens OpenRecon image says about itself, and the rules that it must keep."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.serve.limits import PORT
from qsm_deploy.runtime.serve.parameters import AUTO
from qsm_deploy.runtime.local_field.phase_scale import SCALES

Json = dict[str, Any]

SCHEMA_VERSION = "1.1.0"
LABEL_NAME = f"com.siemens-healthineers.magneticresonance.openrecon.metadata:{SCHEMA_VERSION}"
VENDOR, NAME = "qsmdeploy", "qsm"
MEMORY_MB, CORES = 8192, 4

MOST_PARAMETERS = 14
TYPES = {
    "emitter": ("raw", "image"),
    "injector": ("compleximage", "image"),
    "content_qualification_type": ("PRODUCT", "SERVICE", "RESEARCH"),
}
COUNTS = (
    "port",
    "min_count_required_gpus",
    "min_required_gpu_memory",
    "min_required_memory",
    "min_count_required_cpu_cores",
)
FLAGS = ("can_process_adjustment_data", "can_use_gpu")
GENERAL = ("version", "vendor", "id")
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
PARAMETER_TYPES = ("boolean", "string", "choice", "int", "double")
PARAMETER_ID = re.compile(r"[A-Za-z0-9]+")
SEMANTIC_VERSION = re.compile(r"\d+\.\d+\.\d+")


def openrecon_label(version: str, network: str) -> Json:
    """Return the description of an image with this server and a network.

    Parameters
    ----------
    version
        Of this package, ``major.minor.patch``.
    network
        Its name, for people.
    """
    about = f"Susceptibility maps [ppb] of multi-echo phase and magnitude by {network}"
    return {
        "general": {
            "name": {"en": NAME},
            "version": version,
            "vendor": VENDOR,
            "information": {"en": about},
            "id": NAME,
            "regulatory_information": dict.fromkeys(REGULATORY, "")
            | {
                "device_trade_name": NAME,
                "production_identifier": version,
                "material_number": f"{NAME}_{version}",
                "safety_advices": "Research only; not a medical device",
            },
        },
        "reconstruction": {
            "transfer_protocol": {"protocol": "ISMRMRD", "version": "1.4.1"},
            "port": PORT,
            "emitter": "image",
            "injector": "image",
            "can_process_adjustment_data": False,
            "can_use_gpu": False,
            "min_count_required_gpus": 0,
            "min_required_gpu_memory": 0,
            "min_required_memory": MEMORY_MB,
            "min_count_required_cpu_cores": CORES,
            "content_qualification_type": "RESEARCH",
        },
        "parameters": [
            _choice("config", "Reconstruction", ("qsm",), "Phase and magnitude in, chi out."),
            _flag("sendoriginal", "Send originals", True, "Send the source images back too."),
            _choice(
                "phasescale",
                "Phase scale",
                (AUTO, *SCALES),
                "What the values of phase images mean; auto tells it from their range.",
            ),
            _flag("negate", "Negate phase", False, "The phase falls where B0 is higher."),
        ],
    }


def encoded_label(label: Mapping[str, Any]) -> str:
    """Return the value of the Docker label: the JSON in base64.

    Raises
    ------
    UsageError
        If the JSON breaks a rule of the schema.
    """
    if found := "; ".join(label_faults(label)):
        raise UsageError(f"the OpenRecon JSON breaks the schema: {found}")
    return base64.b64encode(json.dumps(label, indent=2).encode()).decode()


def label_faults(label: Mapping[str, Any]) -> Iterator[str]:
    """Yield what breaks the rules of OpenReconSchema 1.1.0."""
    for part, kind in (("general", dict), ("reconstruction", dict), ("parameters", list)):
        if not isinstance(label.get(part), kind):
            yield f"{part} is missing"
            return
    yield from _general_faults(label["general"])
    yield from _reconstruction_faults(label["reconstruction"])
    yield from _parameter_faults(label["parameters"])


def _general_faults(general: Mapping[str, Any]) -> Iterator[str]:
    for name in ("name", "information"):
        if not _english(general.get(name)):
            yield f"general.{name}.en is no text"
    for name in GENERAL:
        if not isinstance(general.get(name), str) or not general[name]:
            yield f"general.{name} is no text"
    if not SEMANTIC_VERSION.fullmatch(str(general.get("version"))):
        yield f"general.version {general.get('version')!r} is not major.minor.patch"
    regulatory = general.get("regulatory_information")
    for name in REGULATORY:
        if not isinstance(regulatory, dict) or not isinstance(regulatory.get(name), str):
            yield f"general.regulatory_information.{name} is no text"


def _reconstruction_faults(reconstruction: Mapping[str, Any]) -> Iterator[str]:
    protocol = reconstruction.get("transfer_protocol")
    if protocol != {"protocol": "ISMRMRD", "version": "1.4.1"}:
        yield f"reconstruction.transfer_protocol is {protocol}"
    for name, allowed in TYPES.items():
        if reconstruction.get(name) not in allowed:
            yield f"reconstruction.{name} must be one of {', '.join(allowed)}"
    for name in COUNTS:
        if type(reconstruction.get(name)) is not int or reconstruction[name] < 0:
            yield f"reconstruction.{name} is not a whole number"
    for name in FLAGS:
        if not isinstance(reconstruction.get(name), bool):
            yield f"reconstruction.{name} is not true or false"


def _parameter_faults(parameters: list[Any]) -> Iterator[str]:
    if len(parameters) > MOST_PARAMETERS:
        yield f"{len(parameters)} parameters, at most {MOST_PARAMETERS} are allowed"
    names = [p.get("id") if isinstance(p, dict) else None for p in parameters]
    if len(set(map(str, names))) < len(names):
        yield "two parameters of the same id"
    configs = [p for p in parameters if isinstance(p, dict) and p.get("id") == "config"]
    if [p.get("type") for p in configs] != ["choice"]:
        yield "there must be one parameter config of type choice"
    for name, parameter in zip(names, parameters, strict=True):
        if not PARAMETER_ID.fullmatch(str(name)):
            yield f"the parameter id {name!r} is not of letters and digits"
        if isinstance(parameter, dict):
            yield from _value_faults(str(name), parameter)


def _value_faults(name: str, parameter: Mapping[str, Any]) -> Iterator[str]:
    kind, default = parameter.get("type"), parameter.get("default")
    if not _english(parameter.get("label")):
        yield f"{name}.label.en is no text"
    unit = parameter.get("unit", {"en": ""})
    if not isinstance(unit, dict) or len(str(unit.get("en", ""))) > 3:
        yield f"{name}.unit.en is longer than three letters"
    if kind not in PARAMETER_TYPES:
        yield f"{name}.type is {kind!r}, not one of {', '.join(PARAMETER_TYPES)}"
    elif kind == "choice":
        values = parameter.get("values")
        ids = [v.get("id") for v in values] if isinstance(values, list) else []
        if default not in ids:
            yield f"{name}.default {default!r} is not among its values"
    elif kind in ("int", "double"):
        low, high = parameter.get("minimum"), parameter.get("maximum")
        if not isinstance(default, int | float) or isinstance(default, bool):
            yield f"{name}.default {default!r} is no number"
        elif (low is not None and default < low) or (high is not None and default > high):
            yield f"{name}.default {default!r} is not within {low} to {high}"
        elif kind == "double" and abs(round(default * 10) - default * 10) > 1e-9:
            yield f"{name}.default {default!r} is not a multiple of 0.1"
    elif not isinstance(default, bool if kind == "boolean" else str):
        yield f"{name}.default {default!r} is no {kind}"


def _english(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("en"), str) and bool(value["en"])


def _choice(name: str, label: str, values: tuple[str, ...], about: str) -> Json:
    choices = [{"id": value, "name": {"en": value}} for value in values]
    rest = {"values": choices, "default": values[0], "information": {"en": about}}
    return {"id": name, "label": {"en": label}, "type": "choice", **rest}


def _flag(name: str, label: str, default: bool, about: str) -> Json:
    rest = {"default": default, "information": {"en": about}}
    return {"id": name, "label": {"en": label}, "type": "boolean", **rest}
