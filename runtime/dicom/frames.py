"""The files of a folder of DICOM: their frames by headers alone, and what is read of them later."""

import os
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, FileIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsm_deploy.kernels.errors import DataError, MissingDependencyError
from qsm_deploy.runtime.console.command import require_installed
from qsm_deploy.runtime.dicom.headers import PER_FRAME, Frame, flat, frame_of, tags

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

LIBRARIES = ("pydicom", "dcm2niix")
MOST_INFLATED, PIECE_BYTES = 1 << 28, 1 << 20  # of a file


@dataclass(frozen=True)
class Headers:
    """What a folder holds: frames of MR images that say where they lie; how many other files."""

    frames: tuple[Frame, ...]
    others: int


def read_frames(folder: Path) -> Headers:
    """Read the headers of all MR images in a folder and those below it, each once.

    Raises
    ------
    MissingDependencyError
        If the extra ``dicom`` is not installed.
    DataError
        If it is no folder, or an image in it is damaged.
    """
    require_installed(LIBRARIES, "dicom", "DICOM")
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; pass the one that holds the DICOM files")
    frames: dict[Any, Frame] = {}  # archives give the same one twice at times
    others = 0
    for path in sorted(_files(folder)):
        found = _frames_of(path)
        others += not found
        for f in found:
            what = (f.instance or path, f.number, f.series, f.role, f.echo_time_s, *f.position_mm)
            frames.setdefault(what, f)
    return Headers(tuple(frames.values()), others)


def _files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; repair it or leave it out") from error

    for above, _, names in os.walk(folder, onerror=fail):
        yield from (path for name in names if (path := Path(above, name)).is_file())


def _frames_of(path: Path) -> list[Frame]:
    """Return the frames of a file, none if it holds no MR image."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError
    from pydicom.uid import EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage
    from pydicom.uid import MRImageStorage as Classic

    enhanced = (EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage)
    with damaged(path):
        try:
            with _Opened(FileIO(str(path))) as file:
                header = dcmread(file, stop_before_pixels=True, specific_tags=[*tags()])
        except InvalidDicomError:
            return []
        kind = str(header.get("SOPClassUID", ""))
        made: Iterable[Frame | None] = ()
        if kind == Classic:
            made = (frame_of(path, None, header, header),)
        elif kind in enhanced:
            count = len(header.get(PER_FRAME) or ())
            made = [frame_of(path, n, flat(header, n), header) for n in range(count)]
        return [*filter(None, made)]


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Say which file it is that pydicom cannot read, and keep quiet about small sins against VRs.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DataError, MissingDependencyError, MemoryError):
        raise
    except Exception as error:  # of many kinds, for bytes that are no DICOM
        raise DataError(
            f"{path}: a damaged DICOM file ({type(error).__name__}: {error}); get it again"
        ) from error


def classics(frames: Iterable[Frame], *, pixels: bool = False) -> Iterator["Dataset"]:
    """Return what is said of each frame as classic images say it; pixels as plain numbers.

    Parameters
    ----------
    frames
        In any order; those of one file that follow each other cost one reading.
    pixels
        Whether the pixels are wanted, too.

    Raises
    ------
    DataError
        If a file cannot be read any more, or its pixels not be decompressed.
    """
    for path, of_file in groupby(frames, key=lambda frame: frame.path):
        with damaged(path):
            read = _read(path, pixels=pixels)
        for frame in of_file:
            with damaged(path):
                said = read if frame.number is None else flat(read, frame.number)
                said.file_meta = read.file_meta
                if pixels and frame.number is not None:
                    size = read.Rows * read.Columns * read.BitsAllocated // 8
                    start = frame.number * size
                    said.add_new("PixelData", "OW", read.PixelData[start : start + size])
            yield said


class _Opened(BufferedReader):
    """A file for pydicom, which reads without a size what is deflated, and inflates all of it."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return so many bytes, or all that are left, unless these inflate to too many."""
        content = super().read(size)
        inflating, packed, count = zlib.decompressobj(-zlib.MAX_WBITS), content, 0
        while size == -1 and packed:
            count += len(inflating.decompress(packed, PIECE_BYTES))
            packed = inflating.unconsumed_tail
            if count > MOST_INFLATED:
                raise DataError(
                    f"{self.name}: inflates to more than {MOST_INFLATED >> 20} MiB; write it again "
                    "in another transfer syntax than deflated"
                )
        return content


def _read(path: Path, *, pixels: bool) -> "Dataset":
    from pydicom import dcmread

    with _Opened(FileIO(str(path))) as file:
        read = dcmread(file, stop_before_pixels=not pixels)
    if pixels and read.file_meta.TransferSyntaxUID.is_compressed:
        read.decompress(generate_instance_uid=False)
    elif pixels and not read.file_meta.TransferSyntaxUID.is_little_endian:  # as once
        values = read.pixel_array
        read.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    return read
