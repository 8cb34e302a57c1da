"""What a user says of a network of their own: ``card.toml``, or the same as a dict."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qsm_deploy.export.networks.registry import known_networks
from qsm_deploy.kernels.ends import RAS, ends_named
from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.runtime.card.card import TASKS, UNITS, GeometryLimits, PadFront, Tiles
from qsm_deploy.runtime.console.inputs import require_no_pipe
from qsm_deploy.runtime.job.request import PathLike

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same library, before it was taken into Python
    import tomli as tomllib

ANY = "any"
NONE = "none"
NOT_STATED = "not stated"
OF_LOOPS = ("prior_input", "prior_output", "rough_chi_ppm")  # not for a network of one graph
OUTPUTS = tuple(dict.fromkeys(name for *_, given in TASKS.values() for name in given))
MAY_BE_TAKEN = tuple(
    name
    for name in UNITS
    if name not in OF_LOOPS and name not in ("chi_positive_ppm", "chi_negative_ppm")
)
CONSTANTS = ("mask_erosion_voxels", "phase_sign", "field_sign")
SIGNS = ("phase_sign", "field_sign")
# what no default may stand for, each with a line that says it
ASKED = {
    "inputs": 'inputs = ["local_field_ppm", "mask"]',
    "outputs": 'outputs = ["chi_ppm"]',
    "geometry": (
        "geometry = {voxel_size_mm = [1, 1, 1], voxel_tolerance = 0.1, b0_direction = [0, 0, 1], "
        'b0_tolerance_deg = 2}, each "any" without its tolerance'
    ),
    "normalisation": (
        'normalisation = "none", or normalisation.local_field_ppm = {mean = 0.0, std = 0.02} '
        "and so on"
    ),
}
OF_EVERY_NETWORK = ("network", "licence", "doi")
FIELDS = (
    *OF_EVERY_NETWORK,
    *ASKED,
    *("divisor", "why_whole", "axes", "pad_front", "constants", "tiles"),
)


@dataclass(frozen=True)
class Scaling:
    """How a map enters a network, ``(a - mean) / std``, or leaves it, ``y * std + mean``.

    ``masked`` multiplies what enters by the mask; ``at_least`` is the least value of what leaves.
    """

    mean: float
    std: float
    masked: bool = False
    at_least: float | None = None


@dataclass(frozen=True)
class Stated:
    """What a user said; ``None`` is what was not.

    Attributes
    ----------
    where
        The file, for messages.
    inputs
        Names for each argument of ``forward``; several are channels of one.
    normalisation
        By the names of maps; none of them where the network takes and gives them as they are.
    """

    where: str
    network: str | None = None
    licence: str = NOT_STATED
    doi: str | None = None
    inputs: tuple[tuple[str, ...], ...] | None = None
    outputs: tuple[str, ...] | None = None
    geometry: GeometryLimits | None = None
    normalisation: Mapping[str, Scaling] | None = None
    divisor: int | None = None
    why_whole: str | None = None
    axes: str = RAS
    pad_front: PadFront = "ceil"
    constants: Mapping[str, float] = field(default_factory=dict)
    tiles: Tiles | None = None
    fields: frozenset[str] = frozenset()


def stated_in(card: PathLike | Mapping[str, Any] | None) -> Stated:
    """Return what a file of TOML, or a dict of the same fields, says of a network.

    Raises
    ------
    UsageError
        If it cannot be read, or a field is unknown or has a value that it cannot have.
    DataError
        If it is no regular file.
    """
    if card is None:
        return Stated("no card")
    if isinstance(card, Mapping):
        return _stated(_plain(card), "the card")
    path = Path(card)
    require_no_pipe(path)
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--card {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # of TOML, or of UTF-8
        raise UsageError(f"--card {path}: no TOML ({error})") from error
    return _stated(fields, str(path))


def _stated(fields: Mapping[str, Any], where: str) -> Stated:
    table = _Table(fields, where)
    table.require_known(FIELDS)
    found: dict[str, Any] = {}
    for name in ("licence", "doi", "why_whole"):
        if name in fields:
            found[name] = table.text(name)
    if "network" in fields:
        found["network"] = require_name(table.text("network"), where)
    if "inputs" in fields:
        found["inputs"] = _inputs(table)
    if "outputs" in fields:
        found["outputs"] = table.names("outputs", OUTPUTS)
    if "geometry" in fields:
        found["geometry"] = _geometry(table.table("geometry"))
    if "normalisation" in fields:
        found["normalisation"] = _normalisation(table)
    if "divisor" in fields:
        found["divisor"] = table.whole("divisor", 1, 4096)
    if "axes" in fields:
        found["axes"] = table.text("axes")
        try:
            ends_named(found["axes"])
        except GeometryError as error:
            raise UsageError(f"{where}: axes: {error}") from error
    if "pad_front" in fields:
        found["pad_front"] = table.one_of("pad_front", get_args(PadFront))
    if "constants" in fields:
        found["constants"] = _constants(table.table("constants"))
    if "tiles" in fields:
        found["tiles"] = _tiles(table.table("tiles"))
    return Stated(where, **found, fields=frozenset(fields))


def _plain(value: Any) -> Any:
    """Return a value whose arrays and numbers of NumPy are those of Python."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


