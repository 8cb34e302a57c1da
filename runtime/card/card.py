"""The model card: what a model file needs to say about itself to be run rightly.

Canonical JSON, under 4000 bytes, in the ONNX metadata under ``qsm_deploy.card`` and in a
``.json`` file beside the model for people. The parser is strict: an unknown or missing field, or
fields that contradict each other, is an error. A field with a default may be absent, and is where
it is the default: it came later, and readers from before it would refuse it.
"""

import dataclasses
import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from qsm_deploy.kernels.ends import RAS, ends_named
from qsm_deploy.kernels.errors import CardError, GeometryError

METADATA_KEY = "qsm_deploy.card"
SCHEMA = 1
MAX_BYTES = 4000
MOST = 2**53  # of a whole number: those that every JSON parser keeps
LARGEST = (2 - 2**-23) * 2.0**127  # of any number: that of float32, which networks compute in
RANGES: dict[str, tuple[float, float]] = {  # of what is there; runtime/c/card_check.cpp repeats it
    "divisor": (1, 4096),
    "receptive_field.halo": (0, 4096),
    "receptive_field.theoretical": (0, 4096),
    "receptive_field.energy_kept": (0, 1),
    "geometry.voxel_tolerance": (0, LARGEST),
    "geometry.b0_tolerance_deg": (0, LARGEST),
    "constants.mask_erosion_voxels": (0, 4096),
    "constants.iterations": (1, 1000),
    "constants.cg_steps": (1, 1000),
}
MOST_ORIENTATIONS = 3
MOST_ECHOES = 64
MOST_TILE = 4096  # voxels a side

Pipeline = Literal["cnn", "lpcnn", "modl", "spinet", "nextqsm", "after"]
Task = Literal[
    "local_field->chi",
    "total_field->chi",
    "phase->chi",
    "total_field->local_field",
    "phase->local_field",
    "local_field+chi+r2prime->chi_positive+chi_negative",
]
TileBlend = Literal["none", "mean", "ramp"]
PadFront = Literal["ceil", "floor", "none"]  # of what is missing to the divisor
GraphPrecision = Literal["fp32", "fp16", "bf16", "int8"]
# what a graph may take and give besides prior maps, and its unit
UNITS = {
    "local_field_ppm": "ppm",
    "total_field_ppm": "ppm",
    "phase_rad": "rad",
    "r2prime_hz": "Hz",
    "mask": "1",
    "field_noise_ppm": "ppm",
    "voxel_size_mm": "mm",
    "b0_direction": "1",
    "echo_time_s": "s",
    "field_strength_t": "T",
    "prior_input": "1",
    "rough_chi_ppm": "ppm",
    "prior_output": "1",
    "chi_ppm": "ppm",
    "chi_positive_ppm": "ppm",
    "chi_negative_ppm": "ppm",
}
# what a network of one graph takes first, takes besides, and gives
TASKS: dict[Task, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "local_field->chi": ("local_field_ppm", (), ("chi_ppm",)),
    "total_field->chi": ("total_field_ppm", (), ("chi_ppm",)),
    "phase->chi": ("phase_rad", (), ("chi_ppm",)),
    "total_field->local_field": ("total_field_ppm", (), ("local_field_ppm",)),
    "phase->local_field": ("phase_rad", (), ("local_field_ppm",)),
    "local_field+chi+r2prime->chi_positive+chi_negative": (
        "local_field_ppm",
        ("chi_ppm", "r2prime_hz"),
        ("chi_positive_ppm", "chi_negative_ppm"),
    ),
}
CHI_OF_FIELD: Task = "local_field->chi"  # all that pipelines other than cnn are for
MAPS_TAKEN = ("chi_ppm", "r2prime_hz")  # volumes besides the first input that are no prior maps
# what the loops around the unrolled ones compute with
LOOPS: dict[Pipeline, tuple[str, ...]] = {
    "lpcnn": ("alpha", "iterations", "chi_mean", "chi_std"),
    "modl": ("step", "iterations", "chi_mean", "chi_std", "field_mean", "field_std"),
    "spinet": ("lambda", "p", "iterations", "cg_steps", "chi_mean", "chi_std"),
    "nextqsm": ("iterations", "lambda_1"),
}
UNROLLED = tuple(LOOPS)
FIELD = "local_field_ppm"
TV_MAPS = ("tv", "tv_field", "tv_residual")  # methods of prior maps
FIELDS = TV_MAPS[1:]  # those that give a field
MOST_STEPS = 1000  # of a prior map
# what the first input of each pipeline may be
FIRST_INPUTS: dict[Pipeline, tuple[str, ...]] = {
    "cnn": ("local_field_ppm", "total_field_ppm", "phase_rad"),
    "lpcnn": ("prior_input",),
    "modl": ("prior_input",),
    "spinet": ("prior_input",),
    "nextqsm": ("prior_input",),
    "after": ("local_field_ppm", "rough_chi_ppm"),
}


