"""What a Siemens OpenRecon image says about itself."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.scan.unit_names import SCALES
from qsm_deploy.runtime.serve.limits import PORT
from qsm_deploy.runtime.serve.openrecon.schema import REGULATORY, Json, label_faults
from qsm_deploy.runtime.serve.parameters import AUTO, ONE_FIELD

SCHEMA_VERSION = "1.1.0"
LABEL_NAME = f"com.siemens-healthineers.magneticresonance.openrecon.metadata:{SCHEMA_VERSION}"
VENDOR, NAME = "qsmdeploy", "qsm"
MEMORY_MB, CORES = 8192, 4


def openrecon_label(version: str, maker: str) -> Json:
    """Return the description of an image with this server and a network or method.

    Parameters
    ----------
    version
        Of this package, ``major.minor.patch``.
    maker
        Its name, for people.
    """
    about = f"Susceptibility maps [ppb] of multi-echo phase and magnitude by {maker}"
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
            _choice("method", "Method", (AUTO, *ONE_FIELD), f"Makes the map; auto is {maker}."),
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


def _choice(name: str, label: str, values: tuple[str, ...], about: str) -> Json:
    choices = [{"id": value, "name": {"en": value}} for value in values]
    rest = {"values": choices, "default": values[0], "information": {"en": about}}
    return {"id": name, "label": {"en": label}, "type": "choice", **rest}


def _flag(name: str, label: str, default: bool, about: str) -> Json:
    rest = {"default": default, "information": {"en": about}}
    return {"id": name, "label": {"en": label}, "type": "boolean", **rest}
