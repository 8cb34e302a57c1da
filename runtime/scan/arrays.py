"""An acquisition that is in memory already, checked as one from files is."""

from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike

from qsm_deploy.kernels.errors import DataError, GeometryError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume, vector_text
from qsm_deploy.runtime.scan.axes import Affine, directions_named
from qsm_deploy.runtime.scan.masks import mask_from_values
from qsm_deploy.runtime.scan.mistaken import refuse_other_than_field
from qsm_deploy.runtime.scan.orientations import SMALLEST_ANGLE_DEG, require_different
from qsm_deploy.runtime.scan.params import Vector
from qsm_deploy.runtime.scan.scan import (
    Quantity,
    Scan,
    echo_weights,
    outside_zero,
    require_times,
    require_trust,
)
from qsm_deploy.runtime.scan.units import require_ppm, require_total_ppm, require_wrapped_phase
from qsm_deploy.runtime.scan.wraps import require_unwrapped, undo_half_turns


def scan_from_arrays(
    measured: Any,
    mask: Any,
    *,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float] | Sequence[Sequence[float]],
    quantity: Quantity = "local_field_ppm",
    echo_time_s: float | Sequence[float] | None = None,
    field_strength_t: float | None = None,
    magnitude: Any = None,
    noise_ppm: Any = None,
    chi_ppm: Any = None,
    r2prime_hz: Any = None,
    keeps_outside: bool = False,
    axes: str | ArrayLike | None = None,
) -> Scan:
    """Return a scan of arrays, in canonical axes.

    Parameters
    ----------
    measured
        (x, y, z) local or total field [ppm] or wrapped phase [rad]; (n, x, y, z) for n orientations
        of a field or n echoes of a phase.
    mask
        (x, y, z), above 0 inside, or above a half for fractions; ``None`` takes where the first
        field is not zero.
    voxel_size_mm
        Along (x, y, z).
    b0_direction
        In voxel axes, of any non-zero norm; n of them for n orientations.
    quantity
        What was measured.
    echo_time_s, field_strength_t
        Of a phase; n times of n echoes.
    magnitude, noise_ppm
        (x, y, z), 0 or more in the mask; (n, x, y, z) or one magnitude of n echoes.
    chi_ppm, r2prime_hz
        (x, y, z), for networks that take them.
    keeps_outside
        Whether the field counts outside the mask too, where it is finite.
    axes
        Where x, y and z run to: letters such as ``LPS``, or an affine to RAS [mm]. ``None`` is not
        known: then nothing is flipped, and the axis nearest to B0 becomes the third.

    Raises
    ------
    DataError
        If an array has another shape or type, the mask is empty, or values inside it are not
        finite.
    GeometryError
        If the geometry is invalid, or two fields have the same B0 direction.
    UnitsError
        If the values cannot be in their unit.
    """
    fields = np.asarray(measured)
    if fields.ndim == 3:
        fields = fields[None]
    if fields.ndim != 4 or not np.issubdtype(fields.dtype, np.floating):
        raise DataError(
            f"the field has shape {np.shape(measured)} and type {fields.dtype}, expected floating "
            "numbers (x, y, z), or (n, x, y, z) for n orientations"
        )
    inside, notes = mask_from(fields[0] != 0 if mask is None else mask)
    x, y, z = inside.shape
    if fields.shape[1:] != inside.shape:
        raise DataError(f"the field has shape {fields.shape[1:]}, the mask {inside.shape}")
    directions = np.atleast_2d(np.asarray(b0_direction, dtype=np.float64))
    are_echoes = quantity == "phase_rad"
    if are_echoes:
        directions = np.repeat(directions[:1], len(fields), axis=0)
    times = () if echo_time_s is None else tuple(np.atleast_1d(echo_time_s).tolist())
    if are_echoes:
        require_times(len(fields), times)
    if directions.shape != (len(fields), 3):
        raise GeometryError(
            f"{len(fields)} fields need as many B0 directions (x, y, z), got an array of shape "
            f"{np.shape(b0_direction)}"
        )
    size = vector(voxel_size_mm)
    grids = [Geometry((x, y, z), size, vector(b)) for b in directions]
    for n in range(1, 1 if are_echoes else len(grids)):
        require_different([grid.b0_direction for grid in grids[: n + 1]], f"field {n + 1}")
    for field in fields:
        values = field[inside].astype(np.float32)
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise DataError(
                f"{bad} of {values.size} voxels inside the mask are NaN or Inf; take these voxels "
                "out of the mask, or repair the field"
            )
        if quantity == "phase_rad":
            notes += require_wrapped_phase(values)
        elif quantity == "total_field_ppm":
            require_total_ppm(values, "ppm")
        else:
            refuse_other_than_field(values)
            require_unwrapped(field, inside, turn=None)
            notes += require_ppm(values, "ppm")
    several = are_echoes and len(fields) > 1
    affine = affine_from(axes, size)
    notes += contradicted(axes, affine, grids[0])
    scan = Scan(
        outside_zero(fields, inside, keeps_outside=keeps_outside),
        inside,
        grids[0],
        nib.Nifti1Header(),
        affine,
        quantity=quantity,
        more_b0_directions=() if are_echoes else tuple(grid.b0_direction for grid in grids[1:]),
        echo_time_s=times[0] if times else None,
        more_echo_times_s=times[1:] if are_echoes else (),
        field_strength_t=field_strength_t,
        echo_weights=_weights(magnitude, inside, times) if several else None,
        magnitude=None if several else _trust("magnitude", magnitude, inside),
        chi_ppm=None if chi_ppm is None else _map("chi_ppm", chi_ppm, inside),
        r2prime_hz=_trust("r2prime_hz", r2prime_hz, inside),
        noise_ppm=_trust("noise_ppm", noise_ppm, inside),
        notes=notes,
    ).canonical()
    if quantity == "phase_rad":
        notes += undo_half_turns(scan.measured, scan.mask, scan.axes)
    return scan