class _Table:
    """A table of TOML whose values are asked for by kind, and refused by name."""

    def __init__(self, fields: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.fields, self.where, self.prefix = fields, where, prefix

    def wrong(self, name: str, expected: str) -> UsageError:
        seen = repr(self.fields.get(name))
        seen = seen if len(seen) <= 60 else f"{seen[:57]}..."
        return UsageError(f"{self.where}: {self.prefix}{name} is {seen}, expected {expected}")

    def require_known(self, known: Collection[str]) -> None:
        if unknown := sorted(map(str, self.fields.keys() - set(known))):
            raise UsageError(
                f"{self.where}: unknown field {self.prefix}{unknown[0]}; there are "
                f"{', '.join(known)}"
            )

    def table(self, name: str) -> "_Table":
        if not isinstance(self.fields[name], Mapping):
            raise self.wrong(name, "a table")
        return _Table(self.fields[name], self.where, f"{self.prefix}{name}.")

    def text(self, name: str) -> str:
        value = self.fields[name]
        if not (isinstance(value, str) and value and value.isascii() and value.isprintable()):
            raise self.wrong(name, "text of printable ASCII")
        return value

    def one_of(self, name: str, values: Collection[str]) -> Any:
        if self.fields.get(name) not in values:
            raise self.wrong(name, " or ".join(f'"{value}"' for value in values))
        return self.fields[name]

    def names(self, name: str, known: Collection[str]) -> tuple[str, ...]:
        value = self.fields[name]
        if not (isinstance(value, list | tuple) and value and all(n in known for n in value)):
            raise self.wrong(name, f"a list of names out of {', '.join(known)}")
        return tuple(value)

    def number(self, name: str) -> float:
        value = self.fields.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
            raise self.wrong(name, "a number")
        return float(value)

    def whole(self, name: str, least: int, most: int) -> int:
        value = self.fields.get(name)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}")
        return value

    def three(self, name: str, kind: type = float) -> Any:
        value = self.fields.get(name)
        kinds = (int, float) if kind is float else (int,)
        if not (isinstance(value, list | tuple) and len(value) == 3) or not all(
            isinstance(n, kinds) and not isinstance(n, bool) for n in value
        ):
            raise self.wrong(name, f"three {'whole ' if kind is int else ''}numbers")
        return tuple(kind(n) for n in value)


def require_name(name: str, where: str) -> str:
    """Return a name that a network may have.

    Raises
    ------
    UsageError
        If it has letters that not every file may be called, or a network is called so already.
    """
    if not (name.isascii() and all(letter.isalnum() or letter in "-_.+" for letter in name)):
        raise UsageError(
            f"{where}: network is {name!r}, expected a name of letters, digits, - _ . +, as files "
            'get it; say network = "mine" in the card'
        )
    if name in known_networks():
        raise UsageError(
            f"{where}: a network is called {name} already; say another one, network = "
            f'"my-{name}", in the card'
        )
    return name