@dataclass(frozen=True)
class TensorInfo:
    """One input or output: its name, unit, and shape with free axes as letters."""

    name: str
    unit: str
    shape: tuple[int | str, ...]

    @property
    def is_volume(self) -> bool:
        """Whether it has a value for every voxel, as (n, c, x, y, z)."""
        return len(self.shape) == 5


@dataclass(frozen=True)
class ReceptiveField:
    """How far an output voxel sees.

    ``theoretical`` is in voxels to each side, from the layers; ``halo`` is the distance within
    which the share ``energy_kept`` of the input gradient's energy lies, measured on a phantom.
    Both are ``None`` where every voxel sees the whole volume.
    """

    theoretical: int | None
    halo: int | None
    energy_kept: float


@dataclass(frozen=True)
class GeometryLimits:
    """The grids a network was trained for; ``None`` as value means any, with no tolerance."""

    voxel_size_mm: tuple[float, float, float] | None
    voxel_tolerance: float | None
    b0_direction: tuple[float, float, float] | None
    b0_tolerance_deg: float | None


@dataclass(frozen=True)
class PriorMap:
    """A map that the runtime makes of the whole volume, for the input of that name.

    ``of`` is the field, or a prior map before it. ``tkd`` takes so many steps of
    ``x += M TKD(M (f - D x))``, dividing by ``threshold`` at least. The others are what total
    variation makes of the field in so many steps: its map, the field without what its sources
    outside the mask explain, and what its map leaves unexplained.
    """

    name: str
    method: Literal["tkd", "tv", "tv_field", "tv_residual"]
    of: str
    steps: int
    threshold: float | None = None


@dataclass(frozen=True)
class Anchor:
    """What the map ``y`` of a network keeps of a prior map ``p``: what lies next to the magic cone.

    There the field says nothing of the sources, and what a network adds are streaks. The map is
    ``p + M (D TKD)^2 (y - p)``, where ``D TKD`` lets ``min(1, |D| / threshold)`` through.
    """

    prior: str
    threshold: float


