"""Everything about one acquisition that a reconstruction needs, read and checked once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.bounding_box import Box
from qsm_deploy.kernels.errors import DataError, GeometryError, UnitsError
from qsm_deploy.kernels.geometry import Geometry, Volume, vector_text
from qsm_deploy.runtime.scan.axes import STORED, Axes, anatomical_axes, axes_of, from_corner
from qsm_deploy.runtime.scan.masks import mask_from_values
from qsm_deploy.runtime.scan.mistaken import refuse_other_than_field, refuse_other_than_truth
from qsm_deploy.runtime.scan.nifti import NiftiVolume, load_on_grid, load_volume
from qsm_deploy.runtime.scan.params import Params, Vector
from qsm_deploy.runtime.scan.phase_scale import Said, phase_scale, radians_from_phase
from qsm_deploy.runtime.scan.unit_names import TURN, FieldUnit
from qsm_deploy.runtime.scan.units import (
    ppm_per_unit,
    require_ppm,
    require_total_ppm,
    require_wrapped_phase,
)
from qsm_deploy.runtime.scan.wraps import require_unwrapped, undo_half_turns

STATED = "what was stated"
Quantity = Literal["local_field_ppm", "total_field_ppm", "phase_rad"]
TAKEN = ("chi_ppm", "r2prime_hz", "echo_weights")  # volumes that networks take besides
# volumes of a scan that may be missing
BESIDES = ("truth_ppm", "labels", "magnitude", "noise_ppm", "misfit", *TAKEN)


class ScanFiles(NamedTuple):
    """The files of one acquisition; a truth and its labels exist for simulated ones."""

    fields: tuple[Path, ...]
    mask: Path | None = None
    truth: Path | None = None
    labels: Path | None = None
    magnitude: tuple[Path, ...] = ()  # of every echo
    noise_map: Path | None = None
    quality: Path | None = None
    chi: Path | None = None
    r2prime: Path | None = None


@dataclass(frozen=True)
class Scan:
    """One acquisition on its grid.

    Attributes
    ----------
    measured
        (n, x, y, z) float32, 0 outside the mask: the local field [ppm] in each of n orientations,
        or one field of all sources [ppm], or the wrapped phase [rad] of each of n echoes. A field
        of all sources may lie outside the mask too, for a network that takes the whole head.
    mask
        (x, y, z) bool, True inside.
    geometry
        The grid, as understood from header, parameter file and flags; its B0 direction is that of
        the first orientation.
    header
        The first volume's NIfTI header, for the output.
    affine
        (4, 4) from its voxels to the scanner, RAS [mm]; ``None`` where nobody says.
    quantity
        What was measured.
    more_b0_directions
        Unit vectors in voxel axes of the orientations after the first.
    echo_time_s, field_strength_t, more_echo_times_s
        Of a phase, and of the echoes after the first.
    truth_ppm, labels
        (x, y, z) true susceptibility and integer labels, if given.
    magnitude, noise_ppm, misfit
        (x, y, z) signal, of any scale, noise of the field [ppm], and what the echoes leave over
        their noise, if given.
    chi_ppm, r2prime_hz
        (x, y, z) susceptibility and reversible relaxation rate, for networks that take them.
    echo_weights
        (n, x, y, z) what each echo of a phase counts in the map, if it is not the square of its
        time.
    scale
        What the stored volumes were multiplied by.
    axes
        How its axes are made of the stored ones, to which the map goes back.
    b0_from
        Who says where B0 was.
    notes
        What the user should know about how the input was understood, a line each.
    facts
        For the report: how the field was made.
    """

    measured: NDArray[np.float32]
    mask: NDArray[np.bool_]
    geometry: Geometry
    header: nib.Nifti1Header
    affine: NDArray[np.float64] | None
    quantity: Quantity = "local_field_ppm"
    more_b0_directions: tuple[Vector, ...] = ()
    echo_time_s: float | None = None
    field_strength_t: float | None = None
    truth_ppm: NDArray[np.float32] | None = None
    labels: NDArray[np.integer] | None = None
    magnitude: NDArray[np.float32] | None = None
    noise_ppm: NDArray[np.float32] | None = None
    misfit: NDArray[np.float32] | None = None
    chi_ppm: NDArray[np.float32] | None = None
    r2prime_hz: NDArray[np.float32] | None = None
    echo_weights: NDArray[np.float32] | None = None
    more_echo_times_s: tuple[float, ...] = ()
    scale: float = 1.0
    axes: Axes = STORED
    b0_from: str = STATED
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def spectrum_noise_ppm(self) -> float:
        """The noise of its first field [ppm], by the spectrum of that; found once, in a while."""
        from qsm_deploy.kernels.inversion.field_noise import field_noise

        return field_noise(self.measured[0], self.mask, self.geometry)

    @property
    def nbytes(self) -> int:
        """Memory of the volumes."""
        volumes = (self.measured, self.mask, *(getattr(self, name) for name in BESIDES))
        return sum(v.nbytes for v in volumes if v is not None)

    @property
    def stored_letters(self) -> str:
        """The ends that the stored axes run to, such as LAS; ``?`` where nobody says."""
        if self.affine is None:
            return "?"
        return anatomical_axes(self.affine).inverse.then(self.axes.inverse).letters

    def canonical(self) -> "Scan":
        """Return the acquisition in canonical axes."""
        return self.turned(axes_of(self.affine, self.geometry))

    def turned(self, axes: Axes) -> "Scan":
        """Return the acquisition in axes that are made of its own."""
        if axes == STORED:
            return self
        volumes = {name: getattr(self, name) for name in ("measured", "mask", *BESIDES)}
        changed: dict[str, Any] = {
            n: None if v is None else axes.turn(v) for n, v in volumes.items()
        }
        return replace(
            self,
            geometry=axes.geometry(self.geometry),
            more_b0_directions=tuple(map(axes.vector, self.more_b0_directions)),
            affine=None if self.affine is None else axes.affine(self.affine, self.geometry.shape),
            axes=self.axes.then(axes),
            **changed,
        )

    def on_grid(
        self,
        geometry: Geometry,
        mask: NDArray[np.bool_],
        measured: NDArray[np.float32],
        way: Callable[[Volume], Volume],
    ) -> "Scan":
        """Return an acquisition of what was measured on another grid.

        ``way`` brings there what is taken besides. A truth and its labels are left behind: they
        belong to the original one.
        """

        def brought(name: str) -> Any:
            volume = getattr(self, name)
            if volume is None:
                return None
            there = way(volume) if volume.ndim == 3 else np.stack([way(v) for v in volume])
            # interpolation may fall below what is never negative
            inside: Volume = mask * (there if name == "chi_ppm" else np.maximum(there, 0))
            return inside

        return replace(
            self,
            measured=measured,
            mask=mask,
            geometry=geometry,
            truth_ppm=None,
            labels=None,
            **{name: brought(name) for name in TAKEN},
        )

    def cut(self, box: Box) -> "Scan":
        """Return the part in a box, which lies on the grid, as an acquisition of its own.

        Its field has sources that lie outside; so has every acquisition's.
        """
        mask = np.ascontiguousarray(self.mask[box])
        x, y, z = mask.shape
        volumes = {name: getattr(self, name) for name in BESIDES}
        besides: dict[str, Any] = {
            n: None if v is None else v[(..., *box)].copy() for n, v in volumes.items()
        }
        return replace(
            self,
            measured=np.ascontiguousarray(self.measured[(slice(None), *box)]),
            mask=mask,
            geometry=replace(self.geometry, shape=(x, y, z)),
            affine=None if self.affine is None else from_corner(self.affine, box),
            **besides,
        )

    @property
    def b0_directions(self) -> NDArray[np.float32]:
        """(n, 3) unit vectors in voxel axes, one for each orientation."""
        return np.array([self.geometry.b0_direction, *self.more_b0_directions], dtype=np.float32)


@dataclass(frozen=True)
class Reading:
    """How the measured volumes are to be understood.

    Attributes
    ----------
    quantity
        What the network takes.
    units
        What the files hold; ``None`` is what the network takes.
    flags, from_file
        Parameters that the user states and those of a parameter file; a flag wins over the
        file, the file over the header, and what differs is noted.
    more_b0_directions
        Stated B0 directions of the volumes after the first; empty takes those of their headers.
    keeps_outside
        Whether a field is kept outside the mask, for a network that takes the whole head.
    negate
        Whether the files have the opposite sign: a field that lowers the frequency counts as
        positive.
    phase_scale
        What the values of a wrapped phase mean, by its name in
        :data:`qsm_deploy.runtime.scan.phase_scale.SCALES`; ``None`` tells it from them.
    """

    quantity: Quantity = "local_field_ppm"
    units: FieldUnit | None = None
    flags: Params = field(default_factory=Params)
    from_file: Params = field(default_factory=Params)
    more_b0_directions: tuple[Vector, ...] = ()
    negate: bool = False
    phase_scale: str | None = None
    keeps_outside: bool = False

    @property
    def echo_times_s(self) -> tuple[float, ...]:
        """The echo times, as stated [s]."""
        return self.flags.echo_times_s or self.from_file.echo_times_s

    @property
    def echo_time_s(self) -> float | None:
        """The echo time, as stated [s]."""
        return _stated(self.flags.echo_time_s, self.from_file.echo_time_s)

    @property
    def field_strength_t(self) -> float | None:
        """The strength of B0, as stated [T]."""
        return _stated(self.flags.field_strength_t, self.from_file.field_strength_t)

    def scale(self) -> float:
        """Return what a stored value is multiplied by.

        Raises
        ------
        UnitsError
            If the unit lacks its parameters, or the network cannot take it.
        """
        units: FieldUnit = self.units or ("rad" if self.quantity == "phase_rad" else "ppm")
        if self.quantity == "phase_rad" and units != "rad":
            raise UnitsError(
                f"this network takes the wrapped phase in radians, not a field in {units}; pass "
                "the phase, or a network for local fields"
            )
        if self.quantity != "phase_rad" and self.phase_scale is not None:
            raise UnitsError(
                "--phase-scale is for a wrapped phase, this network takes a local field; state its "
                "unit with --units, or begin with --phase and --magnitude"
            )
        sign = -1.0 if self.negate else 1.0
        echo_time_s, field_strength_t = self.echo_time_s, self.field_strength_t
        if self.quantity == "phase_rad":
            echo_time_s = next(iter(self.echo_times_s), None)  # each echo has its own
        factor = ppm_per_unit(units, echo_time_s=echo_time_s, field_strength_t=field_strength_t)
        return sign if self.quantity == "phase_rad" else sign * factor


def load_scan(files: ScanFiles, reading: Reading) -> Scan:
    """Read the measured volumes and what belongs to them.

    Parameters
    ----------
    files
        The NIfTI files, all on the grid of the first field; further local fields may differ in the
        orientation that their affines state, further phases are of later echoes.
    reading
        How the measured volumes are to be understood.

    Raises
    ------
    DataError
        If a file is unreadable, the mask is empty, values inside it are NaN or Inf, or several
        phases have not as many echo times.
    GeometryError
        If a volume is on another grid, the geometry is invalid, or two fields have the same
        B0 direction.
    UnitsError
        If the values cannot be in the stated unit, or the unit lacks its parameters.
    """
    notes: list[str] = []
    scale = reading.scale()
    first = load_volume(files.fields[0])
    are_echoes = reading.quantity == "phase_rad"
    load = partial(load_on_grid, like=first) if are_echoes else load_volume
    others = [load(path) for path in files.fields[1:]]
    ways: list[Axes] = []
    times = reading.echo_times_s if are_echoes else ()
    if are_echoes:
        require_times(1 + len(others), times)
    several = are_echoes and bool(others)
    if others and not are_echoes:
        from qsm_deploy.runtime.scan.orientations import stored_as_first

        ways = [stored_as_first(first, other) for other in others]
        others = [other.turned(way) for other, way in zip(others, ways, strict=True)]
    geometry, b0_from = geometry_from(first, reading.flags, reading.from_file, notes)
    mask = _mask(files.mask, first, notes)
    masked = files.mask is not None
    measured = np.stack(
        [_inside(volume, mask, reading, notes, masked=masked) for volume in (first, *others)]
    )
    more: tuple[Vector, ...] = ()
    if not are_echoes and (others or reading.more_b0_directions):
        from qsm_deploy.runtime.scan.orientations import more_b0_directions

        more = more_b0_directions(geometry, first, others, ways, reading.more_b0_directions)
        notes += [f"{v.path}: {note}" for v in others for note in v.transforms.notes]
    scan = Scan(
        measured,
        mask,
        geometry,
        first.header,
        first.directed_affine,
        quantity=reading.quantity,
        more_b0_directions=more,
        echo_time_s=times[0] if times else reading.echo_time_s,
        field_strength_t=reading.field_strength_t,
        more_echo_times_s=times[1:],
        echo_weights=_weights(files.magnitude, first, mask, times) if several else None,
        truth_ppm=None if files.truth is None else truth_of_file(files.truth, first, mask),
        labels=None if files.labels is None else labels_of_file(files.labels, first),
        magnitude=None if several else _magnitude(files.magnitude, first, mask),
        noise_ppm=None if files.noise_map is None else _trust(files.noise_map, first, mask),
        misfit=None if files.quality is None else _trust(files.quality, first, mask),
        scale=scale,
        b0_from=b0_from,
        notes=notes,
        **maps_of_files(files, first, mask),
    ).canonical()
    if scan.quantity == "phase_rad":
        notes += undo_half_turns(scan.measured, scan.mask, scan.axes)
    return scan


def _inside(
    volume: NiftiVolume,
    mask: NDArray[np.bool_],
    reading: Reading,
    notes: list[str],
    *,
    masked: bool,
) -> NDArray[np.float32]:
    """Return what was measured in its own unit, 0 outside the mask, and add notes on it."""
    if volume.data.shape != mask.shape:
        raise GeometryError(
            f"{volume.path} has shape {volume.data.shape}, the first field has {mask.shape}; "
            "register one to the other"
        )
    _require_finite(volume.path, volume.data, mask, masked=masked)
    try:
        if reading.quantity == "phase_rad":
            measured = _radians(volume, reading)
        else:
            units = reading.units
            if reading.quantity == "local_field_ppm":
                refuse_other_than_field(volume.data[mask], volume.description)
            turn, stated = (TURN, False) if units == "rad" else (None, units is not None)
            require_unwrapped(volume.data, mask, turn, stated=stated)
            measured = volume.data
        values = outside_zero(measured, mask, keeps_outside=reading.keeps_outside)
        values *= np.float32(reading.scale())
        if reading.quantity == "phase_rad":
            found = require_wrapped_phase(values[mask])
        elif reading.quantity == "total_field_ppm":
            found = []
            require_total_ppm(values[mask], reading.units or "ppm")
        else:
            stated = reading.units is not None
            found = require_ppm(values[mask], reading.units or "ppm", stated=stated)
    except DataError as error:  # of units too
        raise type(error)(f"{volume.path}: {error}") from None
    notes += [f"{volume.path}: {note}" for note in found]
    return values


def outside_zero(
    measured: NDArray[Any], mask: NDArray[np.bool_], *, keeps_outside: bool
) -> NDArray[np.float32]:
    """Return what was measured, 0 outside the mask, or where it is kept there not finite."""
    inside = np.isfinite(measured) if keeps_outside else mask
    return np.where(inside, measured, 0).astype(np.float32)


def _radians(volume: NiftiVolume, reading: Reading) -> NDArray[np.float32]:
    """Return a wrapped phase within half a turn of zero."""
    known = np.nan_to_num(volume.data, nan=0, posinf=0, neginf=0)
    # what a network takes is radians, unless they cannot be
    units = reading.units or ("rad" if np.abs(known).max() <= 1.001 * TURN else None)
    said = Said(reading.phase_scale, units, *volume.scaling)
    radians = radians_from_phase(known, phase_scale(known, said))
    wrapped: NDArray[np.float32] = radians - TURN * np.rint(radians / TURN)
    return wrapped.astype(np.float32)


def geometry_from(
    volume: NiftiVolume, flags: Params, from_file: Params, notes: list[str]
) -> tuple[Geometry, str]:
    """Return the header's geometry with what was stated instead, and who says where B0 was.

    What differs is noted. All in stored axes.

    Raises
    ------
    GeometryError
        If the header does not tell where B0 was, and nothing else does.
    """
    header, b0_from = volume.geometry, f"the {volume.transforms.source or 'third voxel axis'}"
    b0_stated = flags.b0_direction or from_file.b0_direction
    unknown = volume.transforms.source is None and b0_stated is not None
    notes += [*volume.notes, *volume.transforms.notes[: -1 if unknown else None]]
    voxel_size, direction = header.voxel_size_mm, header.b0_direction
    for source, params in (("the parameter file", from_file), ("the command line", flags)):
        if params.voxel_size_mm is not None:
            stated = Geometry(header.shape, params.voxel_size_mm)
            if not np.allclose(stated.voxel_size_mm, voxel_size, rtol=2e-3):
                notes.append(
                    f"voxel size {vector_text(stated.voxel_size_mm)} mm from {source}, not "
                    f"{vector_text(voxel_size)} mm"
                )
            voxel_size = stated.voxel_size_mm
        if params.b0_direction is not None:
            stated = Geometry(header.shape, b0_direction=params.b0_direction)
            if stated.b0_angle_deg(direction) > 0.1:
                notes.append(
                    f"B0 direction {vector_text(stated.b0_direction)} from {source}, not "
                    f"{vector_text(direction)}"
                )
            direction, b0_from = stated.b0_direction, source
    if b0_stated is None and volume.transforms.doubt:
        raise GeometryError(f"{volume.path}: {volume.transforms.doubt}")
    return Geometry(header.shape, voxel_size, direction), b0_from


def mask_of_file(path: Path, like: NiftiVolume, notes: list[str]) -> NDArray[np.bool_]:
    """Return a mask on the grid of a volume, and add notes on it.

    Raises
    ------
    DataError
        If it cannot be read, is empty, or is no mask.
    GeometryError
        If it lies on another grid.
    """
    volume = load_on_grid(path, like)
    mask, found = mask_from_values(volume.data, str(path))
    notes += [*volume.notes, *found]
    return mask


def _mask(path: Path | None, volume: NiftiVolume, notes: list[str]) -> NDArray[np.bool_]:
    if path is None:
        mask: NDArray[np.bool_] = volume.data != 0
        share = 100 * mask.mean()
        notes.append(f"no mask given: taking the non-zero field, {share:.0f} % of the volume")
        if not mask.any():
            raise DataError(f"{volume.path}: the field is zero everywhere; check the file")
        return mask
    return mask_of_file(path, volume, notes)


def _require_finite(
    path: Path, data: NDArray[np.float32], mask: NDArray[np.bool_], *, masked: bool
) -> None:
    bad = int(np.count_nonzero(~np.isfinite(data) & mask))
    if bad:
        hint = "take these voxels out of the mask" if masked else "set them to 0 or pass a mask -m"
        raise DataError(
            f"{path}: {bad} of {np.count_nonzero(mask)} voxels inside the mask are NaN or Inf; "
            f"{hint}, or repair the field"
        )


def truth_of_file(path: Path, volume: NiftiVolume, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return a true susceptibility [ppm] on the grid of a volume; refuse what is none."""
    truth = load_on_grid(path, volume).data
    _require_finite(path, truth, mask, masked=True)
    from qsm_deploy.runtime.scan.agreement import require_variation

    try:
        refuse_other_than_truth(truth[mask])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    require_variation(truth[mask].astype(np.float64))
    return truth


