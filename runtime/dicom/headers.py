"""What a header says of a frame, in a classic image and in an enhanced one alike.

An enhanced file says of each frame in sequences what a classic file says at its top; :func:`flat`
makes the second of the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

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
NAMES = {  # what a classic image calls it, and an enhanced one
    "ImageType": "FrameType",
    "EchoTime": "EffectiveEchoTime",
    "ImagingFrequency": "TransmitterFrequency",
    "AcquisitionDateTime": "FrameAcquisitionDateTime",
}
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
    kind, instance, study, series, frame_of_reference
        UIDs, of what the file is, of itself and of what it belongs to.
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
    kind: str
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


def frame_of(path: Path, number: int | None, said: "Dataset", header: "Dataset") -> Frame | None:
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
        path=path,
        number=number,
        kind=_text(header, "SOPClassUID"),
        instance=_text(header, "SOPInstanceUID"),
        study=_text(said, "StudyInstanceUID"),
        series=_text(said, "SeriesInstanceUID"),
        frame_of_reference=_text(said, "FrameOfReferenceUID"),
        patient=f"{_text(said, 'PatientID')}\n{_text(said, 'PatientName')}",
        series_number=int(series[0]) if series else 0,
        description=_text(said, "SeriesDescription"),
        role=_role(said),
        image_type=_words(said, "ImageType"),
        sequence=_sequence(said),
        sequence_name=_text(said, "SequenceName") or _text(said, "PulseSequenceName"),
        acquired=_text(said, "AcquisitionDate") + _text(said, "AcquisitionTime")
        or _text(said, "AcquisitionDateTime"),
        echo_number=int(echo[0]) if echo else None,
        echo_time_s=echo_ms[0] * MS if echo_ms else None,
        field_strength_t=_positive(strength),
        frequency_mhz=_positive(frequency),
        manufacturer=_text(said, "Manufacturer"),
        rescale=_rescale(said),
        real_world=_real_world(said),
        encoded=bool(syntax)
        and (syntax.is_encapsulated or syntax.is_deflated or not syntax.is_little_endian),
        lossy=_text(said, "LossyImageCompression") == "01",
        position_mm=np.array(position),
        orientation=np.array(orientation).reshape(2, 3),
        spacing_mm=(spacing[0], spacing[1]),
        shape=(int(rows[0]), int(columns[0])),
    )


def tags() -> Iterator[Any]:
    """Return what is read of a header: a tenth of what scanners write."""
    yield from (f"{what}InstanceUID" for what in ("SOP", "Study", "Series"))
    yield from ("SOPClassUID", "FrameOfReferenceUID")
    yield from (PER_FRAME, SHARED, GE_IMAGE_TYPE, GE_OWNER, *NAMES, *NAMES.values())
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


def _positive(numbers: tuple[float, ...]) -> float | None:
    """Return the first number; 0 is what some write who will not tell."""
    return numbers[0] if numbers and numbers[0] > 0 else None


def _text(said: "Dataset", name: str) -> str:
    return str(said.get(name) or "")


def _words(said: "Dataset", name: str) -> tuple[str, ...]:
    value = said.get(name) or ()
    return tuple(str(w).strip().upper() for w in ([value] if isinstance(value, str) else value))


def _sequence(said: "Dataset") -> tuple[str, ...]:
    """Return the words of ``ScanningSequence``, in which GR is a gradient echo."""
    kind = _text(said, "EchoPulseSequence").upper()
    if kind in ("GRADIENT", "BOTH"):
        return ("GR",)
    return _words(said, "ScanningSequence") or ((kind,) if kind else ())


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
    return slope[0], intercept[0], _text(said, "RescaleType")


def _real_world(said: "Dataset") -> tuple[float, float, str] | None:
    for mapping in said.get("RealWorldValueMappingSequence") or ():
        slope, intercept = (
            _numbers(mapping, f"RealWorldValue{name}", 1) for name in ("Slope", "Intercept")
        )
        units = mapping.get("MeasurementUnitsCodeSequence") or ()
        if slope and intercept and units:
            return slope[0], intercept[0], _text(units[0], "CodeValue")
    return None
