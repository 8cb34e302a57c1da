"""From the images of a session to the volumes that a reconstruction takes."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.serve.acquisition import HeaderValues, echo_time_s
from qsm_deploy.runtime.serve.codec import Image
from qsm_deploy.runtime.serve.image_roles import (
    DISTORTION_TOKENS,
    Role,
    echo_key,
    image_tokens,
    repetition_key,
    role_of,
)
from qsm_deploy.runtime.serve.stacks import Stack, require_same_grid, stack_images

Key = TypeVar("Key", bound=Hashable)
BySeries = Mapping[int, Sequence[Image]]

MICROSECONDS = 1e6


@dataclass(frozen=True)
class EchoVolumes:
    """A multi-echo acquisition, sorted.

    Attributes
    ----------
    phase, magnitude
        One volume for each echo; no magnitude where a mask came instead.
    echo_times_s
        Of each echo, rising.
    mask
        One that the host sent.
    notes
        What was left out.
    """

    phase: tuple[Stack, ...]
    magnitude: tuple[Stack, ...]
    echo_times_s: tuple[float, ...]
    mask: Stack | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FieldVolume:
    """A local field and the mask that came with it, if any."""

    field: Stack
    mask: Stack | None
    notes: tuple[str, ...] = ()


def echo_volumes(images: Iterable[Image], header: HeaderValues) -> EchoVolumes:
    """Sort magnitude and phase images by echo.

    Raises
    ------
    DataError
        If there is no phase, an echo lacks its magnitude, an echo time is missing, or an echo
        was measured repeatedly.
    GeometryError
        If the volumes do not lie on one grid.
    """

    def time_us(image: Image) -> int:
        return round(MICROSECONDS * echo_time_s(header, echo_key(image)))

    by_role = _by_role(images)
    if not by_role["phase"]:
        seen = ", ".join(f"{len(v)} of {role}" for role, v in by_role.items() if v) or "none"
        raise DataError(f"no phase images ({seen}); send phase and magnitude of every echo")
    notes: list[str] = []
    phase = _volumes(by_role["phase"], time_us, set(), "phase", notes)
    distortion = image_tokens(next(iter(phase.values())).images[0]) & DISTORTION_TOKENS
    magnitude = _volumes(by_role["magnitude"], time_us, distortion, "magnitude", notes)
    mask = _only_volume(by_role["mask"], "mask", notes)
    if not magnitude and mask is None:
        raise DataError("phase images without magnitude; send the magnitude too, or a mask")
    times = sorted(phase)
    if lacking := [t for t in times if magnitude and t not in magnitude]:
        raise DataError(f"the echo at {lacking[0] / 1000:g} ms has phase but no magnitude images")
    stacks = [*phase.values(), *(magnitude[t] for t in times if magnitude), mask]
    for stack in stacks[1:]:
        if stack is not None:
            require_same_grid(phase[times[0]], stack)
    return EchoVolumes(
        tuple(phase[t] for t in times),
        tuple(magnitude[t] for t in times if magnitude),
        tuple(t / MICROSECONDS for t in times),
        mask,
        tuple(notes),
    )


def field_volume(images: Iterable[Image]) -> FieldVolume:
    """Find the one local field, of whatever image type, and its mask.

    Raises
    ------
    DataError
        If there is not exactly one.
    GeometryError
        If field and mask do not lie on one grid.
    """
    by_role = _by_role(images)
    notes: list[str] = []
    fields = [i for role, found in by_role.items() if role != "mask" for i in found]
    stack = _only_volume(fields, "local field", notes)
    if stack is None:
        raise DataError("no images of a local field")
    mask = _only_volume(by_role["mask"], "mask", notes)
    if mask is not None:
        require_same_grid(stack, mask)
    return FieldVolume(stack, mask, tuple(notes))


def _by_role(images: Iterable[Image]) -> dict[Role, list[Image]]:
    found: dict[Role, list[Image]] = {"phase": [], "magnitude": [], "field": [], "mask": []}
    for image in images:
        found[role_of(image)].append(image)
    return found


def _only_volume(images: Sequence[Image], name: str, notes: list[str]) -> Stack | None:
    volumes = _volumes(images, echo_key, set(), name, notes)
    if len(volumes) > 1:
        echoes = ", ".join(str(key.place + 1) for key in volumes)
        raise DataError(f"{len(volumes)} volumes of a {name} (echoes {echoes}); send one")
    return next(iter(volumes.values()), None)


def _volumes(
    images: Sequence[Image],
    key_of: Callable[[Image], Key],
    distortion: set[str],
    name: str,
    notes: list[str],
) -> dict[Key, Stack]:
    """Return one volume for each key, from one series where several have it."""
    groups: dict[Key, dict[int, list[Image]]] = defaultdict(lambda: defaultdict(list))
    for image in images:
        groups[key_of(image)][image.head.image_series_index].append(image)
    return {key: _stack(by_series, distortion, name, notes) for key, by_series in groups.items()}


def _stack(by_series: BySeries, distortion: set[str], name: str, notes: list[str]) -> Stack:
    """Return the volume of the series that is corrected as the others are, else of the first."""

    def preference(series: int) -> tuple[bool, int]:
        tokens = image_tokens(by_series[series][0]) & DISTORTION_TOKENS
        return bool(distortion) and tokens != distortion, series

    chosen, *ignored = sorted(by_series, key=preference)
    if ignored:
        note = f"{name} of series {chosen} taken, not of {', '.join(map(str, ignored))}"
        notes += [note] * (note not in notes)
    if len({repetition_key(image) for image in by_series[chosen]}) > 1:
        raise DataError(
            f"{name} of series {chosen} was measured repeatedly (repetition, average, set or "
            "phase); send one measurement"
        )
    return stack_images(by_series[chosen])
