"""A map as MR images, one of each slice, made after those of the scanner (PS3.3, A.4).

An image takes over everything that its source says of patient, study, scanner and place, and loses
what was said of the source's pixels alone, of its echo, or by its vendor.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.runtime.console.provenance import NAME, version
from qsm_deploy.runtime.dicom.acquisition import Acquisition
from qsm_deploy.runtime.dicom.frames import classics, damaged
from qsm_deploy.runtime.dicom.headers import Frame
from qsm_deploy.runtime.dicom.map_series import (
    ASKED_FOR,
    PPB,
    QUANTITY,
    SUSCEPTIBILITY,
    WINDOW_CENTRE_PPB,
    WINDOW_EXPLANATION,
    WINDOW_WIDTH_PPB,
    Code,
    MapSeries,
    coded,
    dataset,
    state_side,
)

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

SOURCE: Code = ("121322", "DCM", "Source image for image processing operation")
LOWEST, HIGHEST = -32768, 32767  # of a pixel
MOST_PPB = 32767
ONLY_ENHANCED, GROUPS = 0x9000, (0x0008, 0x0018, 0x0020, 0x0022, 0x0028)  # numbers from there on
OVERLAYS, CURVES = range(0x6000, 0x6100), range(0x5000, 0x5100)
FUNCTIONAL_GROUPS, SIGNATURES = 0x5200, (0x4FFE, 0xFFFA, 0xFFFC)
OF_THE_SOURCE = (  # its pixels, how they are shown, its echo, what refers to it
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "RealWorldValueMappingSequence"),
    *("ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction", "PresentationLUTShape"),
    *("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation"),
    *("SmallestImagePixelValue", "LargestImagePixelValue"),
    *("SmallestPixelValueInSeries", "LargestPixelValueInSeries"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "IconImageSequence", "NumberOfFrames"),
    *("EchoNumbers", "ImagesInAcquisition", "QualityControlImage", "AcquisitionContextSequence"),
    *("ReferencedImageSequence", "SourceImageSequence", "DerivationCodeSequence"),
    *("ReferencedSeriesSequence", "InstanceCreatorUID"),
    *("ReferencedPerformedProcedureStepSequence", "SeriesDescriptionCodeSequence"),
)
NEEDED = (  # of an MR image, though it may be empty
    *("Manufacturer", "PatientPosition", "PositionReferenceIndicator", "ScanOptions"),
    *("MRAcquisitionType", "RepetitionTime", "SliceThickness"),
)
LOSSY = "LossyImageCompression"
LONGEST_NUMBER = 16  # characters, VR DS


def images_of(
    ppb: NDArray[np.float32], acquisition: Acquisition, series: MapSeries, *, burned: bool
) -> Iterator[bytes]:
    """Return the files of a map, along its slices.

    Parameters
    ----------
    ppb
        (slice, row, column) susceptibility.
    acquisition
        What it was made of.
    series
        What it is.
    burned
        Whether a text was drawn on it.
    """
    clipped = np.count_nonzero(~(np.abs(ppb) <= MOST_PPB))
    notes = ["the text at the top left covers the map"] if burned else []
    if clipped:
        notes.append(
            f"{clipped} of {ppb.size} voxels of the map clipped to -{MOST_PPB} to {MOST_PPB} ppb"
        )
    sources = _sources(acquisition)
    for n, image in enumerate(classics(acquisition.slices)):
        frame = acquisition.slices[n]
        with damaged(frame.path):
            _complete(image)
            _strip(image)
            series.describe(image, notes)
            _derive(image, n + 1, sources[n], burned=burned)
            whole = np.rint(np.nan_to_num(np.clip(ppb[n], -MOST_PPB, MOST_PPB)))
            image.add_new("PixelData", "OW", whole.astype("<i2").tobytes())
            yield file_bytes(image)


def phase_of(acquisition: Acquisition) -> list[tuple[Frame, ...]]:
    """Return the images of the phase of every echo, or of both of its parts, along the slices."""
    if acquisition.are_parts:
        return [frames for echo in acquisition.echoes for frames in (echo.first, echo.second)]
    return [echo.first for echo in acquisition.echoes]


def file_bytes(image: "Dataset") -> bytes:
    """Return a data set as a file that says who wrote it."""
    from pydicom import dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.ImplementationClassUID = implementation_uid()
    image.file_meta.ImplementationVersionName = f"{NAME} {version()}".upper()[:16]
    file = BytesIO()
    dcmwrite(file, image, enforce_file_format=True)  # of big-endian sources, too
    return file.getvalue()


def implementation_uid() -> "UID":
    """Return the UID of what writes these files, the same for all of its versions."""
    from pydicom.uid import generate_uid

    return generate_uid(entropy_srcs=[NAME])


def _sources(acquisition: Acquisition) -> list[list["Dataset"]]:
    """Return what each slice of a map is made of: the phase, or both parts, of every echo."""
    return [[*_references(frames)] for frames in zip(*phase_of(acquisition), strict=True)]


def _references(frames: Iterable[Frame]) -> Iterator["Dataset"]:
    """Return a reference to each file, and to which frames of it."""
    numbers: dict[tuple[Path, str, str], list[int]] = defaultdict(list)
    for frame in frames:
        own = [] if frame.number is None else [frame.number + 1]
        numbers[frame.path, frame.kind, frame.instance] += own
    for (_, kind, instance), some in numbers.items():
        yield dataset(
            ReferencedSOPClassUID=kind,
            ReferencedSOPInstanceUID=instance,
            **({"ReferencedFrameNumber": some} if some else {}),
            PurposeOfReferenceCodeSequence=[coded(SOURCE)],
        )


def _strip(image: "Dataset") -> None:
    """Remove what is not true of a map; what stays is not decoded, and so keeps its bytes."""
    from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword

    gone = {tag_for_keyword(keyword) for keyword in OF_THE_SOURCE}
    if str(image.get(LOSSY, "")) != "01":  # what was lost once stays lost
        gone |= {0x00282110, 0x00282112, 0x00282114}
    for tag in [*image.keys()]:
        if (
            tag in gone
            or tag.is_private
            or (tag.group in GROUPS and tag.element >= ONLY_ENHANCED)
            or tag.group in (*OVERLAYS, *CURVES, FUNCTIONAL_GROUPS, *SIGNATURES)
        ):
            del image[tag]
            continue
        vr = image.get_item(tag).VR or (dictionary_VR(tag) if dictionary_has_tag(tag) else "UN")
        if vr == "SQ":
            for item in image[tag].value:
                item.remove_private_tags()
        elif vr == "DS":
            _shorten(image, tag)


def _shorten(image: "Dataset", tag: Any) -> None:
    """Write numbers of more characters than DICOM allows with as many digits as count."""
    value = image[tag].value
    values = [value] if isinstance(value, str | float) else [*(value or ())]
    if any(len(str(v)) > LONGEST_NUMBER for v in values):
        image[tag].value = [f"{float(v):.9g}" for v in values]


def _complete(image: "Dataset") -> None:
    """Say what a classic image must and an enhanced one says in other words."""
    from pydicom.uid import MRImageStorage

    image.SOPClassUID = MRImageStorage
    spoiled = image.get("Spoiling") in ("RF", "GRADIENT", "RF_AND_GRADIENT")
    for keyword, value in (
        *((keyword, None) for keyword in ASKED_FOR),
        ("Modality", "MR"),
        ("ScanningSequence", "GR"),
        ("SequenceVariant", "SP" if spoiled else "NONE"),
        *((keyword, None) for keyword in NEEDED),
    ):
        if keyword not in image:
            setattr(image, keyword, value)
    state_side(image, image)
    image.EchoTime = image.EchoTrainLength = None  # of no single echo


def _derive(image: "Dataset", number: int, sources: list["Dataset"], *, burned: bool) -> None:
    """Say what the pixels are."""
    from pydicom.uid import generate_uid

    image.ImageType = ["DERIVED", "PRIMARY", "M", "QSM"]
    image.SOPInstanceUID, image.InstanceNumber = generate_uid(), number
    image.SourceImageSequence = sources
    image.BurnedInAnnotation = "YES" if burned else "NO"
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 1
    image.RescaleSlope, image.RescaleIntercept, image.RescaleType = "1", "0", "PPB"
    image.WindowCenter, image.WindowWidth = str(WINDOW_CENTRE_PPB), str(WINDOW_WIDTH_PPB)
    image.WindowCenterWidthExplanation = WINDOW_EXPLANATION
    quantity = dataset(
        ValueType="CODE",
        ConceptNameCodeSequence=[coded(QUANTITY)],
        ConceptCodeSequence=[coded(SUSCEPTIBILITY)],
    )
    mapping = dataset(
        LUTLabel="QSM",
        LUTExplanation="magnetic susceptibility",
        MeasurementUnitsCodeSequence=[coded(PPB)],
        RealWorldValueSlope=1.0,
        RealWorldValueIntercept=0.0,
        QuantityDefinitionSequence=[quantity],
    )
    for tag, value in ((0x00409216, LOWEST), (0x00409211, HIGHEST)):  # which may be US as well
        mapping.add_new(tag, "SS", value)
    image.RealWorldValueMappingSequence = [mapping]
