"""Gradient echoes as the scanners of three vendors write them, of a head that is drawn."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry
from tests.runtime.dicom.enhanced import enhanced_of
from tests.runtime.local_field.acquisition import MEGAHERTZ_PER_TESLA, TESLA, echoes_of
from tests.runtime.storages import Storage

SHAPE = (48, 56, 24)
TIMES_S = (0.005, 0.010, 0.015)
AS_DRAWN = Storage((0, 1, 2), (False, False, False))
VENDORS = ("siemens", "philips", "ge")
NAME = "Müller^Jürgen"
PHILIPS_SLOPE, PHILIPS_INTERCEPT = 1.5348, -3142.0
GE_ROLES = ("magnitude", "phase", "real", "imaginary")


@dataclass(frozen=True)
class Truth:
    """What was written: (echo, x, y, z) in the head's axes, and where those lie (RAS)."""

    affine: np.ndarray
    phase: np.ndarray
    magnitude: np.ndarray
    echo_times_s: tuple[float, ...]
    mask: np.ndarray
    chi_ppm: np.ndarray


@cache
def gradient_echo(shape=SHAPE, times_s=TIMES_S):
    """Return an oblique head of thick slices, and what a scanner measures of it."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (16, -9, 5), degrees=True).as_matrix()
    affine[:3, :3] *= (2.4, 2.4, 3.5)
    affine[:3, 3] = affine[:3, :3] @ (-np.array(shape) / 2) + (3.25, -11.5, 20)
    grid = Geometry.from_affine(shape, affine)
    head = head_phantom(grid, seed=7, noise_ppm=0, lesions=False)
    across = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None, None]
    field = head.local_field_ppm + (0.25 * across * head.mask)  # wraps from the second echo on
    echoes = echoes_of(field, head.mask, times_s, 0.6 * across, noise=0.02, geometry=grid, in_air=0)
    return Truth(affine, echoes.phase_rad, echoes.magnitude, times_s, head.mask, head.chi_ppm)


def write_series(
    folder: Path,
    vendor: str,
    *,
    truth: Truth | None = None,
    storage: Storage = AS_DRAWN,
    enhanced: bool = False,
    parts: bool = False,
    alternating: bool = False,
    edit: Callable[[Dataset], object] = lambda image: None,
    syntax: str = ExplicitVRLittleEndian,
    nested: bool = False,
    name: str = NAME,
    charset: str | list[str] = "ISO_IR 100",
) -> Truth:
    """Write a gradient echo as a vendor's scanner does, and return what is in it.

    Parameters
    ----------
    folder
        Made if it is missing.
    vendor
        Of :data:`VENDORS`. Siemens writes magnitude and phase as two series (11 and 12), the
        others as one (5).
    storage
        Which axis of the head columns, rows and slices follow, and which way.
    enhanced
        Whether a series is one file of frames.
    parts, alternating
        GE: real and imaginary images, and of opposite sign in every other slice.
    edit
        Called with each classic image, which has ``role``, ``echo`` and ``slice`` as attributes of
        Python; may change it, and leaves it out by returning ``False``.
    syntax
        The transfer syntax; gdcm compresses.
    nested
        Whether the images lie in sub-folders, out of order, under names without a suffix.
    name, charset
        Of the patient.
    """
    truth = truth or gradient_echo()
    images = [
        image
        for image in _images(vendor, truth, storage, parts, alternating, name, charset)
        if edit(image) is not False
    ]
    if enhanced:
        series = sorted({image.SeriesInstanceUID for image in images})
        images = [enhanced_of([i for i in images if i.SeriesInstanceUID == uid]) for uid in series]
    order = np.random.default_rng(3).permutation(len(images)) if nested else range(len(images))
    for place, n in enumerate(order):
        image = images[n]
        path = folder / (f"D{place % 7}/sub/I{place:05}" if nested else f"IM-{n:04}.dcm")
        path.parent.mkdir(parents=True, exist_ok=True)
        save(image, path, syntax)
    return truth


def save(image: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> None:
    """Write a data set as a file of a transfer syntax."""
    image.file_meta = FileMetaDataset()
    compressed = syntax.is_compressed and not syntax.is_deflated
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if compressed else syntax
    image.save_as(path, enforce_file_format=True)
    if compressed:
        import gdcm

        reader, change = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
        change.SetInput(reader.GetImage())
        assert change.Change(), f"gdcm cannot write {syntax.name}"
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        image.add_new("PixelData", "OB", dcmread(path).PixelData)  # it loses what frames say
        image["PixelData"].is_undefined_length = True
        image.file_meta.TransferSyntaxUID = syntax
        image.save_as(path, enforce_file_format=True)


def turned(truth: Truth, storage: Storage) -> Truth:
    """Return what was written as columns, rows and slices have it."""
    stored = {
        name: np.stack([storage.of(volume) for volume in getattr(truth, name)])
        for name in ("phase", "magnitude")
    }
    return replace(truth, affine=storage.affine(truth.affine, truth.mask.shape), **stored)


def _images(vendor, truth, storage, parts, alternating, name, charset):
    """Return every image, numbered in the order in which a scanner reconstructs them."""
    stored = turned(truth, storage)
    signal = stored.magnitude * np.exp(1j * stored.phase)
    if alternating:
        signal[..., ::2] *= -1
    roles = ("real", "imaginary") if parts else ("magnitude", "phase")
    study = _study(vendor, name, charset)
    series = {role: generate_uid(entropy_srcs=[vendor, str(storage), role]) for role in roles}
    count = signal.shape[-1]
    slices = [*range(count)]
    if vendor == "philips":
        slices.reverse()  # the numbers need not follow the positions
    numbers = dict.fromkeys(series.values(), 0)
    for role in roles:
        uid = series[role if vendor == "siemens" else roles[0]]
        for echo, time_s in enumerate(stored.echo_times_s):
            for n in slices:
                image = Dataset()
                image.update(deepcopy(study))
                image.role, image.echo, image.slice = role, echo, n
                numbers[uid] += 1
                image.SOPInstanceUID = generate_uid(entropy_srcs=[uid, str(numbers[uid])])
                image.SeriesInstanceUID, image.InstanceNumber = uid, numbers[uid]
                image.SeriesNumber = 5 if vendor != "siemens" else 12 if role == "phase" else 11
                image.EchoNumbers, image.EchoTime = echo + 1, f"{time_s * 1e3:.9g}"
                image.AcquisitionNumber = 1
                _place(image, stored.affine, n)
                PIXELS[vendor](image, role, signal[echo, :, :, n].T)
                yield image


def _study(vendor, name, charset):
    """Return what all images of an examination say alike, private elements among it."""
    study = Dataset()
    study.SpecificCharacterSet = charset
    study.SOPClassUID = MRImageStorage
    study.StudyInstanceUID, study.FrameOfReferenceUID = (
        generate_uid(entropy_srcs=[vendor, word]) for word in ("study", "frame")
    )
    study.StudyDate = study.SeriesDate = study.AcquisitionDate = study.ContentDate = "20240229"
    study.StudyTime, study.SeriesTime = "093000", "094512.5"
    study.AcquisitionTime, study.ContentTime = "094513.250000", "094801"
    study.AccessionNumber, study.StudyID, study.Modality = "A77", "4", "MR"
    study.StudyDescription, study.ReferringPhysicianName = "Kopf nativ", "Arzt^A"
    study.Manufacturer, study.ManufacturerModelName = {
        "siemens": ("SIEMENS", "Prisma"),
        "philips": ("Philips Medical Systems", "Ingenia"),
        "ge": ("GE MEDICAL SYSTEMS", "SIGNA Premier"),
    }[vendor]
    study.InstitutionName, study.StationName = "Klinik", "MR3"
    study.DeviceSerialNumber, study.SoftwareVersions = "000001", "X1"
    study.PatientName, study.PatientID, study.PatientBirthDate = name, "P-0815", "19600101"
    study.PatientSex, study.PatientAge, study.PatientWeight = "M", "064Y", "81"
    study.BodyPartExamined, study.PatientPosition, study.PositionReferenceIndicator = (
        "BRAIN",
        "HFS",
        "",
    )
    study.ProtocolName, study.SeriesDescription = "qsm_gre", "qsm_gre"
    study.ScanningSequence, study.SequenceVariant, study.ScanOptions = "GR", ["SP", "SS"], "PFP"
    study.MRAcquisitionType, study.SequenceName, study.AngioFlag = "3D", "*fl3d3", "N"
    study.RepetitionTime, study.FlipAngle, study.NumberOfAverages = "25", "15", "1"
    study.MagneticFieldStrength, study.ImagedNucleus = str(TESLA), "1H"
    study.ImagingFrequency = f"{TESLA * MEGAHERTZ_PER_TESLA:.9g}"
    study.EchoTrainLength, study.PixelBandwidth, study.PercentSampling = "3", "260", "100"
    study.ReceiveCoilName, study.TransmitCoilName = "HeadNeck_64", "Body"
    study.AcquisitionMatrix, study.InPlanePhaseEncodingDirection = [0, 48, 56, 0], "ROW"
    study.SAR = "0.02"
    creator = {"siemens": "SIEMENS CSA HEADER", "philips": "Philips MR Imaging DD 001"}
    study.private_block(0x0029, creator.get(vendor, "GEMS_IDEN_01"), create=True).add_new(
        0x10, "LO", f"secret of {name.partition('^')[0] if name.isascii() else 'somebody'}"
    )
    return study


def _place(image, affine, n):
    """Say where a slice of a grid lies."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    size = np.linalg.norm(lps[:3, :3], axis=0)
    texts = [f"{v:.9g}" for v in (*(lps[:3, 0] / size[0]), *(lps[:3, 1] / size[1]))]
    image.ImageOrientationPatient = texts
    image.ImagePositionPatient = [f"{v:.9g}" for v in (lps @ (0, 0, n, 1))[:3]]
    image.PixelSpacing = [f"{size[1]:.9g}", f"{size[0]:.9g}"]
    image.SliceThickness = image.SpacingBetweenSlices = f"{size[2]:.9g}"
    along = np.cross(lps[:3, 0] / size[0], lps[:3, 1] / size[1])
    image.SliceLocation = f"{along @ (lps @ (0, 0, n, 1))[:3]:.9g}"