@dataclass(frozen=True)
class Tiles:
    """Blocks of one size at fixed places, for a network that its authors run so.

    A block of ``size`` voxels gives the ``kept`` ones in its middle; these begin every ``stride``
    voxels, from 0. What lies ``beyond`` the volume is zero or as its edge. ``blend`` is ``none``
    where they do not overlap; ``mean``, with the last block flush with the end; or ``ramp``, where
    each fades over what it shares with the one before, axis after axis, the third outermost.
    """

    size: tuple[int, int, int]
    kept: tuple[int, int, int]
    stride: tuple[int, int, int]
    beyond: Literal["zero", "edge"]
    blend: TileBlend

    def contradictions(self) -> Iterator[str]:
        """Tell along which axes they do not cover a volume."""
        for size, kept, stride in zip(self.size, self.kept, self.stride, strict=True):
            shared = kept - stride
            fits = {
                "none": shared == 0,
                "mean": size == kept and shared >= 0,
                "ramp": 2 <= shared <= kept / 2,
            }
            inside = stride >= 1 and 1 <= kept <= size <= MOST_TILE and (size - kept) % 2 == 0
            if not (inside and fits[self.blend]):
                yield (
                    f"tiles of {size} voxels, {kept} kept every {stride}, blend {self.blend}: "
                    "they do not cover a volume so"
                )


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
    """Everything the runtime knows about a model besides its graph.

    ``patchable`` is ``split`` where the graph is the CNN of an unrolled network: it runs in
    patches, the steps between its calls on the whole volume. ``why_whole`` says why one is not.
    ``axes`` are the ends that x, y and z of the training's arrays run to. ``priors`` come in the
    order in which they are made. ``further_outputs`` follow the first; ``pad_front`` says how much
    of the padding lies in front; ``tiles`` are the blocks of a network that runs on nothing else.
    """

    schema: int
    network: str
    task: Task
    pipeline: Pipeline
    inputs: tuple[TensorInfo, ...]
    output: TensorInfo
    divisor: int
    patchable: Literal["yes", "no", "split"]
    why_whole: str | None
    receptive_field: ReceptiveField
    geometry: GeometryLimits
    normalisation: dict[str, float]
    constants: dict[str, float]
    options: dict[str, str]
    precision: GraphPrecision
    memory: dict[str, MemoryUse]
    verified: Verification
    weights_sha256: str
    licence: str
    doi: str | None
    made_by: str
    axes: str = RAS
    priors: tuple[PriorMap, ...] = ()
    anchor: Anchor | None = None
    further_outputs: tuple[TensorInfo, ...] = ()
    pad_front: PadFront = "ceil"
    tiles: Tiles | None = None

    def __post_init__(self) -> None:
        if found := "; ".join(self._contradictions()):
            raise CardError(f"contradictory card: {found}; export the model again")

    @property
    def field_counts(self) -> range:
        """How many fields, of one orientation each, or echoes of a phase it takes."""
        if self.pipeline == "lpcnn":
            return range(1, MOST_ORIENTATIONS + 1)
        if self.inputs[0].name == "phase_rad":
            return range(1, MOST_ECHOES + 1)
        count = int(self.inputs[0].shape[1]) if self.pipeline == "cnn" else 1
        return range(count, count + 1)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """All that the graph gives, in order."""
        return (self.output, *self.further_outputs)

    def _contradictions(self) -> Iterator[str]:
        names = [tensor.name for tensor in self.inputs]
        first = FIRST_INPUTS[self.pipeline]
        if not names or names[0] not in first:
            yield f"pipeline {self.pipeline} takes {' or '.join(first)} first, the card {names}"
        if len(set(names)) < len(names):
            yield f"an input twice in {names}"
        if self.patchable != "no" and (self.patchable == "split") != (self.pipeline in UNROLLED):
            yield f"pipeline {self.pipeline} is patchable: {self.patchable}"
        yield from self._task_contradictions(names)
        if (self.why_whole is None) != (self.patchable != "no"):
            yield f"patchable is {self.patchable}, why_whole is {self.why_whole}"
        if self.patchable != "no" and None in (
            self.receptive_field.halo,
            self.receptive_field.theoretical,
        ):
            yield f"patchable is {self.patchable}, but the receptive field has no end"
        yield from self._prior_contradictions()
        yield from self._tensor_contradictions()
        yield from self._geometry_contradictions()
        yield from self._number_contradictions()

    def _task_contradictions(self, names: list[str]) -> Iterator[str]:
        first, besides, given = TASKS[self.task]
        gives = tuple(tensor.name for tensor in self.outputs)
        if self.pipeline != "cnn":
            if self.further_outputs:
                yield f"pipeline {self.pipeline} gives one output, not {gives}"
            if self.task != CHI_OF_FIELD:
                yield f"pipeline {self.pipeline} is for {CHI_OF_FIELD}, not {self.task}"
        elif names and (names[0], gives) != (first, given):
            yield f"{self.task} takes {first} first and gives {given}, not {names[0]} and {gives}"
        elif set(MAPS_TAKEN) & set(names[1:]) != set(besides):
            yield f"{self.task} takes {besides or 'no map'} besides, not {names[1:]}"
        if self.tiles is None:
            return
        if self.pipeline != "cnn" or self.patchable != "no" or self.priors:
            yield "tiles are for one graph that runs on nothing else, without prior maps"
        yield from self.tiles.contradictions()
        if any(size % max(1, self.divisor) for size in self.tiles.size):
            yield f"tiles of {self.tiles.size} voxels are no multiples of {self.divisor}"

    @property
    def needs_one_field(self) -> bool:
        """Whether something is made of its local field."""
        return bool(self.priors) or "field_noise_ppm" in (tensor.name for tensor in self.inputs)

    def _prior_contradictions(self) -> Iterator[str]:
        first = [(t.name, t.shape[1:2]) for t in self.inputs[:1]]
        if self.needs_one_field and (self.pipeline != "cnn" or first != [(FIELD, (1,))]):
            yield f"what is made of a {FIELD} needs pipeline cnn, and one as the first input"
        taken = {tensor.name for tensor in self.inputs} | {prior.of for prior in self.priors}
        fields, seen = {FIELD}, set(UNITS)
        for prior in self.priors:
            if prior.name in seen:
                yield f"the prior map {prior.name} has a name that is taken"
            if prior.name not in taken:
                yield f"nothing takes the prior map {prior.name}"
            sources = fields if prior.method == "tkd" else {FIELD}
            if prior.of not in sources:
                yield f"the prior map {prior.name}, {prior.method}, is of {prior.of}"
            if not 1 <= prior.steps <= MOST_STEPS:
                yield f"{prior.name} takes {prior.steps} steps, expected 1 to {MOST_STEPS}"
            threshold = prior.threshold
            if (threshold is None) == (prior.method == "tkd"):
                yield f"{prior.name}, {prior.method}, has the threshold {threshold}"
            elif threshold is not None and not 0 < threshold <= 2 / 3:
                yield f"{prior.name} has the threshold {threshold}, expected in (0, 2/3]"
            seen.add(prior.name)
            if prior.method in FIELDS:
                fields.add(prior.name)
        if self.anchor is not None:
            maps = {p.name for p in self.priors if p.method not in FIELDS}
            if self.anchor.prior not in maps & {tensor.name for tensor in self.inputs}:
                yield f"the anchor {self.anchor.prior} is no prior map that the network takes"
            if not 0 < self.anchor.threshold <= 2 / 3:
                threshold = self.anchor.threshold
                yield f"the anchor has the threshold {threshold}, expected in (0, 2/3]"

    def _tensor_contradictions(self) -> Iterator[str]:
        units = UNITS | {prior.name: "ppm" for prior in self.priors}
        if self.inputs and not self.inputs[0].is_volume:
            yield f"{self.inputs[0].name}, the first input, is no volume"
        for output in self.outputs:
            if not output.is_volume:
                yield f"{output.name}, the output, is no volume"
        for tensor in (*self.inputs, *self.outputs):
            if tensor.name not in units:
                yield f"an unknown tensor {tensor.name}"
            elif tensor.unit != units[tensor.name]:
                yield f"{tensor.name} in {tensor.unit}, expected {units[tensor.name]}"
            channels = tensor.shape[1] if tensor.is_volume else 1
            if tensor.is_volume and (tensor.shape[0], *tensor.shape[2:]) != ("n", "x", "y", "z"):
                yield f"{tensor.name} must have the shape (n, c, x, y, z), not {tensor.shape}"
            elif not isinstance(channels, int) or channels < 1:
                yield f"{tensor.name} has {channels} channels"
            elif tensor.name in units.keys() - UNITS and not (tensor.is_volume and channels == 1):
                yield f"the prior map {tensor.name} is no volume of one channel"

    def _geometry_contradictions(self) -> Iterator[str]:
        limits = self.geometry
        if (limits.voxel_size_mm is None) != (limits.voxel_tolerance is None):
            yield "one of geometry.voxel_size_mm and voxel_tolerance is null, expected both or none"
        if (limits.b0_direction is None) != (limits.b0_tolerance_deg is None):
            yield "one of geometry.b0_direction and b0_tolerance_deg is null, expected both or none"
        if limits.voxel_size_mm is not None and min(limits.voxel_size_mm) <= 0:
            yield f"geometry.voxel_size_mm is {limits.voxel_size_mm}, expected positive sizes"
        if limits.b0_direction is not None and not any(limits.b0_direction):
            yield "geometry.b0_direction is zero"
        try:
            ends_named(self.axes)
        except GeometryError as error:
            yield str(error)

    def _number_contradictions(self) -> Iterator[str]:
        fields: Any = dataclasses.asdict(self)
        for path, (least, most) in RANGES.items():
            value = fields
            for name in path.split("."):
                value = (value or {}).get(name)
            if value is not None and not least <= value <= most:
                yield f"{path} is {value}, expected {least:g} to {most:g}"
        for name, use in self.memory.items():
            if use.fixed_bytes < 0 or use.bytes_per_voxel < 1:
                yield f"memory.{name} too small"
        numbers = self.constants | self.normalisation
        if missing := [name for name in LOOPS.get(self.pipeline, ()) if name not in numbers]:
            yield f"pipeline {self.pipeline} has no {', '.join(missing)}"

    def to_json(self) -> str:
        """Return the canonical form: sorted keys, no spaces, ASCII.

        Raises
        ------
        CardError
            If it exceeds 4000 bytes.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        stated = {n: v for n, v in dataclasses.asdict(self).items() if v != defaults[n]}
        text = json.dumps(stated, sort_keys=True, separators=(",", ":"))
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
        fields = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CardError(f"the model's card is not JSON ({error}); export the model again") from None
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        is_object = isinstance(fields, dict)
        seen = reprlib.repr(fields.get("schema")) if is_object else type(fields).__name__
        raise CardError(
            f"the model's card has schema {seen}, this version reads {SCHEMA}; "
            "export the model again with this version"
        )
    if fields.get("tkd", ...) is None:
        del fields["tkd"]  # as cards say from before there were prior maps
    return cast(ModelCard, _parse(ModelCard, fields, "card"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON whose names can be printed, and differ."""
    fields = dict(pairs)
    if len(fields) < len(pairs) or not all(map(_is_text, fields)):
        raise ValueError(
            f"a name twice, or of other than printable ASCII, in {reprlib.repr(fields)}"
        )
    return fields


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable()


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotated type ``kind``; refuse everything else by name."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        hints = get_type_hints(kind)
        needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
        if missing := needed - value.keys():
            raise CardError(
                f"the model's card lacks {where}.{min(missing)}; export the model again"
            )
        if unknown := value.keys() - hints.keys():
            raise CardError(
                f"the model's card has an unknown field {where}.{min(unknown)}; export the model "
                "again"
            )
        return cast(Any, kind)(
            **{name: _parse(hints[name], v, f"{where}.{name}") for name, v in value.items()}
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
        return {
            _parse(str, k, where): _parse(arguments[1], v, f"{where}.{k}") for k, v in value.items()
        }
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and abs(value) <= LARGEST:
        return float(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and type(value) is int and abs(value) <= MOST:
        return value
    if kind is str and _is_text(value):
        return value
    raise _mismatch(where, kind.__name__, value)


def _mismatch(where: str, expected: str, value: Any) -> CardError:
    return CardError(f"the model's card has {where} = {reprlib.repr(value)}, expected {expected}")
