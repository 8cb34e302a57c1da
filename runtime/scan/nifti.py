"""NIfTI volumes in and out, with their geometry intact."""

import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from nibabel.nifti1 import data_type_codes
from nibabel.spatialimages import HeaderDataError
from numpy.typing import ArrayLike, NDArray

from qsm_deploy.kernels.errors import DataError, GeometryError, QsmDeployError
from qsm_deploy.kernels.geometry import Geometry, Shape
from qsm_deploy.runtime.console.inputs import require_files
from qsm_deploy.runtime.scan.axes import STORED, Axes, axes_between
from qsm_deploy.runtime.scan.gzip_members import GZIP_MAGIC, PIECE_BYTES, pieces, unpacked
from qsm_deploy.runtime.scan.transforms import Affine, Transforms, transforms_of

AFFINE_TOLERANCE_MM = 1e-2
HEAD_BYTES = 548  # of a NIfTI-2 file, with the size of its first extension
LARGEST_OFFSET = 1 << 30
ROUNDED_DIGITS = 4  # of a direction, 0.003 degrees: what a quaternion tells of a single tilt
CONVERT = "convert it to NIfTI"
# what else is handed over for a NIfTI file, by the bytes at a place
OTHER_KINDS = (
    (128, b"DICM", "a DICOM image; pass its folder: qsm-run --dicom FOLDER"),
    (344, b"ni1\0", f"the header of a NIfTI pair (.hdr and .img); {CONVERT} in one file"),
    (0, b"\x5c\x01\x00\x00", f"an Analyze header (.hdr), which knows no orientation; {CONVERT}"),
    (0, b"\x00\x00\x01\x5c", f"an Analyze header (.hdr), which knows no orientation; {CONVERT}"),
    (0, b"NRRD", f"an NRRD file; {CONVERT}"),
    (0, b"\x89HDF", f"an HDF5 file (MINC, MATLAB 7.3); {CONVERT}"),
    (0, b"CDF", f"a MINC file; {CONVERT}"),
    (0, b"MATLAB", f"a MATLAB file; {CONVERT}"),
    (0, b"\x93NUMPY", f"a NumPy array; {CONVERT}, or use qsm.reconstruct in Python"),
    (0, b"PK\x03\x04", "a ZIP archive; unpack it and pass a file in it"),
    (0, b"\x89PNG", "a PNG picture; pass the map that it was drawn from"),
    (0, b"{", "JSON; pass the .nii or .nii.gz that it lies beside"),
)
_LOG = logging.getLogger(__name__)
_LOG.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class NiftiVolume:
    """A 3-D volume with the header it came with.

    ``data`` is an (x, y, z) array as stored after the header's scaling, ``notes`` what the user
    should know of how it was read.
    """

    path: Path
    data: NDArray[np.float32]
    header: nib.Nifti1Header
    transforms: Transforms
    notes: tuple[str, ...] = ()

    @property
    def affine(self) -> Affine:
        """The (4, 4) matrix from voxels to RAS [mm] that tells voxel size and B0."""
        return self.transforms.affine

    @property
    def geometry(self) -> Geometry:
        """The volume's grid, read off its affine; the same in every order of storage."""
        grid = Geometry.from_affine(self.data.shape, self.affine)
        if not self.transforms.is_rounded:
            return grid
        x, y, z = np.array(grid.voxel_size_mm, dtype=np.float32).tolist()
        across, up, through = np.round(grid.b0_direction, ROUNDED_DIGITS).tolist()
        return Geometry(grid.shape, (x, y, z), (across, up, through))

    def turned(self, axes: Axes) -> "NiftiVolume":
        """Return the volume in axes that are made of its own; its header stays."""
        if axes == STORED:
            return self
        shape = _shape_of(self.data)
        transforms = replace(
            self.transforms,
            affine=axes.affine(self.affine, shape),
            all=tuple(axes.affine(affine, shape) for affine in self.transforms.all),
        )
        return replace(self, data=axes.turn(self.data), transforms=transforms)

    @property
    def directed_affine(self) -> Affine | None:
        """The affine, unless the header knows no directions."""
        return None if self.transforms.source is None else self.affine

    @property
    def description(self) -> str:
        """What the header says of it, in words."""
        return bytes(self.header["descrip"].item()).decode("latin-1")

    @property
    def scaling(self) -> tuple[float, float]:
        """Slope and intercept that the header applied."""
        slope, intercept = self.header.get_slope_inter()
        return (1.0, 0.0) if slope is None else (slope, intercept)


def load_volume(path: Path) -> NiftiVolume:
    """Read a 3-D NIfTI-1 or NIfTI-2 volume (trailing axes of length one are dropped).

    Raises
    ------
    DataError
        If the file is missing, not downloaded, truncated, damaged, not NIfTI, or not real-valued.
    GeometryError
        If the volume is not 3-D or its header's geometry is invalid.
    """
    volumes = load_volumes(path)
    if len(volumes) > 1:
        raise GeometryError(
            f"{path}: 4-D of shape {(*volumes[0].data.shape, len(volumes))}; one 3-D volume is "
            "needed: several echoes go with --phase and --magnitude"
        )
    return volumes[0]


