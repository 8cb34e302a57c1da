"""NIfTI volumes in and out, with their geometry intact."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import ArrayLike, NDArray

from qsm_deploy.kernels.errors import DataError, GeometryError
from qsm_deploy.kernels.geometry import Geometry

AFFINE_TOLERANCE_MM = 1e-2


@dataclass(frozen=True)
class NiftiVolume:
    """A 3-D volume with the header it came with.

    ``data`` is an (x, y, z) array as stored after the header's scaling.
    """

    path: Path
    data: NDArray[np.float32]
    header: nib.Nifti1Header
    affine: NDArray[np.float64]

    @property
    def geometry(self) -> Geometry:
        """The volume's grid, read off its affine."""
        return Geometry.from_affine(self.data.shape, self.affine)


def load_volume(path: Path) -> NiftiVolume:
    """Read a 3-D NIfTI volume (a trailing axis of length one is dropped).

    Raises
    ------
    DataError
        If the file is missing, truncated, not NIfTI, or holds complex values.
    GeometryError
        If the volume is not 3-D or its header's voxel sizes are not positive.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        image = nib.load(path)
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: not a readable NIfTI file ({_first_line(error)})") from error
    if not isinstance(image, nib.Nifti1Image):
        raise DataError(f"{path}: not a NIfTI file but {type(image).__name__}; convert it")
    shape = image.shape
    if len(shape) > 3 and set(shape[3:]) == {1}:
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 2:
        raise GeometryError(
            f"{path}: {len(image.shape)}-D of shape {image.shape}; one 3-D volume is needed: "
            "pass one echo or average at a time"
        )
    if np.iscomplexobj(np.empty(0, image.get_data_dtype())):
        raise DataError(f"{path}: complex values; pass a real field map")
    voxel_size = tuple(float(v) for v in image.header["pixdim"][1:4])
    if min(voxel_size) <= 0 or not np.all(np.isfinite(voxel_size)):
        raise GeometryError(
            f"{path}: the header's voxel size is {voxel_size} mm; it must be positive: "
            "correct the header"
        )
    try:
        data = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: truncated or damaged ({_first_line(error)})") from error
    return NiftiVolume(path, np.ascontiguousarray(data), image.header, image.affine)


def load_on_grid(path: Path, like: NiftiVolume) -> NiftiVolume:
    """Read a volume that must lie on the grid of ``like``.

    Raises
    ------
    GeometryError
        If shape or affine disagree (corner voxels more than 0.01 mm apart).
    """
    volume = load_volume(path)
    if volume.data.shape != like.data.shape:
        raise GeometryError(
            f"{path} has shape {volume.data.shape}, {like.path} has {like.data.shape}; "
            "resample one onto the other's grid"
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in like.data.shape])).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones(corners.shape[1])])
    apart = np.abs((volume.affine - like.affine) @ homogeneous).max()
    if apart > AFFINE_TOLERANCE_MM:
        raise GeometryError(
            f"the affines of {path} and {like.path} disagree: the same voxel lies up to "
            f"{apart:.3g} mm apart; resample one onto the other's grid or correct its header"
        )
    return volume


def nifti_bytes(
    data: ArrayLike,
    affine: NDArray[np.float64],
    *,
    description: str = "",
    like: nib.Nifti1Header | None = None,
    compress: bool = True,
) -> bytes:
    """Return a single-file NIfTI-1, gzip-compressed unless told otherwise.

    Parameters
    ----------
    data
        (x, y, z) array, stored in its own type without scaling.
    affine
        (4, 4) voxel-to-scanner (RAS mm) matrix; qform and sform with code 1 unless ``like``.
    description
        Header description, at most 79 ASCII characters.
    like
        A header whose qform, sform and their codes, units and ``dim_info`` are kept.
    """
    array = np.asarray(data)
    header = nib.Nifti1Header() if like is None else _spatial_header(like)
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["descrip"] = description.encode("ascii", "replace")[:79]
    image = nib.Nifti1Image(array, None if like is not None else affine, header)
    if like is None:
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        image.header.set_xyzt_units("mm")
    raw = image.to_bytes()
    return gzip.compress(raw, compresslevel=4, mtime=0) if compress else raw


def _spatial_header(like: nib.Nifti1Header) -> nib.Nifti1Header:
    """Return a fresh 3-D NIfTI-1 header with the spatial fields of ``like``, bit for bit."""
    header = nib.Nifti1Header()
    header.set_data_shape(like.get_data_shape()[:3])
    header["pixdim"][:4] = like["pixdim"][:4]
    for name in (
        "dim_info", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c",
        "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
    ):  # fmt: skip
        header[name] = like[name]
    return header


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
