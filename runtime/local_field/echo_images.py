"""The echoes in files: what their sidecars say, on one grid, with phase in radians.

The scale of the phase is told from what is said of it and from its range; echo time and field
strength are stated, by the user or in sidecars. Nothing of these is guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.local_field.complex_parts import require_parts_of_one
from qsm_deploy.runtime.local_field.echoes import Echoes, require_echo_memory
from qsm_deploy.runtime.scan.nifti import NiftiVolume, load_volumes, on_grid_of
from qsm_deploy.runtime.scan.params import Params, load_json_object, params_from
from qsm_deploy.runtime.scan.phase_scale import Said, is_vague, phase_of_echoes
from qsm_deploy.runtime.scan.scan import Reading, geometry_from
from qsm_deploy.runtime.scan.unit_names import SAME_STRENGTH

NAMES = ("EchoTime", "MagneticFieldStrength", "ImagingFrequency", "B0_dir")


@dataclass(frozen=True)
class EchoImage:
    """A file with one echo, or with several along a fourth axis.

    Attributes
    ----------
    path
        The file.
    said
        The fields of the sidecars that apply to it.
    sidecar
        Where it says so, for messages.
    lacks
        Where else a field may be stated, for messages.
    """

    path: Path
    said: Mapping[str, Any]
    sidecar: str
    lacks: str = "; add it, or pass --echo-times in seconds and --field-strength in tesla"

    @property
    def params(self) -> Params:
        """Echo times, field strength and B0 direction, as far as they are stated."""
        return params_from(Path(self.sidecar), {k: v for k, v in self.said.items() if k in NAMES})


@dataclass(frozen=True)
class EchoImages:
    """The files of a gradient echo.

    Attributes
    ----------
    phase
        Of every echo in order, or of all; real parts where ``are_parts``.
    magnitude
        The same, or nothing; imaginary parts where ``are_parts``.
    are_parts
        Whether they are real and imaginary parts.
    """

    phase: Sequence[EchoImage]
    magnitude: Sequence[EchoImage] = ()
    are_parts: bool = False


@dataclass(frozen=True)
class Loaded:
    """Echoes as they are stored, the first volume for its header, and what was understood."""

    echoes: Echoes
    first: NiftiVolume
    b0_from: str
    scales: list[str]
    notes: list[str]


def images_with_sidecars(paths: Sequence[Path]) -> list[EchoImage]:
    """Return images and what the JSON files beside them say, if there are any.

    Where each states an echo time of its own they are sorted by it.

    Raises
    ------
    DataError
        If one is no JSON object.
    """
    images = []
    for path in paths:
        sidecar = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
        if sidecar.exists():
            images.append(EchoImage(path, load_json_object(sidecar), str(sidecar)))
        else:
            images.append(EchoImage(path, {}, f"{path} (it has no {sidecar.name} beside it)"))
    times = [image.params.echo_time_s for image in images]
    if None in times:
        return images
    return [images[n] for n in np.argsort(np.array(times, dtype=float), kind="stable")]


def load_echoes(images: EchoImages, reading: Reading, limit_bytes: float) -> Loaded:
    """Read a gradient echo.

    Parameters
    ----------
    images
        Its files.
    reading
        What the user states; it wins over the sidecars.
    limit_bytes
        The memory that the echoes may take.

    Raises
    ------
    DataError
        If a file is unreadable or holds NaN, echo times or field strength are missing, or files
        contradict each other.
    GeometryError
        If the volumes lie on different grids.
    UnitsError
        If the scale of the phase cannot be told.
    MemoryLimitError
        If they would take more memory than that.
    """
    phase, second = images.phase, images.magnitude
    first, *_ = load_volumes(phase[0].path)
    volumes, owners = _volumes(phase, first, limit_bytes)
    notes: list[str] = []
    times = _times(phase, second, owners, reading, notes)
    strength = _strength([*phase, *second], reading, notes)
    notes += [note for volume in volumes[1:] for note in volume.notes]
    others: list[NiftiVolume] = []
    if images.are_parts:
        others = _as_many(second, len(times), first, limit_bytes)
        angle, magnitude = _polar(volumes, others)
        scales = ["phase in radians, of real and imaginary parts"]
    else:
        angle, scales = _radians(owners, volumes, reading)
        del volumes  # before there are others
        if second:
            magnitude = _magnitudes(_as_many(second, len(times), first, limit_bytes))
        else:
            magnitude = np.ones_like(angle)
            notes.append("no magnitude given: every voxel of every echo counts as much")
    if len(scales) > 1 or any("stale" in scale for scale in scales):
        notes.insert(0, f"{len(times)} echoes, {'; '.join(scales)}")
    stated = reading.from_file.b0_direction or phase[0].params.b0_direction
    from_file = replace(reading.from_file, b0_direction=stated)
    geometry, b0_from = geometry_from(first, reading.flags, from_file, notes)
    angle = -angle if reading.negate else angle
    return Loaded(
        Echoes(angle, magnitude, times, strength, geometry), first, b0_from, scales, notes
    )


def _as_many(
    images: Sequence[EchoImage], count: int, first: NiftiVolume, limit_bytes: float
) -> list[NiftiVolume]:
    """Return so many volumes on the grid of the first."""
    volumes, _ = _volumes(images, first, limit_bytes)
    if len(volumes) != count:
        raise DataError(
            f"{count} echoes of phase, {len(volumes)} of magnitude ({images[0].path.name} ...); "
            "pass as many"
        )
    return volumes


def _volumes(
    images: Sequence[EchoImage], first: NiftiVolume, limit_bytes: float
) -> tuple[list[NiftiVolume], list[EchoImage]]:
    """Return the volumes of all files on the grid of the first, and the image that each is of."""
    volumes: list[NiftiVolume] = []
    owners: list[EchoImage] = []
    for image in images:
        found = load_volumes(image.path)
        count = max(len(images), len(volumes) + len(found))
        require_echo_memory(count, first.data.size, limit_bytes)
        volumes += [on_grid_of(volume, first) for volume in found]
        owners += [image] * len(found)
    return volumes, owners


def _times(
    phase: Sequence[EchoImage],
    second: Sequence[EchoImage],
    owners: Sequence[EchoImage],
    reading: Reading,
    notes: list[str],
) -> tuple[float, ...]:
    """Return the echo times [s]: those that the user states, else those of the sidecars."""
    stated = reading.echo_times_s
    there = {image.path: image.params.echo_times_s for image in (*phase, *second)}
    sidecars = tuple(time for image in phase for time in there[image.path])
    for name, found in (("of the phase", phase), ("of the magnitude", second)):
        own = tuple(time for image in found for time in there[image.path])
        if stated and own and own != stated:
            notes.append(f"echo times {_ms(stated)} ms as stated, not {_ms(own)} {name}'s sidecars")
    times = stated or sidecars
    if not stated:
        for image in phase:
            if not there[image.path]:
                raise DataError(f"{image.sidecar}: EchoTime is not stated there{image.lacks}")
        for one, other in zip(phase, second, strict=False):
            if there[other.path] not in ((), there[one.path]):
                raise DataError(
                    f"{other.path.name}: EchoTime is {_list(there[other.path])}, that of its phase "
                    f"{one.path.name} {_list(there[one.path])}; correct the sidecars"
                )
    if len(times) != len(owners):
        raise DataError(
            f"{len(owners)} echoes of phase, {len(times)} echo times ({_ms(times)} ms); one for "
            "each is needed"
        )
    return times


def _strength(images: Sequence[EchoImage], reading: Reading, notes: list[str]) -> float:
    """Return the field strength [T]: that which the user states, else that of the sidecars."""
    found = sorted(t for t in (image.params.field_strength_t for image in images) if t is not None)
    stated = reading.field_strength_t
    if stated is not None:
        if found and max(found[-1] / stated, stated / found[0]) > SAME_STRENGTH:
            notes.append(f"field strength {stated:g} T as stated, not {found[0]:g} of the sidecars")
        return stated
    if not found:
        image = images[0]
        raise DataError(f"{image.sidecar}: MagneticFieldStrength is not stated there{image.lacks}")
    if found[-1] > SAME_STRENGTH * found[0]:
        raise DataError(
            f"{images[0].path.name}: MagneticFieldStrength is {found[0]:g} in one echo and "
            f"{found[-1]:g} in another; correct the sidecars"
        )
    return found[0]


def _radians(
    images: Sequence[EchoImage], volumes: Sequence[NiftiVolume], reading: Reading
) -> tuple[NDArray[np.float32], list[str]]:
    """Return the (n, x, y, z) phase of all echoes [rad], and the scales that it came in."""
    said = []
    for image, volume in zip(images, volumes, strict=True):
        if bad := int(np.count_nonzero(~np.isfinite(volume.data))):
            raise DataError(
                f"{image.path.name}: {bad} voxels of the phase are NaN or Inf; set these voxels "
                "to 0"
            )
        if not volume.data.any():
            raise DataError(f"{image.path.name}: the phase is 0 everywhere; check the file")
        stated_units = [str(image.said.get(name, "")) for name in ("Units", "RescaleType")]
        units = next((unit for unit in stated_units if not is_vague(unit)), None)
        maker = str(image.said.get("Manufacturer", ""))
        said.append(Said(reading.phase_scale, units, *volume.scaling, maker))
    names = [image.path.name for image in images]
    return phase_of_echoes([volume.data for volume in volumes], said, names)


def _polar(
    reals: Sequence[NiftiVolume], imaginaries: Sequence[NiftiVolume]
) -> tuple[Volume, Volume]:
    """Return the (n, x, y, z) phase [rad] and magnitude of real and imaginary parts."""
    for pair in zip(reals, imaginaries, strict=True):
        for part, volume in zip(("real", "imag"), pair, strict=True):
            if not np.isfinite(volume.data).all():
                raise DataError(f"{volume.path}: the part-{part} has NaN or Inf")
        require_parts_of_one([v.path.name for v in pair], [v.data for v in pair])
    real, imaginary = (np.stack([v.data for v in side]) for side in (reals, imaginaries))
    return np.arctan2(imaginary, real), np.hypot(real, imaginary)


def _magnitudes(volumes: Sequence[NiftiVolume]) -> Volume:
    for volume in volumes:
        if not np.isfinite(volume.data).all() or volume.data.min() < 0:
            raise DataError(f"{volume.path}: the magnitude has negative values, NaN or Inf")
        if not volume.data.any():
            raise DataError(f"{volume.path}: the magnitude is 0 everywhere; check the file")
    return np.stack([volume.data for volume in volumes])


def _ms(times_s: Sequence[float]) -> str:
    return ", ".join(f"{1e3 * time:g}" for time in times_s)


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
