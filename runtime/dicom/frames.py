"""What the images in a folder say of themselves, classic ones and frames of enhanced ones alike.

Only headers are read. An enhanced file says of each frame in sequences what a classic file says at
its top; :func:`flat` makes the second of the first.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Role = Literal["phase", "magnitude", "real", "imaginary"]
WORDS: dict[Role, tuple[str, ...]] = {  # of ImageType from the third on, or ComplexImageComponent
    "phase": ("P", "PHASE", "PHASE MAP", "PHASE_MAP", "P_FFE"),
    "magnitude": ("M", "MAGNITUDE", "M_FFE", "M_SE", "M_IR"),
    "real": ("R", "REAL", "R_FFE"),
    "imaginary": ("I", "IMAGINARY", "IMAG", "I_FFE"),
}
GE_ROLES: tuple[Role, ...] = ("magnitude", "phase", "real", "imaginary")
GE_IMAGE_TYPE, GE_OWNER = 0x0043102F, 0x00430010  # which says whose the first is
PER_FRAME, SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
LIBRARIES = ("pydicom", "dcm2niix")
WHERE = {  # an image lies, and how many numbers say it
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "Rows": 1,
    "Columns": 1,
}
MS = 1e-3


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice of one echo, and what its header says.

    Attributes
    ----------
    path, number
        Its file, and which frame of an enhanced one it is; ``None`` is a classic image.
    instance, study, series, frame_of_reference
        UIDs, of the file and of what it belongs to.
    patient
        Name and identifier, compared and never shown.
    series_number, description
        Of the series.
    role
        What it is of a complex image, if it says so.
    image_type, sequence, sequence_name
        The words of ``ImageType``, and of ``ScanningSequence``; what the vendor calls it.
    acquired
        Date and time of the acquisition.
    echo_number, echo_time_s, field_strength_t, frequency_mhz
        ``None`` where it is not stated.
    manufacturer
        Of the scanner.
    rescale
        Slope and intercept, if there are some, and the unit that they lead to, ``RescaleType``.
    real_world
        The same of a real world value mapping.
    encoded, lossy
        Whether the pixels are anything but whole numbers in little-endian order, and whether that
        lost something.
    position_mm, orientation
        (3,) and (2, 3), of the first pixel's centre and along a row and a column, LPS.
    spacing_mm
        Between rows, and between columns.
    shape
        Rows and columns.
    """

    path: Path
    number: int | None
    instance: str
    study: str
    series: str
    frame_of_reference: str
    patient: str
    series_number: int
    description: str
    role: Role | None
    image_type: tuple[str, ...]
    sequence: tuple[str, ...]
    sequence_name: str
    acquired: str
    echo_number: int | None
    echo_time_s: float | None
    field_strength_t: float | None
    frequency_mhz: float | None
    manufacturer: str
    rescale: tuple[float, float, str] | None
    real_world: tuple[float, float, str] | None
    encoded: bool
    lossy: bool
    position_mm: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]


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
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise MissingDependencyError(library, "dicom", "DICOM")
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
            header = dcmread(path, stop_before_pixels=True, specific_tags=[*_tags()])
        except InvalidDicomError:
            return []
        kind = str(header.get("SOPClassUID", ""))
        made: Iterable[Frame | None] = ()
        if kind == Classic:
            made = (_frame(path, None, header, header),)
        elif kind in enhanced:
            count = len(header.get(PER_FRAME) or ())
            made = [_frame(path, n, flat(header, n), header) for n in range(count)]
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


def flat(header: "Dataset", number: int) -> "Dataset":
    """Return what an enhanced file says of one frame as a classic file would say it.

    Parameters
    ----------
    header
        With its functional groups.
    number
        Of the frame, from 0.
    """
    from pydicom.dataset import Dataset

    made = Dataset()
    groups = [*(header.get(SHARED) or ())[:1], header[PER_FRAME][number]]
    for element in header:
        if element.keyword not in (PER_FRAME, SHARED, "NumberOfFrames"):
            made.add(element)
    for group in groups:
        for element in group:
            if element.VR != "SQ" or not element.value or element.tag.is_private:
                continue  # Philips has a whole other header in a private one
            if element.keyword in ("RealWorldValueMappingSequence", "ReferencedImageSequence"):
                made.add(element)
            else:
                made.update(element.value[0])
    for name, enhanced in NAMES.items():
        if enhanced in made:
            setattr(made, name, made.get(enhanced))
    return made


NAMES = {  # what a classic image calls it, and an enhanced one
    "ImageType": "FrameType",
    "EchoTime": "EffectiveEchoTime",
    "ImagingFrequency": "TransmitterFrequency",
    "AcquisitionDateTime": "FrameAcquisitionDateTime",
}