def _inputs(table: _Table) -> tuple[tuple[str, ...], ...]:
    value = table.fields["inputs"]
    if not isinstance(value, list | tuple) or not value:
        raise table.wrong("inputs", "a list of names, or of lists of those that are channels")
    groups = [list(g) if isinstance(g, list | tuple) else [g] for g in value]
    flat = [name for group in groups for name in group]
    if strange := [name for name in flat if name not in MAY_BE_TAKEN]:
        raise UsageError(
            f"{table.where}: inputs has {strange[0]!r}, expected names out of "
            f"{', '.join(MAY_BE_TAKEN)}"
        )
    if len(set(flat)) < len(flat) or not all(groups):
        raise table.wrong("inputs", "each name once")
    return tuple(map(tuple, groups))


def _geometry(table: _Table) -> GeometryLimits:
    table.require_known(("voxel_size_mm", "voxel_tolerance", "b0_direction", "b0_tolerance_deg"))
    found: list[Any] = []
    for name, tolerance in (
        ("voxel_size_mm", "voxel_tolerance"),
        ("b0_direction", "b0_tolerance_deg"),
    ):
        if table.fields.get(name) == ANY:
            if tolerance in table.fields:
                raise table.wrong(tolerance, f'nothing, as {name} is "{ANY}"')
            found += [None, None]
            continue
        if name not in table.fields:
            raise UsageError(f"{table.where}: geometry has no {name}; say {ASKED['geometry']}")
        value = table.three(name)
        if min(value) <= 0 if name == "voxel_size_mm" else not any(value):
            raise table.wrong(name, f'positive sizes in mm, or a direction, or "{ANY}"')
        if table.number(tolerance) < 0:
            raise table.wrong(tolerance, "a positive number")
        found += [value, table.number(tolerance)]
    return GeometryLimits(*found)


def _normalisation(table: _Table) -> Mapping[str, Scaling]:
    if table.fields["normalisation"] == NONE:
        return {}
    if not isinstance(table.fields["normalisation"], Mapping):
        raise table.wrong("normalisation", f'"{NONE}", or a table for each map')
    tables = table.table("normalisation")
    tables.require_known([*MAY_BE_TAKEN, *(n for n in OUTPUTS if n not in MAY_BE_TAKEN)])
    found = {}
    for name in tables.fields:
        if tables.fields[name] == NONE:
            found[name] = Scaling(0.0, 1.0)
            continue
        of = tables.table(name)
        of.require_known(("mean", "std", "masked", "at_least"))
        if of.number("std") <= 0:
            raise of.wrong("std", "a positive number")
        masked: object = of.fields.get("masked", False)
        if not isinstance(masked, bool):
            raise of.wrong("masked", "true or false")
        least = of.number("at_least") if "at_least" in of.fields else None
        found[name] = Scaling(of.number("mean"), of.number("std"), masked, least)
    return found


def _constants(table: _Table) -> Mapping[str, float]:
    table.require_known(CONSTANTS)
    found = {name: table.number(name) for name in table.fields}
    for name in SIGNS:
        if name in found and abs(found[name]) != 1:
            raise table.wrong(name, "1 or -1")
    if not 0 <= found.get("mask_erosion_voxels", 0) <= 4096:
        raise table.wrong("mask_erosion_voxels", "0 to 4096")
    return found


def _tiles(table: _Table) -> Tiles:
    table.require_known(("size", "kept", "stride", "beyond", "blend"))
    size: tuple[int, int, int] = table.three("size", int)
    beyond: Literal["zero", "edge"] = table.one_of("beyond", ("zero", "edge"))
    blend: Literal["none", "mean", "ramp"] = table.one_of("blend", ("none", "mean", "ramp"))
    kept, stride = table.three("kept", int), table.three("stride", int)
    tiles = Tiles(size, kept, stride, beyond, blend)
    if found := next(tiles.contradictions(), None):
        raise UsageError(f"{table.where}: {found}")
    return tiles


def require_asked(stated: Stated, read: Collection[str] = ()) -> None:
    """Refuse a card that leaves out what nothing but its author knows.

    Parameters
    ----------
    stated
        What it says.
    read
        What was read off the network itself.

    Raises
    ------
    UsageError
        If something is missing: one message names all of it, with a line for each.
    """
    if missing := [n for n in ASKED if getattr(stated, n) is None and n not in read]:
        lines = "; ".join(f"{name}: {ASKED[name]}" for name in missing)
        raise UsageError(
            f"{stated.where}: a file for --card must say what cannot be read off the network: "
            f"{lines}"
        )