def _chi_of_file(path: Path, volume: NiftiVolume, mask: NDArray[np.bool_]) -> Volume:
    """Return a susceptibility [ppm] on the grid of a volume, 0 outside the mask."""
    chi = load_on_grid(path, volume).data
    _require_finite(path, chi, mask, masked=True)
    try:
        refuse_other_than_truth(chi[mask], flag="--chi")
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return np.where(mask, chi, np.float32(0))


def maps_of_files(files: ScanFiles, volume: NiftiVolume, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the maps that a network takes besides its field, by name, if there are files."""
    found: dict[str, Any] = {}
    if files.chi is not None:
        found["chi_ppm"] = _chi_of_file(files.chi, volume, mask)
    if files.r2prime is not None:
        found["r2prime_hz"] = _trust(files.r2prime, volume, mask)
    return found


def _magnitude(
    paths: tuple[Path, ...], volume: NiftiVolume, mask: NDArray[np.bool_]
) -> Volume | None:
    """Return the root of the sum of the squares of all echoes."""
    if not paths:
        return None
    return reduce(np.hypot, (_trust(path, volume, mask) for path in paths))


def require_times(count: int, times_s: Sequence[float]) -> None:
    """Check that each of several phases has its time; that of one may be missing.

    Raises
    ------
    DataError
        If not.
    """
    if len(times_s) != count and max(len(times_s), count) > 1:
        raise DataError(
            f"{count} phases and {len(times_s)} echo times: state one for each with --echo-times"
        )


def _weights(
    paths: tuple[Path, ...], volume: NiftiVolume, mask: NDArray[np.bool_], times: Sequence[float]
) -> Volume | None:
    """Return what each echo counts: its magnitude by its time, squared."""
    if not paths:
        return None
    signal = np.stack([_trust(path, volume, mask) for path in paths])
    return echo_weights(signal, times)


def echo_weights(signal: Volume, times_s: Sequence[float]) -> Volume:
    """Return what each echo counts in a map of all: its magnitude by its time [s], squared.

    Raises
    ------
    DataError
        If there are neither as many magnitudes as times nor one for all.
    """
    if len(signal) not in (1, len(times_s)):
        raise DataError(f"{len(times_s)} phases and {len(signal)} magnitudes; pass as many, or one")
    times = np.array(times_s, dtype=np.float32)
    weights: Volume = (signal * times[:, None, None, None]) ** 2
    return weights


def _trust(path: Path, volume: NiftiVolume, mask: NDArray[np.bool_]) -> Volume:
    values = load_on_grid(path, volume).data
    try:
        return require_trust(values, mask)
    except DataError as error:
        raise type(error)(f"{path}: {error}") from None


def require_trust(values: Volume, mask: NDArray[np.bool_]) -> Volume:
    """Return a magnitude or a noise map, 0 outside the mask.

    Raises
    ------
    DataError
        If a value inside the mask is negative, NaN or Inf, or none is above 0.
    """
    inside = values[mask]
    if not np.isfinite(inside).all() or inside.min() < 0:
        raise DataError("negative values, NaN or Inf inside the mask; it must be 0 or more there")
    if not inside.max() > 0:
        raise DataError("0 everywhere inside the mask; check the file")
    return np.where(mask, values, np.float32(0)).astype(np.float32)


def labels_of_file(path: Path, volume: NiftiVolume) -> NDArray[np.integer]:
    """Return labels on the grid of a volume; refuse what are none."""
    data = load_on_grid(path, volume).data
    if not np.isfinite(data).all() or (data != np.rint(data)).any():
        raise DataError(f"{path}: labels must be whole numbers, one per region")
    return data.astype(np.int16)


def _stated(flag: float | None, from_file: float | None) -> float | None:
    return from_file if flag is None else flag