def load_volumes(path: Path) -> list[NiftiVolume]:
    """Read the volumes of a file, one or several along a fourth axis.

    The kind of file and its compression are told from its content, not from its name.

    Raises
    ------
    DataError, GeometryError
        As :func:`load_volume`.
    """
    content = _content(path)
    with _faults_of(path):
        header, shape, assumed = _read_header(path, content)
        announced = header.get_data_offset() + _data_bytes(header)
        raw, left = unpacked(content, announced)
        if assumed and left:
            raise DataError(f"{path}: {assumed[0]}, but {left[0]} follow; correct the header")
        if len(raw) < announced:
            raise DataError(
                f"{path}: truncated, {len(raw)} bytes of the {announced} that its header "
                "announces; copy or convert it again"
            )
        transforms = _transforms(path, header)
        header.check_fix(logger=_LOG)  # what is left to repair does no harm
        data = header.data_from_fileobj(BytesIO(raw)).reshape((*shape, -1))
    with np.errstate(over="ignore"):  # beyond float32 is Inf, for the caller to find
        values = [np.ascontiguousarray(v, np.float32) for v in np.moveaxis(data, 3, 0)]
    notes = tuple(f"{path}: {n}" for n in (*assumed, *(f"{rest} were ignored" for rest in left)))
    return [NiftiVolume(path, volume, header, transforms, notes) for volume in values]


def load_on_grid(path: Path, like: NiftiVolume) -> NiftiVolume:
    """Read a volume that must lie on the grid of ``like``; see :func:`on_grid_of`."""
    return on_grid_of(load_volume(path), like)


def on_grid_of(volume: NiftiVolume, like: NiftiVolume) -> NiftiVolume:
    """Return a volume that must lie on the grid of ``like``, by one of the transforms of each.

    One whose axes are stored in another order is turned into that of ``like``.

    Raises
    ------
    GeometryError
        If shape or affine disagree (corner voxels more than 0.01 mm apart).
    """
    path = volume.path
    shape, wanted = (_shape_of(v.data) for v in (volume, like))
    apart, axes = _apart_mm(volume.transforms, shape, like.transforms, wanted)
    if apart == math.inf:
        raise GeometryError(
            f"{path} has shape {volume.data.shape}, {like.path} has {like.data.shape}; "
            "resample one onto the other's grid"
        )
    if apart > AFFINE_TOLERANCE_MM:
        raise GeometryError(
            f"the affines of {path} and {like.path} disagree: the same voxel lies up to "
            f"{apart:.3g} mm apart; resample one onto the other's grid or correct its header"
        )
    return volume.turned(axes)


def on_grid(path: Path, like: Path) -> bool:
    """Return whether two files have the same grid, by their headers alone.

    A file without a header that can be read is on no other's grid.
    """
    try:
        (one, shape), (other, its) = (_grid(p) for p in (path, like))
    except QsmDeployError:
        return False
    return _apart_mm(one, shape, other, its)[0] <= AFFINE_TOLERANCE_MM


def _grid(path: Path) -> tuple[Transforms, tuple[int, int, int]]:
    content = _content(path, PIECE_BYTES)
    with _faults_of(path):
        header, shape, _ = _read_header(path, content)
        return _transforms(path, header), shape


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """Raise what nibabel and zlib find as errors of the data."""
    try:
        yield
    except (HeaderDataError, ValueError) as error:
        raise DataError(
            f"{path}: damaged header ({_first_line(error)}); convert it again"
        ) from error
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: truncated or damaged ({_first_line(error)}); copy or convert it again"
        ) from error


def _shape_of(volume: NDArray[np.float32]) -> Shape:
    x, y, z = volume.shape
    return x, y, z


def _apart_mm(
    one: Transforms, shape: Shape, other: Transforms, wanted: Shape
) -> tuple[float, Axes]:
    """Return how far the corners of two grids lie apart at most, and how the one is turned for it.

    By the transforms that agree best; infinitely far where the shapes differ.
    """
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in wanted])).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones(corners.shape[1])])
    found = []
    for a in one.all:
        for b in other.all:
            for axes in dict.fromkeys((STORED, axes_between(a, b))):
                if axes.sizes(shape) == wanted:
                    apart = np.abs((axes.affine(a, shape) - b) @ homogeneous).max()
                    found.append((float(apart), axes))
    return min(found, key=lambda pair: pair[0], default=(math.inf, STORED))


