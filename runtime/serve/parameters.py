"""What a host may ask for in its JSON; every value may arrive as text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.methods.method import METHODS
from qsm_deploy.runtime.scan.unit_names import SCALES, UNITS, FieldUnit, unit_named
from qsm_deploy.runtime.sessions.bundled import BUNDLED

Config = Literal["qsm", "dipole"]

CONFIGS: tuple[Config, ...] = get_args(Config)
TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
AUTO = "auto"
# what makes a map of one field
ONE_FIELD = (*(name for name, row in METHODS.items() if 1 in row.field_counts), *BUNDLED)


@dataclass(frozen=True)
class Parameters:
    """The parameters of a session.

    Attributes
    ----------
    config
        The reconstruction; ``None`` is the one named by the configuration message.
    send_original
        Whether the images that came go back too; after an error they always do.
    method
        What makes the map; ``None`` is what the server was started with.
    units
        Of a local field.
    phase_scale
        ``auto``, or what the values of phase images mean.
    negate
        Whether the phase falls, or the field is negative, where B0 is higher.
    unknown
        Names without meaning here.
    """

    config: Config | None = None
    send_original: bool = True
    method: str | None = None
    units: FieldUnit | None = None
    phase_scale: str = AUTO
    negate: bool = False
    unknown: tuple[str, ...] = ()


def parameters_from(values: Mapping[str, Any]) -> Parameters:
    """Return the parameters in a host's JSON; null and empty ones were not given.

    Raises
    ------
    UsageError
        If a value is none of those allowed, or one was given twice.
    """
    known = {"config", "customconfig", "sendoriginal", "method", "units", "phasescale", "negate"}
    given: dict[str, str] = {}
    for name, value in values.items():
        text = "" if value is None else str(value).strip()
        key = name.lower()
        if key in known and text and given.setdefault(key, text) != text:
            raise UsageError(f"the parameter {key} is {given[key]!r} and {text!r}; send one")
    config = given.get("customconfig", given.get("config"))
    method = _choice(given, "method", (AUTO, *ONE_FIELD))
    return Parameters(
        config=None if config is None else require_config(config),
        send_original=_flag(given, "sendoriginal", default=True),
        method=None if method == AUTO else method,
        units=_units(given),
        phase_scale=_choice(given, "phasescale", (AUTO, *SCALES)) or AUTO,
        negate=_flag(given, "negate", default=False),
        unknown=tuple(sorted(name for name in values if name.lower() not in known)),
    )


def require_config(name: str) -> Config:
    """Return a configuration by name.

    Raises
    ------
    UsageError
        If there is none of that name.
    """
    if name not in CONFIGS:
        raise UsageError(f"no configuration {name[:80]!r}; this server has {' and '.join(CONFIGS)}")
    return name


def _choice(given: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str | None:
    value = given.get(name)
    if value is not None and value.lower() not in choices:
        raise UsageError(f"the parameter {name} is {value[:80]!r}; it may be {', '.join(choices)}")
    return None if value is None else value.lower()


def _units(given: Mapping[str, str]) -> FieldUnit | None:
    unit = unit_named(given.get("units", ""))
    return unit or cast(FieldUnit | None, _choice(given, "units", UNITS))


def _flag(given: Mapping[str, str], name: str, *, default: bool) -> bool:
    value = given.get(name, str(default)).lower()
    if value not in TRUE | FALSE:
        raise UsageError(f"the parameter {name} is {value[:80]!r}; it may be True or False")
    return value in TRUE
