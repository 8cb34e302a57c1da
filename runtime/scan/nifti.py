"""NIfTI volumes in and out, with their geometry intact."""

import gzip
import logging
import math
import os
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import data_type_codes, xform_codes
from nibabel.spatialimages import HeaderDataError, SpatialImage
from numpy.typing import ArrayLike, NDArray

from qsm_deploy.kernels.errors import DataError, GeometryError
from qsm_deploy.kernels.geometry import Geometry

AFFINE_TOLERANCE_MM = 1e-2
GZIP_MAGIC = b"\x1f\x8b"
_LOG = logging.getLogger(__name__)
_LOG.addHandler(logging.NullHandler())


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
    """Read a 3-D NIfTI-1 or NIfTI-2 volume (trailing axes of length one are dropped).

    The kind of file and its compression are told from its content, not from its name.

    Raises
    ------
    DataError
        If the file is missing, truncated, damaged, not NIfTI, or not real-valued.
    GeometryError
        If the volume is not 3-D or its header's geometry is invalid.
    """
    raw = _decompressed(path)
    header_class = _header_class(path, raw)
    try:
        # unchecked, because nibabel's check replaces voxel sizes and codes by plausible ones
        header = header_class.from_fileobj(BytesIO(raw), check=False)
        shape = _spatial_shape(path, header.get_data_shape())
        _check_type_and_size(path, header, len(raw))
        _check_stored_geometry(path, header)
        header.check_fix(logger=_LOG)  # what is left to repair does no harm
        affine = header.get_best_affine()
        data = header.data_from_fileobj(BytesIO(raw)).reshape(shape)
    except (HeaderDataError, ValueError) as error:
        raise DataError(
            f"{path}: damaged header ({_first_line(error)}); convert it again"
        ) from error
    try:
        Geometry.from_affine(shape, affine)
    except GeometryError as error:
        raise GeometryError(f"{path}: {error}") from None
    with np.errstate(over="ignore"):  # beyond float32 is Inf, for the caller to find
        return NiftiVolume(path, np.ascontiguousarray(data, dtype=np.float32), header, affine)


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


def on_grid(path: Path, like: Path) -> bool:
    """Return whether two files have the same shape and affine, by their headers alone.

    A file without a header that can be read is on no other's grid.
    """
    try:
        image, other = nib.load(path), nib.load(like)
    except (OSError, EOFError, ImageFileError, HeaderDataError, ValueError, zlib.error):
        return False
    if not (isinstance(image, SpatialImage) and isinstance(other, SpatialImage)):
        return False
    return image.shape[:3] == other.shape[:3] and np.allclose(
        image.affine, other.affine, rtol=0, atol=AFFINE_TOLERANCE_MM
    )


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


def _decompressed(path: Path) -> bytes:
    """Return the whole content, whose checksum gzip has then verified."""
    if not os.path.isfile(path):  # unlike Path.is_file it takes a name of any length
        seen = "a folder" if os.path.isdir(path) else "no such file"
        raise DataError(f"{path}: {seen}; pass one .nii or .nii.gz file")
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: truncated or damaged ({_first_line(error)}); copy or convert it again"
        ) from error


def _header_class(path: Path, raw: bytes) -> type[nib.Nifti1Header]:
    if raw[344:348] == b"n+1\0":
        return nib.Nifti1Header
    if raw[4:8] == b"n+2\0":
        return nib.Nifti2Header
    raise DataError(
        f"{path}: not a single-file NIfTI, or cut within its header ({len(raw)} bytes); "
        "convert it to .nii or .nii.gz"
    )


def _spatial_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) < 3 or min(shape[:3]) < 2 or set(shape[3:]) - {1}:
        raise GeometryError(
            f"{path}: {len(shape)}-D of shape {shape}; one 3-D volume, of two voxels or more "
            "on every axis, is needed: pass one echo or average at a time"
        )
    x, y, z = shape[:3]
    return x, y, z


def _check_type_and_size(path: Path, header: nib.Nifti1Header, file_bytes: int) -> None:
    code = int(header["datatype"])
    if code not in data_type_codes.value_set() or header.get_data_dtype().kind not in "iuf":
        raise DataError(
            f"{path}: voxels of NIfTI datatype {code}, neither integer nor floating-point; "
            "pass a real-valued map"
        )
    dtype = header.get_data_dtype()
    announced = header.get_data_offset() + math.prod(header.get_data_shape()) * dtype.itemsize
    if file_bytes < announced:
        raise DataError(
            f"{path}: truncated, {file_bytes} bytes of the {announced} that its header announces; "
            "copy or convert it again"
        )


def _check_stored_geometry(path: Path, header: nib.Nifti1Header) -> None:
    voxel_size = tuple(float(v) for v in header["pixdim"][1:4])
    if not all(0 < v < math.inf for v in voxel_size):
        raise GeometryError(
            f"{path}: the header's voxel size is {voxel_size} mm; it must be positive on every "
            "axis: correct the header"
        )
    for name in ("qform_code", "sform_code"):
        code = int(header[name])
        if code not in xform_codes.value_set():
            raise GeometryError(
                f"{path}: the header's {name} is {code}, which means nothing; correct the header"
            )


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