def _pixels(image, stored, *, signed=False, bits=12):
    """Store whole numbers."""
    image.Rows, image.Columns = stored.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, bits, bits - 1
    image.PixelRepresentation = int(signed)
    low, high = int(stored.min()), int(stored.max())
    for tag, value in ((0x00280106, low), (0x00280107, high)):
        image.add_new(tag, "SS" if signed else "US", value)
    image.WindowCenter, image.WindowWidth = str((low + high) // 2), str(max(high - low, 1))
    image.add_new("PixelData", "OW", stored.astype("<i2" if signed else "<u2").tobytes())


def _whole(values, low, high):
    return np.clip(np.rint(values), low, high).astype(np.int32)


def _siemens(image, role, signal):
    if role == "phase":
        image.ImageType = ["ORIGINAL", "PRIMARY", "P", "ND"]
        image.RescaleSlope, image.RescaleIntercept, image.RescaleType = "2", "-4096", "US"
        turns = np.angle(signal) / (2 * np.pi) + 0.5
        _pixels(image, _whole(turns * 4096, 0, 4095))
    else:
        image.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
        _pixels(image, _whole(np.abs(signal) * 2000, 0, 4095))


def _philips(image, role, signal):
    if role == "phase":
        image.ImageType = ["ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"]
        slope, intercept, unit = PHILIPS_SLOPE, PHILIPS_INTERCEPT, "mrad"
        stored = _whole((np.angle(signal) * 1000 - intercept) / slope, 0, 4095)
    else:
        image.ImageType = ["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"]
        slope, intercept, unit = 1.25, 0.0, "normalized"
        stored = _whole(np.abs(signal) * 2000, 0, 4095)
    image.RescaleSlope, image.RescaleIntercept, image.RescaleType = str(slope), str(intercept), unit
    _pixels(image, stored)


def _ge(image, role, signal):
    image.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    block = image.private_block(0x0043, "GEMS_PARM_01", create=True)
    block.add_new(0x2F, "SS", GE_ROLES.index(role))
    values = {
        "magnitude": np.abs(signal) * 2000,
        "phase": np.angle(signal) * 1000,
        "real": signal.real * 2000,
        "imaginary": signal.imag * 2000,
    }[role]
    _pixels(image, _whole(values, -32768, 32767), signed=True, bits=16)


PIXELS = {"siemens": _siemens, "philips": _philips, "ge": _ge}