def _frame(path: Path, number: int | None, said: "Dataset", header: "Dataset") -> Frame | None:
    """Return a frame, unless it does not say where it lies."""
    position, orientation, spacing, rows, columns = where = [
        _numbers(said, name, count) for name, count in WHERE.items()
    ]
    if not all(where) or min(*spacing, *rows, *columns) <= 0:
        return None
    echo_ms, frequency = _numbers(said, "EchoTime", 1), _numbers(said, "ImagingFrequency")
    strength, echo = _numbers(said, "MagneticFieldStrength", 1), _numbers(said, "EchoNumbers", 1)
    series = _numbers(said, "SeriesNumber", 1)
    syntax = header.file_meta.get("TransferSyntaxUID")
    return Frame(
        path,
        number,
        str(header.get("SOPInstanceUID", "")),
        str(said.get("StudyInstanceUID", "")),
        str(said.get("SeriesInstanceUID", "")),
        str(said.get("FrameOfReferenceUID", "")),
        f"{said.get('PatientID', '')}\n{said.get('PatientName', '')}",
        int(series[0]) if series else 0,
        str(said.get("SeriesDescription", "") or ""),
        _role(said),
        _words(said, "ImageType"),
        _sequence(said),
        str(said.get("SequenceName", "") or said.get("PulseSequenceName", "") or ""),
        "".join(str(said.get(n, "") or "") for n in ("AcquisitionDate", "AcquisitionTime"))
        or str(said.get("AcquisitionDateTime", "") or ""),
        int(echo[0]) if echo else None,
        echo_ms[0] * MS if echo_ms else None,
        strength[0] if strength else None,
        frequency[0] if frequency else None,
        str(said.get("Manufacturer", "") or ""),
        _rescale(said),
        _real_world(said),
        bool(syntax)
        and (syntax.is_encapsulated or syntax.is_deflated or not syntax.is_little_endian),
        str(said.get("LossyImageCompression", "")) == "01",
        np.array(position),
        np.array(orientation).reshape(2, 3),
        (spacing[0], spacing[1]),
        (int(rows[0]), int(columns[0])),
    )


def _tags() -> Iterator[Any]:
    """Return what is read of a header: a tenth of what scanners write."""
    yield from (PER_FRAME, SHARED, GE_IMAGE_TYPE, GE_OWNER, *NAMES, *NAMES.values())
    yield from (
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
    )
    yield from ("PatientID", "PatientName", "SeriesNumber", "SeriesDescription", "Manufacturer")
    yield from ("ComplexImageComponent", "ScanningSequence", "EchoPulseSequence", "EchoNumbers")
    yield from ("SequenceName", "PulseSequenceName")
    yield from ("AcquisitionDate", "AcquisitionTime", "MagneticFieldStrength")
    yield from ("RescaleSlope", "RescaleIntercept", "RescaleType", "RealWorldValueMappingSequence")
    yield from ("LossyImageCompression", *WHERE)


def _numbers(said: "Dataset", name: str, count: int | None = None) -> tuple[float, ...]:
    """Return the numbers of an element, nothing if they are not so many, or no finite numbers."""
    try:
        value = said.get(name)
        values = tuple(map(float, [value] if isinstance(value, str | float | int) else value))
    except (TypeError, ValueError):
        return ()
    return values if count in (None, len(values)) and np.isfinite(values).all() else ()


def _words(said: "Dataset", name: str) -> tuple[str, ...]:
    value = said.get(name) or ()
    return tuple(str(w).strip().upper() for w in ([value] if isinstance(value, str) else value))


def _sequence(said: "Dataset") -> tuple[str, ...]:
    """Return the words of ``ScanningSequence``, in which GR is a gradient echo."""
    kind = str(said.get("EchoPulseSequence", "") or "").upper()
    return (
        ("GR",)
        if kind in ("GRADIENT", "BOTH")
        else _words(said, "ScanningSequence") or ((kind,) if kind else ())
    )


def _role(said: "Dataset") -> Role | None:
    """Return what an image is of a complex one, if it says one thing."""
    owner = said.get(GE_OWNER)
    is_ge = owner is None or str(owner.value).startswith("GEMS")
    if is_ge and (private := said.get(GE_IMAGE_TYPE)) is not None:
        value = private.value
        first = value[0] if isinstance(value, bytes) or hasattr(value, "__len__") else value
        if str(first).isdecimal() and int(first) < len(GE_ROLES):
            return GE_ROLES[int(first)]
    for words in (_words(said, "ComplexImageComponent"), _words(said, "ImageType")[2:]):
        found = {role for role, names in WORDS.items() if {*words} & {*names}}
        if len(found) == 1:
            return found.pop()
    return None


def _rescale(said: "Dataset") -> tuple[float, float, str] | None:
    slope, intercept = (_numbers(said, f"Rescale{n}", 1) for n in ("Slope", "Intercept"))
    if not (slope and intercept):
        return None
    return slope[0], intercept[0], str(said.get("RescaleType", "") or "")


def _real_world(said: "Dataset") -> tuple[float, float, str] | None:
    for mapping in said.get("RealWorldValueMappingSequence") or ():
        slope, intercept = (
            _numbers(mapping, f"RealWorldValue{name}", 1) for name in ("Slope", "Intercept")
        )
        units = mapping.get("MeasurementUnitsCodeSequence") or ()
        if slope and intercept and units:
            return slope[0], intercept[0], str(units[0].get("CodeValue", ""))
    return None


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


def _read(path: Path, *, pixels: bool) -> "Dataset":
    from pydicom import dcmread

    read = dcmread(path, stop_before_pixels=not pixels)
    if pixels and read.file_meta.TransferSyntaxUID.is_compressed:
        read.decompress(generate_instance_uid=False)
    elif pixels and not read.file_meta.TransferSyntaxUID.is_little_endian:  # as once
        values = read.pixel_array
        read.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    return read
