"""From the images of an acquisition to NIfTI files: dcm2niix converts, and is checked.

Each echo of each role is converted by itself. dcm2niix gets the files as the scanner wrote them;
what it reads less surely it gets as plain classic images: frames of enhanced files, encoded
pixels, and those whose only scale is a real world value mapping.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from qsm_deploy.kernels.errors import DataError, EngineError
from qsm_deploy.runtime.dicom.acquisition import Acquisition, as_images
from qsm_deploy.runtime.dicom.frames import classics, damaged
from qsm_deploy.runtime.dicom.headers import Frame
from qsm_deploy.runtime.scan.phase_scale import is_vague

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# ours alone: no defaults of the user's, no sidecars, no compression, the scale that the standard
# defines and not Philips' own, one volume of all slices
FLAGS = ("-g", "i", "-b", "n", "-z", "n", "-p", "n", "-m", "y")
INTERPOLATED = ("_Eq", "_ROI", "_Tilt")  # in names of volumes that are not what was measured
DOUBTS = ("interslice", "missing images")  # in what it prints
SECONDS = 600  # for one volume
STEP = 0.01  # of the stored whole numbers, that values may differ by
COPIED = (
    *("PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "ImagePositionPatient"),
    *("ImageOrientationPatient", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SeriesInstanceUID"),
    *("StudyInstanceUID", "FrameOfReferenceUID", "SeriesNumber", "EchoTime", "PixelData"),
    *("RescaleSlope", "RescaleIntercept", "Manufacturer"),
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
    volumes = [
        (number, role, echo.time_s, images)
        for number, echo in enumerate(acquisition.echoes, 1)
        for role, images in ((lead, echo.first), (other, echo.second))
        if images
    ]
    paths = [folder / f"series-{i[0].series_number}_echo-{n}_{r}.nii" for n, r, _, i in volumes]
    _lay_out({path: images for path, (*_, images) in zip(paths, volumes, strict=True)})
    made: dict[str, list[Path]] = {}
    for path, (number, role, time_s, images) in zip(paths, volumes, strict=True):
        name = f"series {images[0].series_number}, {role} of echo {number}"
        sidecar = {"EchoTime": time_s, "Manufacturer": images[0].manufacturer}
        if strength is not None:
            sidecar["MagneticFieldStrength"] = strength
        if role == "phase" and (unit := phase_unit(images[0], name)):
            sidecar["Units"] = unit
        path.with_suffix(".json").write_text(json.dumps(sidecar))
        _make_volume(path, images, name)
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


def _lay_out(volumes: Mapping[Path, Sequence[Frame]]) -> None:
    """Put the images of each volume into a folder of its own, as they are or as plain copies.

    Every file that is copied from is read once.
    """
    copies: list[tuple[Frame, Path]] = []
    for volume, images in volumes.items():
        _images_of(volume).mkdir()
        for number, frame in enumerate(images):
            path = _image(volume, number)
            if _needs_copy(frame):
                copies.append((frame, path))
            else:
                path.symlink_to(frame.path.resolve())
    copies.sort(key=lambda copy: copy[0].path)
    frames = [frame for frame, _ in copies]
    for (frame, path), said in zip(copies, classics(frames, pixels=True), strict=True):
        _write_plain(said, frame, path)


def _images_of(volume: Path) -> Path:
    return volume.with_suffix(".dcm")


def _image(volume: Path, number: int) -> Path:
    return _images_of(volume) / f"{number:05d}.dcm"


def _make_volume(path: Path, images: Sequence[Frame], name: str) -> None:
    """Have one volume made of images that lie there, and check it."""
    target = path.with_suffix(".out")
    target.mkdir()
    printed = _run_dcm2niix(path, target, images, name)
    made = sorted(target.glob("*.nii"))
    if len(made) != 1 or any(word in made[0].name for word in INTERPOLATED):
        raise DataError(
            f"{name}: dcm2niix makes {len(made)} volumes of its {len(images)} images, expected one "
            "with all slices"
        )
    if any(word in printed.lower() for word in DOUBTS):
        raise DataError(f"{name}: dcm2niix finds its {len(images)} slices unevenly spaced")
    made[0].rename(path)
    _require_equal(path, images, name)


def _run_dcm2niix(path: Path, target: Path, images: Sequence[Frame], name: str) -> str:
    """Run it and return what it prints."""
    from dcm2niix import bin_path

    command = [str(bin_path), *FLAGS, "-f", "volume", "-o", str(target), str(_images_of(path))]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{name}: dcm2niix does not run ({error}); install it again") from error
    printed = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode:
        last = (printed.strip().splitlines() or ["no word"])[-1]
        for number, frame in enumerate(images):  # by the names that the user knows
            last = last.replace(str(_image(path, number)), frame.path.name)
        raise DataError(f"{name}: dcm2niix ends with code {done.returncode} ({last[:200]})")
    return printed


def _require_equal(path: Path, images: Sequence[Frame], name: str) -> None:
    """Refuse a volume that lies otherwise than the images, or whose values are others."""
    from pydicom import dcmread

    volume = nib.load(path)
    assert isinstance(volume, nib.Nifti1Image)
    if len(volume.shape) != 3:
        raise DataError(
            f"{name}: dcm2niix makes a volume of {volume.shape} of it, expected one 3-D"
        )
    values = volume.get_fdata(dtype=np.float32)
    slices = as_images(values, np.asarray(volume.affine), images)
    for number, frame in enumerate(images):
        slope, intercept, _ = frame.rescale or frame.real_world or (1, 0, "")
        with damaged(frame.path):
            stored = dcmread(_image(path, number)).pixel_array
        expected = stored * np.float32(slope) + np.float32(intercept)
        if not np.allclose(slices[number], expected, rtol=0, atol=STEP * abs(slope)):
            raise DataError(
                f"{name}: slice {number + 1} has other values in the volume that dcm2niix makes "
                "than in its image"
            )


def _needs_copy(frame: Frame) -> bool:
    is_mapped = frame.rescale is None and frame.real_world is not None
    return frame.number is not None or frame.encoded or is_mapped


def _write_plain(said: "Dataset", frame: Frame, path: Path) -> None:
    """Write an image as a classic one that says no more than a volume needs."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    plain = Dataset()
    for keyword in COPIED:
        if keyword in said:
            plain[keyword] = said[keyword]
    plain.SOPClassUID, plain.SOPInstanceUID = MRImageStorage, generate_uid()
    plain.Modality, plain.InstanceNumber = "MR", int(path.stem) + 1
    if frame.rescale is None and frame.real_world is not None:
        plain.RescaleSlope, plain.RescaleIntercept = (f"{n:.10g}" for n in frame.real_world[:2])
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    plain.save_as(path, enforce_file_format=True)
