"""The model card: what a model file needs to say about itself to be run rightly.

Canonical JSON, under 4000 bytes, in the ONNX metadata under ``qsm_deploy.card`` and in a
``.json`` file beside the model for people. The parser is strict: an unknown or missing field, or
fields that contradict each other, is an error.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from qsm_deploy.kernels.errors import CardError

METADATA_KEY = "qsm_deploy.card"
SCHEMA = 1
MAX_BYTES = 4000


@dataclass(frozen=True)
class TensorInfo:
    """One input or output: its name, unit, and shape with free axes as letters."""

    name: str
    unit: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ReceptiveField:
    """How far an output voxel sees.

    ``theoretical`` is in voxels to each side, from the layers; ``halo`` is the distance within
    which the share ``energy_kept`` of the input gradient's energy lies, measured on a phantom.
    """

    theoretical: int
    halo: int
    energy_kept: float


@dataclass(frozen=True)
class GeometryLimits:
    """The grids a network was trained for; ``None`` as value means any, with no tolerance."""

    voxel_size_mm: tuple[float, float, float] | None
    voxel_tolerance: float | None
    b0_direction: tuple[float, float, float] | None
    b0_tolerance_deg: float | None


@dataclass(frozen=True)
class TkdSettings:
    """How the runtime makes the ``tkd_chi_ppm`` input of a ``tkd+cnn`` pipeline."""

    threshold: float
    pad_voxels: int
    masked: bool


@dataclass(frozen=True)
class MemoryUse:
    """Peak memory of one inference, ``fixed_bytes + bytes_per_voxel * voxels``, as measured."""

    fixed_bytes: int
    bytes_per_voxel: int


@dataclass(frozen=True)
class Verification:
    """The largest in-mask difference from the reference [ppb], and the shapes it was seen on."""

    reference: str
    max_ppb: float
    shapes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ModelCard:
    """Everything the runtime knows about a model besides its graph."""

    schema: int
    network: str
    task: str
    pipeline: Literal["cnn", "tkd+cnn"]
    inputs: tuple[TensorInfo, ...]
    output: TensorInfo
    divisor: int
    patchable: Literal["yes", "no"]
    receptive_field: ReceptiveField
    geometry: GeometryLimits
    tkd: TkdSettings | None
    options: dict[str, str]
    precision: Literal["fp32"]
    memory: dict[str, MemoryUse]
    verified: Verification
    weights_sha256: str
    licence: str
    doi: str | None
    made_by: str

    def __post_init__(self) -> None:
        if found := "; ".join(self._contradictions()):
            raise CardError(f"contradictory card: {found}; export the model again")

    def _contradictions(self) -> Iterator[str]:
        names = [tensor.name for tensor in self.inputs]
        expected = ["local_field_ppm"] + ["tkd_chi_ppm"] * (self.pipeline == "tkd+cnn")
        if names != expected:
            yield f"pipeline {self.pipeline} needs the inputs {expected}, the card lists {names}"
        if (self.tkd is not None) != (self.pipeline == "tkd+cnn"):
            has = "has no" if self.tkd is None else "has"
            yield f"pipeline {self.pipeline} {has} tkd settings"
        if self.tkd is not None and not 0 < self.tkd.threshold <= 2 / 3:
            yield f"tkd.threshold is {self.tkd.threshold}, expected in (0, 2/3]"
        limits = self.geometry
        if (limits.voxel_size_mm is None) != (limits.voxel_tolerance is None):
            yield "one of geometry.voxel_size_mm and voxel_tolerance is null, expected both or none"
        if (limits.b0_direction is None) != (limits.b0_tolerance_deg is None):
            yield "one of geometry.b0_direction and b0_tolerance_deg is null, expected both or none"
        if limits.voxel_size_mm is not None and min(limits.voxel_size_mm) <= 0:
            yield f"geometry.voxel_size_mm is {limits.voxel_size_mm}, expected positive sizes"
        if limits.b0_direction is not None and not any(limits.b0_direction):
            yield "geometry.b0_direction is zero"
        units = {tensor.name: tensor.unit for tensor in (*self.inputs, self.output)}
        if others := {name: unit for name, unit in units.items() if unit != "ppm"}:
            yield f"units other than ppm: {others}"
        if any(t.shape[:2] != ("n", 1) or len(t.shape) != 5 for t in (*self.inputs, self.output)):
            yield "tensors must have the shape (n, 1, x, y, z)"
        field = self.receptive_field
        if not 0 <= field.energy_kept <= 1:
            yield f"receptive_field.energy_kept is {field.energy_kept}, expected a share"
        counts: dict[str, float] = {
            f"memory.{name}": min(use.fixed_bytes, use.bytes_per_voxel - 1)
            for name, use in self.memory.items()
        }
        counts |= {
            "divisor": self.divisor - 1,
            "tkd.pad_voxels": self.tkd.pad_voxels if self.tkd else 0,
            "geometry.voxel_tolerance": limits.voxel_tolerance or 0,
            "geometry.b0_tolerance_deg": limits.b0_tolerance_deg or 0,
            "receptive_field.halo": field.halo,
            "receptive_field.theoretical": field.theoretical,
        }
        if below := [name for name, at_least_zero in counts.items() if at_least_zero < 0]:
            yield f"{', '.join(below)} too small"

    def to_json(self) -> str:
        """Return the canonical form: sorted keys, no spaces, ASCII.

        Raises
        ------
        CardError
            If it exceeds 4000 bytes.
        """
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        if len(text) > MAX_BYTES:
            raise CardError(f"the card takes {len(text)} bytes, at most {MAX_BYTES} fit")
        return text


def parse_card(text: str) -> ModelCard:
    """Return the card that ``text`` holds.

    Raises
    ------
    CardError
        If it is not a card of this schema, word for word.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CardError(f"the model's card is not JSON ({error}); export the model again") from None
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        seen = fields.get("schema") if isinstance(fields, dict) else type(fields).__name__
        raise CardError(
            f"the model's card has schema {seen}, this version reads {SCHEMA}; "
            "export the model again with this version"
        )
    return cast(ModelCard, _parse(ModelCard, fields, "card"))


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotated type ``kind``; refuse everything else by name."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        hints = get_type_hints(kind)
        if missing := hints.keys() - value.keys():
            raise CardError(
                f"the model's card lacks {where}.{min(missing)}; export the model again"
            )
        if unknown := value.keys() - hints.keys():
            raise CardError(f"the model's card has an unknown field {where}.{min(unknown)}")
        return cast(Any, kind)(
            **{name: _parse(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
        )
    if origin is Literal:
        if value not in arguments:
            raise _mismatch(where, " or ".join(map(str, arguments)), value)
        return value
    if origin is UnionType:
        if value is None and NoneType in arguments:
            return None
        plain = [a for a in arguments if a is not NoneType]
        if len(plain) == 1:
            return _parse(plain[0], value, where)
        return _parse(next((a for a in plain if type(value) is a), plain[0]), value, where)
    if origin is tuple:
        fixed = arguments[-1] is not Ellipsis
        if not isinstance(value, list) or (fixed and len(value) != len(arguments)):
            raise _mismatch(where, f"a list{f' of {len(arguments)}' if fixed else ''}", value)
        kinds = arguments if fixed else (arguments[0],) * len(value)
        return tuple(
            _parse(k, v, f"{where}[{n}]") for n, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {k: _parse(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, str) and type(value) is kind:
        return value
    raise _mismatch(where, kind.__name__, value)


def _mismatch(where: str, expected: str, value: Any) -> CardError:
    return CardError(f"the model's card has {where} = {value!r}, expected {expected}")