def affine_from(axes: str | ArrayLike | None, voxel_size_mm: Vector) -> Affine | None:
    """Return a (4, 4) matrix from voxels to RAS [mm], if it is known where their axes run to.

    Parameters
    ----------
    axes
        Three letters, a (3, 3) or (4, 4) matrix whose columns are the directions of x, y and z in
        RAS, or ``None``.
    voxel_size_mm
        Along x, y and z.

    Raises
    ------
    GeometryError
        If it is none of these, or the directions are none of a straight grid.
    """
    if axes is None:
        return None
    found = directions_named(axes) if isinstance(axes, str) else np.asarray(axes, dtype=np.float64)
    if found.shape not in ((3, 3), (4, 4)):
        raise GeometryError(
            f"axes have shape {found.shape}, expected three letters such as LPS, or a (3, 3) or "
            "(4, 4) affine"
        )
    affine = np.eye(4)
    affine[: len(found), : len(found)] = found
    sizes = Geometry.from_affine((1, 1, 1), affine).voxel_size_mm
    if not any(np.allclose(sizes, own, rtol=1e-2) for own in (1, voxel_size_mm)):
        raise GeometryError(
            f"the affine has voxels of {vector_text(sizes)} mm, voxel_size_mm is "
            f"{vector_text(voxel_size_mm)}; pass the ones that are right"
        )
    affine[:3, :3] *= np.asarray(voxel_size_mm) / sizes
    return affine


def contradicted(axes: str | ArrayLike | None, affine: Affine | None, grid: Geometry) -> list[str]:
    """Return a note where an affine says that B0 lay elsewhere than what was stated."""
    if affine is None or isinstance(axes, str):
        return []
    header = Geometry.from_affine(grid.shape, affine)
    if grid.b0_angle_deg(header.b0_direction) <= SMALLEST_ANGLE_DEG:
        return []
    says = f"{vector_text(grid.b0_direction)} as stated, not {vector_text(header.b0_direction)}"
    return [f"B0 direction {says} as the affine says"]


def _trust(name: str, array: Any, mask: Mask) -> Volume | None:
    if array is None:
        return None
    values = np.asarray(array)
    if values.shape != mask.shape:
        raise DataError(f"{name} has shape {values.shape}, the mask {mask.shape}")
    if values.dtype.kind not in "fiub":
        raise DataError(f"{name} is of type {values.dtype}, expected real numbers")
    try:
        return require_trust(values, mask)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _weights(magnitude: Any, mask: Mask, times_s: Sequence[float]) -> Volume | None:
    """Return what each echo counts, by one magnitude of all or one of each."""
    if magnitude is None:
        return None
    given = np.asarray(magnitude)
    given = given[None] if given.ndim == 3 else given
    signal = [_trust("magnitude", one, mask) for one in given]
    return echo_weights(np.array(signal, dtype=np.float32), times_s)


def _map(name: str, array: Any, mask: Mask) -> Volume:
    values = np.asarray(array, dtype=np.float32)
    if values.shape != mask.shape:
        raise DataError(f"{name} has shape {values.shape}, the mask {mask.shape}")
    if not np.isfinite(values[mask]).all():
        raise DataError(f"{name}: NaN or Inf inside the mask; repair it")
    return np.where(mask, values, np.float32(0))


def mask_from(array: Any) -> tuple[Mask, list[str]]:
    """Return a mask, as :func:`mask_from_values` understands it, and notes.

    Raises
    ------
    DataError
        If it is no volume, holds NaN or Inf, or is no mask.
    """
    values = np.asarray(array)
    if values.ndim != 3:
        raise DataError(f"the mask has shape {values.shape}, expected (x, y, z)")
    return mask_from_values(values, "mask")


def vector(numbers: Sequence[float]) -> Vector:
    """Return three numbers.

    Raises
    ------
    GeometryError
        If they are not.
    """
    try:
        x, y, z = (float(n) for n in numbers)
    except (TypeError, ValueError):
        raise GeometryError(f"expected three numbers (x, y, z), got {numbers!r}") from None
    return x, y, z