def nifti_bytes(
    data: ArrayLike,
    affine: Affine | None,
    *,
    description: str = "",
    like: nib.Nifti1Header | None = None,
    slope: float = 1.0,
    compress: bool = True,
) -> bytes:
    """Return a single-file NIfTI-1, gzip-compressed unless told otherwise.

    Parameters
    ----------
    data
        (x, y, z) array, stored in its own type.
    affine
        (4, 4) voxel-to-scanner (RAS mm) matrix, for qform and sform with code 1; not read where
        there is a ``like``.
    description
        Header description, at most 79 ASCII characters.
    like
        A header whose qform, sform and their codes, units and ``dim_info`` are kept.
    slope
        What readers multiply the array by; they add nothing.
    """
    array = np.asarray(data)
    header = nib.Nifti1Header() if like is None else _spatial_header(like)
    header.set_data_dtype(array.dtype)
    header["descrip"] = description.encode("ascii", "replace")[:79]
    image = nib.Nifti1Image(array, None if like is not None else affine, header)
    if like is None:
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(slope, 0)  # of a header that it is made of it forgets them
    raw = image.to_bytes()
    return gzip.compress(raw, compresslevel=4, mtime=0) if compress else raw


def _content(path: Path, most: int = -1) -> bytes:
    require_files([path])
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read_header(
    path: Path, content: bytes
) -> tuple[nib.Nifti1Header, tuple[int, int, int], list[str]]:
    """Return a header whose data lie where it says, the volume's shape, and what was assumed."""
    head = content[:HEAD_BYTES]
    if content.startswith(GZIP_MAGIC):
        head = b""
        for piece, _ in pieces(content):
            head += piece[:HEAD_BYTES]
            if len(head) >= HEAD_BYTES:
                break
    header_class = _header_class(path, head)
    # unchecked, because nibabel's check replaces voxel sizes and codes by plausible ones
    header = header_class.from_fileobj(BytesIO(head[: header_class.sizeof_hdr]), check=False)
    shape = _spatial_shape(path, header.get_data_shape())
    _check_type(path, header)
    notes = _check_offset(path, header, head)
    voxel_size = tuple(float(v) for v in header["pixdim"][1:4])
    if not all(0 < v < math.inf for v in voxel_size):
        raise GeometryError(
            f"{path}: the header's voxel size is {voxel_size} mm; it must be positive on every "
            "axis: correct the header"
        )
    return header, shape, notes


def _header_class(path: Path, head: bytes) -> type[nib.Nifti1Header]:
    if head[344:348] == b"n+1\0":
        return nib.Nifti1Header
    if head[4:8] == b"n+2\0":
        return nib.Nifti2Header
    for place, magic, kind in OTHER_KINDS:
        whole = len(head) >= nib.AnalyzeHeader.sizeof_hdr or "Analyze" not in kind
        if head[place : place + len(magic)] == magic and whole:
            raise DataError(f"{path}: {kind}")
    raise DataError(
        f"{path}: not a single-file NIfTI, or cut within its header ({len(head)} bytes); "
        "convert it to .nii or .nii.gz"
    )


def _spatial_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) < 3 or min(shape[:3]) < 2 or set(shape[4:]) - {1} or 0 in shape:
        raise GeometryError(
            f"{path}: {len(shape)}-D of shape {shape}; one 3-D volume, of two voxels or more "
            "on every axis, is needed"
        )
    x, y, z = shape[:3]
    return x, y, z


def _check_type(path: Path, header: nib.Nifti1Header) -> None:
    code = int(header["datatype"])
    if code not in data_type_codes.value_set() or header.get_data_dtype().kind not in "iuf":
        raise DataError(
            f"{path}: voxels of NIfTI datatype {code}, neither integer nor floating-point; "
            "pass a real-valued map"
        )


def _data_bytes(header: nib.Nifti1Header) -> int:
    return int(math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize)


def _check_offset(path: Path, header: nib.Nifti1Header, head: bytes) -> list[str]:
    """Refuse voxels within the header, unless an offset of 0 means right after it."""
    least, offset = int(header.single_vox_offset), float(header["vox_offset"])
    extends = head[least - 4 : least - 3] != b"\0"
    if extends and offset in (0, least):
        order: Literal["big", "little"] = "big" if header.endianness == ">" else "little"
        size = int.from_bytes(head[least : least + 4], order)
        if size and size % 16 == 0 and size < LARGEST_OFFSET:
            raise DataError(
                f"{path}: the header's vox_offset is {offset:g}, where an extension of {size} "
                "bytes lies; correct the header"
            )
    if offset == 0 and not extends:
        header["vox_offset"] = least
        return [f"vox_offset is 0: reading the voxels from byte {least}, after the header"]
    if not (least <= offset < LARGEST_OFFSET and offset == int(offset)):
        raise DataError(
            f"{path}: the header's vox_offset is {offset:g}, it must be {least} or more; correct "
            "the header"
        )
    return []


def _transforms(path: Path, header: nib.Nifti1Header) -> Transforms:
    try:
        with np.errstate(all="ignore"):  # numbers beyond all sense are refused, not warned of
            transforms = transforms_of(header)
        Geometry.from_affine((2, 2, 2), transforms.affine)
    except GeometryError as error:
        raise GeometryError(f"{path}: {error}") from None
    return transforms


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
