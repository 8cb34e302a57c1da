"""Everything about one acquisition that a reconstruction needs, read and checked once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry, vector_text
from qsm_deploy.runtime.agreement import require_variation
from qsm_deploy.runtime.nifti import NiftiVolume, load_on_grid, load_volume
from qsm_deploy.runtime.params import Params
from qsm_deploy.runtime.units import FieldUnit, ppm_per_unit, require_ppm


class ScanFiles(NamedTuple):
    """The files of one acquisition; a truth and its labels exist for simulated ones."""

    field: Path
    mask: Path | None = None
    truth: Path | None = None
    labels: Path | None = None


@dataclass(frozen=True)
class Scan:
    """One acquisition on its grid.

    Attributes
    ----------
    local_field_ppm
        (x, y, z) float32, 0 outside the mask.
    mask
        (x, y, z) bool, True inside.
    geometry
        The grid, as understood from header, parameter file and flags.
    header, affine
        The field's NIfTI header and voxel-to-scanner matrix, for the output.
    truth_ppm, labels
        (x, y, z) true susceptibility and integer labels, if given.
    ppm_per_unit
        What the stored field was multiplied by.
    notes
        What the user should know about how the input was understood, a line each.
    """

    local_field_ppm: NDArray[np.float32]
    mask: NDArray[np.bool_]
    geometry: Geometry
    header: nib.Nifti1Header
    affine: NDArray[np.float64]
    truth_ppm: NDArray[np.float32] | None = None
    labels: NDArray[np.integer] | None = None
    ppm_per_unit: float = 1.0
    notes: list[str] = field(default_factory=list)


def load_scan(files: ScanFiles, units: FieldUnit, flags: Params, from_file: Params) -> Scan:
    """Read a field map and what belongs to it.

    Parameters
    ----------
    files
        The NIfTI files, all on the field's grid.
    units
        Unit of the field.
    flags, from_file
        Parameters that the user states and those of a parameter file; a flag wins over the
        file, the file over the header, and what differs is noted.

    Raises
    ------
    DataError
        If a file is unreadable, the mask is empty, or values inside it are NaN or Inf.
    GeometryError
        If a volume is on another grid, or the geometry is invalid.
    UnitsError
        If the field cannot be in the stated unit, or the unit lacks its parameters.
    """
    notes: list[str] = []
    scale = ppm_per_unit(
        units,
        echo_time_s=_stated(flags.echo_time_s, from_file.echo_time_s),
        field_strength_t=_stated(flags.field_strength_t, from_file.field_strength_t),
    )
    volume = load_volume(files.field)
    geometry = _geometry(volume, flags, from_file, notes)
    mask = _mask(files.mask, volume, notes)
    _require_finite(files.field, volume.data, mask, masked=files.mask is not None)
    local_field_ppm = np.where(mask, volume.data, np.float32(0))
    local_field_ppm *= np.float32(scale)
    notes += require_ppm(local_field_ppm[mask], units)
    truth = None if files.truth is None else _truth(files.truth, volume, mask)
    labels = None if files.labels is None else _labels(files.labels, volume)
    return Scan(
        local_field_ppm, mask, geometry, volume.header, volume.affine, truth, labels, scale, notes
    )


def _geometry(volume: NiftiVolume, flags: Params, from_file: Params, notes: list[str]) -> Geometry:
    """Return the header's geometry with what was stated instead; note what differs."""
    header = volume.geometry
    if not (volume.header["sform_code"] or volume.header["qform_code"]):
        notes.append("the header has neither qform nor sform: taking B0 along the third voxel axis")
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
            direction = stated.b0_direction
    return Geometry(header.shape, voxel_size, direction)


def _mask(path: Path | None, volume: NiftiVolume, notes: list[str]) -> NDArray[np.bool_]:
    if path is None:
        mask: NDArray[np.bool_] = volume.data != 0
        share = 100 * mask.mean()
        notes.append(f"no mask given: taking the non-zero field, {share:.0f} % of the volume")
        if not mask.any():
            raise DataError(f"{volume.path}: the field is zero everywhere; check the file")
        return mask
    data = load_on_grid(path, volume).data
    if bad := int(np.count_nonzero(~np.isfinite(data))):
        raise DataError(f"{path}: {bad} voxels of the mask are NaN or Inf; use 0 and 1")
    if not data.any():
        raise DataError(f"{path}: the mask is empty; pass one that is non-zero inside the brain")
    mask = data != 0
    return mask


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


def _truth(path: Path, volume: NiftiVolume, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    truth = load_on_grid(path, volume).data
    _require_finite(path, truth, mask, masked=True)
    require_variation(truth[mask].astype(np.float64))
    return truth


def _labels(path: Path, volume: NiftiVolume) -> NDArray[np.integer]:
    data = load_on_grid(path, volume).data
    if not np.isfinite(data).all() or (data != np.rint(data)).any():
        raise DataError(f"{path}: labels must be whole numbers, one per region")
    return data.astype(np.int16)


def _stated(flag: float | None, from_file: float | None) -> float | None:
    return from_file if flag is None else flag
