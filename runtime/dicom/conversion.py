"""From the images of an acquisition to NIfTI files: dcm2niix converts, and is checked.

Each echo of each role is converted by itself. dcm2niix gets the files as the scanner wrote them;
what it reads less surely it gets as plain classic images: frames of enhanced files, compressed
pixels, and those whose only scale is a real world value mapping.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from qsm_deploy.kernels.errors import DataError, EngineError
from qsm_deploy.runtime.dicom.acquisition import Acquisition, as_images
from qsm_deploy.runtime.dicom.frames import Frame, classics
from qsm_deploy.runtime.scan.phase_scale import is_vague

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# ours alone: no defaults of the user's, no sidecars, no compression, the scale that the standard
# defines and not Philips' own, one volume of all slices
FLAGS = ("-g", "i", "-b", "n", "-z", "n", "-p", "n", "-m", "y")
INTERPOLATED = ("_Eq", "_ROI", "_Tilt")  # in names of volumes that are not what was measured
DOUBTS = ("interslice", "missing images")  # in what it prints
SECONDS = 600  # for one volume
COPIED = (
    *("PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "ImagePositionPatient"),
    *("ImageOrientationPatient", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SeriesInstanceUID"),
    *("StudyInstanceUID", "FrameOfReferenceUID", "SeriesNumber", "EchoTime", "PixelData"),
    *("RescaleSlope", "RescaleIntercept"),
)


def convert(acquisition: Acquisition, folder: Path) -> dict[str, list[Path]]:
    """Write the volume of every echo into a folder, a sidecar beside each.

    Returns
    -------
    dict
        The files by echo: ``phase`` and, if there is one, ``magnitude``, or ``real`` and ``imag``.

    Raises
    ------
    DataError
        If a phase does not say its scale, field strength and frequency disagree, or dcm2niix makes
        something else of the images than one volume of all slices.
    EngineError
        If dcm2niix does not run.
    """
    lead, other = ("real", "imag") if acquisition.are_parts else ("phase", "magnitude")
    strength = acquisition.field_strength_t
    made: dict[str, list[Path]] = {}
    for number, echo in enumerate(acquisition.echoes, 1):
        for role, images in ((lead, echo.first), (other, echo.second)):
            if not images:
                continue
            path = folder / f"series-{images[0].series_number}_echo-{number}_{role}.nii"
            name = f"series {images[0].series_number}, {role} of echo {number}"
            sidecar = {"EchoTime": echo.time_s, "Manufacturer": images[0].manufacturer}
            if strength is not None:
                sidecar["MagneticFieldStrength"] = strength
            if role == "phase" and (unit := phase_unit(images[0], name)):
                sidecar["Units"] = unit
            _converted(images, path, name)
            path.with_suffix(".json").write_text(json.dumps(sidecar))
            made.setdefault(role, []).append(path)
    return made


def phase_unit(frame: Frame, name: str) -> str | None:
    """Return the unit of a phase after its scale; ``None`` leaves it to the values.

    GE writes milliradians as they are. Philips' numbers mean nothing without a scale.

    Raises
    ------
    DataError
        If there is none.
    """
    _, _, unit = frame.rescale or frame.real_world or (1, 0, "")
    maker = frame.manufacturer.lower()
    if frame.rescale is None and frame.real_world is None and maker.startswith("philips"):
        raise DataError(
            f"{name}: Philips' phase without RescaleSlope or real world values, whose numbers do "
            "not tell radians; export it with them"
        )
    if not is_vague(unit):
        return unit
    is_plain = frame.rescale is None or frame.rescale[:2] == (1, 0)
    return "mrad" if maker.startswith("ge") and is_plain else None


def _converted(images: Sequence[Frame], path: Path, name: str) -> None:
    """Have one volume made of images, check it, and put it where it belongs."""
    source, target = path.with_suffix(".dcm"), path.with_suffix(".out")
    source.mkdir()
    target.mkdir()
    for number, frame in enumerate(images):
        if not _needs_copy(frame):
            (source / f"{number:05d}.dcm").symlink_to(frame.path.resolve())
    copies = [(number, frame) for number, frame in enumerate(images) if _needs_copy(frame)]
    for (number, frame), said in zip(
        copies, classics([frame for _, frame in copies], pixels=True), strict=True
    ):
        _write_plain(said, frame, number, source / f"{number:05d}.dcm")
    printed = _run_dcm2niix(source, target, name)
    made = sorted(target.glob("*.nii"))
    if len(made) != 1 or any(word in made[0].name for word in INTERPOLATED):
        raise DataError(
            f"{name}: dcm2niix makes {len(made)} volumes of its {len(images)} images, expected one "
            "with all slices"
        )
    if any(word in printed.lower() for word in DOUBTS):
        raise DataError(f"{name}: dcm2niix finds its {len(images)} slices unevenly spaced")
    _require_equal(made[0], images, name)
    made[0].rename(path)


def _run_dcm2niix(source: Path, target: Path, name: str) -> str:
    """Run it and return what it prints."""
    from dcm2niix import bin_path

    command = [str(bin_path), *FLAGS, "-f", "volume", "-o", str(target), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{name}: dcm2niix does not run ({error}); install it again") from error
    printed = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode:
        last = (printed.strip().splitlines() or ["no word"])[-1]
        raise DataError(f"{name}: dcm2niix ends with code {done.returncode} ({last[:200]})")
    return printed


def _require_equal(path: Path, images: Sequence[Frame], name: str) -> None:
    """Refuse a volume that lies otherwise than the images, or whose values are others.

    The first slice, the middle one and the last are compared.
    """
    volume = nib.load(path)
    assert isinstance(volume, nib.Nifti1Image)
    if len(volume.shape) != 3:
        raise DataError(
            f"{name}: dcm2niix makes a volume of {volume.shape} of it, expected one 3-D"
        )
    values = volume.get_fdata(dtype=np.float32)
    slices = as_images(values, np.asarray(volume.affine), images)
    few = sorted({0, len(images) // 2, len(images) - 1})
    for number, said in zip(few, classics([images[n] for n in few], pixels=True), strict=True):
        slope, intercept, _ = images[number].rescale or images[number].real_world or (1, 0, "")
        expected = said.pixel_array * np.float32(slope) + np.float32(intercept)
        if not np.allclose(slices[number], expected, rtol=1e-5, atol=1e-5 * abs(slope)):
            raise DataError(
                f"{name}: slice {number + 1} has other values in the volume that dcm2niix makes "
                "than in its image"
            )


def _needs_copy(frame: Frame) -> bool:
    is_mapped = frame.rescale is None and frame.real_world is not None
    return frame.number is not None or frame.compressed or is_mapped


def _write_plain(said: "Dataset", frame: Frame, number: int, path: Path) -> None:
    """Write an image as a classic one that says no more than a volume needs."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    plain = Dataset()
    for keyword in COPIED:
        if keyword in said:
            plain[keyword] = said[keyword]
    plain.SOPClassUID, plain.SOPInstanceUID = MRImageStorage, generate_uid()
    plain.Modality, plain.InstanceNumber = "MR", number + 1
    if frame.rescale is None and frame.real_world is not None:
        plain.RescaleSlope, plain.RescaleIntercept = (f"{n:.10g}" for n in frame.real_world[:2])
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    plain.save_as(path, enforce_file_format=True)
