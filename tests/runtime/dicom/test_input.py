"""Series of three vendors, classic and enhanced, become volumes; what is not whole is refused."""

import json

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.dicom import frames
from qsm_deploy.runtime.dicom.acquisition import affine_of, as_images
from qsm_deploy.runtime.dicom.choice import acquisition_of, list_series
from qsm_deploy.runtime.dicom.conversion import convert, phase_unit
from qsm_deploy.runtime.dicom.frames import read_frames
from qsm_deploy.runtime.local_field.echo_images import (
    EchoImages,
    images_with_sidecars,
    load_echoes,
)
from qsm_deploy.runtime.scan.scan import Reading
from tests.runtime.dicom.vendors import AS_DRAWN, VENDORS, write_series
from tests.runtime.storages import STORAGES

WRITTEN = [*VENDORS, "parts", *(f"enhanced {vendor}" for vendor in VENDORS)]
LOUD = 0.2  # of the signal: where a phase means something
SYNTAXES = (
    *(RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless),
    *(ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian),
)


def written(folder, what, **options):
    """Write a series by its name in :data:`WRITTEN`."""
    vendor = "ge" if what == "parts" else what.split()[-1]
    return write_series(
        folder, vendor, enhanced=what.startswith("enhanced"), parts=what == "parts", **options
    )


def converted(folder, scratch, series=()):
    acquisition = acquisition_of(read_frames(folder), folder, series)
    scratch.mkdir()
    made = convert(acquisition, scratch)
    lead, other = (made[name] for name in made)
    images = EchoImages(*map(images_with_sidecars, (lead, other)), acquisition.are_parts)
    return acquisition, load_echoes(images, Reading(units="rad"), 1e10), lead


def require_right(truth, storage, loaded, first):
    """Compare what was read with what was written, both in the head's axes."""
    affine = nib.load(first).affine
    index = np.linalg.inv(affine) @ storage.affine(truth.affine, truth.mask.shape)
    assert np.abs(index - np.rint(index)).max() < 1e-3
    assert loaded.echoes.echo_times_s == pytest.approx(truth.echo_times_s)
    assert loaded.echoes.field_strength_t == pytest.approx(3, rel=1e-4)
    order = np.abs(np.linalg.inv(affine) @ truth.affine)[:3, :3].argmax(axis=0)
    signs = np.sign((np.linalg.inv(affine) @ truth.affine)[order, range(3)]).astype(int)
    for read, wrote in (
        (loaded.echoes.phase_rad, truth.phase),
        (loaded.echoes.magnitude, truth.magnitude),
    ):
        volume = read.transpose(0, *(order + 1))[
            (slice(None), *(slice(None, None, s) for s in signs))
        ]
        if wrote is truth.phase:
            off = np.abs(np.angle(np.exp(1j * (volume - wrote))))[truth.magnitude > LOUD]
            assert off.max() < 0.05
        else:
            scale = np.vdot(volume, wrote) / np.vdot(volume, volume)
            assert np.abs(scale * volume - wrote).max() < 2e-3


@pytest.mark.parametrize("what", WRITTEN)
def test_series_of_every_vendor(tmp_path, what):
    truth = written(tmp_path / "in", what)
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, AS_DRAWN, loaded, lead[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 17, 30, 41])
@pytest.mark.parametrize("what", ["siemens", "enhanced philips"])
def test_any_orientation_and_order(tmp_path, what, number):
    storage = STORAGES[number]
    options = {} if what.startswith("enhanced") else {"nested": True}
    truth = written(tmp_path / "in", what, storage=storage, **options)
    acquisition, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, storage, loaded, lead[0])
    stored = storage.affine(truth.affine, truth.mask.shape)[:3, :3]
    images = affine_of(acquisition.slices)[:3, :3]
    assert np.allclose(images[:, :2], stored[:, :2], atol=1e-4)
    assert np.allclose(images[:, 2], stored[:, 2] * np.sign(images[:, 2] @ stored[:, 2]), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
@pytest.mark.parametrize("what", ["ge", "enhanced siemens"])
def test_transfer_syntaxes(tmp_path, what, syntax):
    truth = written(tmp_path / "in", what, syntax=syntax)
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, AS_DRAWN, loaded, lead[0])


def test_the_retired_order_of_bytes(tmp_path):
    def swap(image):
        nested = Dataset()
        nested.CodeValue = "x"  # dcm2niix loses its way in sequences of this order
        image.RequestAttributesSequence = [nested]
        image.PixelData = np.frombuffer(image.PixelData, "<u2").astype(">u2").tobytes()

    truth = written(tmp_path / "in", "siemens", syntax=ExplicitVRBigEndian, edit=swap)
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, AS_DRAWN, loaded, lead[0])


def test_a_real_world_value_mapping_is_a_scale(tmp_path):
    def map_values(image):
        if image.role != "phase":
            return
        mapping, unit = Dataset(), Dataset()
        unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = "rad", "UCUM", "radian"
        mapping.RealWorldValueSlope = float(image.RescaleSlope) / 1000
        mapping.RealWorldValueIntercept = float(image.RescaleIntercept) / 1000
        mapping.MeasurementUnitsCodeSequence = Sequence([unit])
        image.RealWorldValueMappingSequence = Sequence([mapping])
        del image.RescaleSlope, image.RescaleIntercept, image.RescaleType

    truth = written(tmp_path / "in", "philips", edit=map_values)
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, AS_DRAWN, loaded, lead[0])
    assert json.loads(lead[0].with_suffix(".json").read_text())["Units"] == "rad"


def test_what_vendors_keep_in_sequences_of_their_own_is_of_no_frame(tmp_path):
    truth = written(tmp_path / "in", "enhanced philips")
    (path,) = (tmp_path / "in").iterdir()
    image = dcmread(path)
    for frame in image.PerFrameFunctionalGroupsSequence:
        theirs = Dataset()
        theirs.EchoTime, theirs.RescaleSlope, theirs.ImageType = "99", "7", ["ORIGINAL", "M"]
        block = frame.private_block(0x2005, "Philips MR Imaging DD 005", create=True)
        block.add_new(0x0F, "SQ", [theirs])
    image.save_as(path)
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, AS_DRAWN, loaded, lead[0])


def test_elements_of_another_vendor_at_the_place_of_ges_say_nothing(tmp_path):
    def add(image):
        image.private_block(0x0043, "SOMEBODY", create=True).add_new(0x2F, "SS", 0)

    written(tmp_path / "in", "siemens", edit=add)
    roles = {f.role for f in read_frames(tmp_path / "in").frames}
    assert roles == {"phase", "magnitude"}


def test_a_phase_whose_rescaling_has_a_unit_that_says_nothing(tmp_path):
    truth = written(tmp_path / "in", "philips", edit=each(RescaleType="normalized"))
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, AS_DRAWN, loaded, lead[0])


def without(role, *places):
    return lambda image: not (image.role == role and (image.echo, image.slice) in places)


def moved(image):
    if image.slice == 9:
        x, y, z = image.ImagePositionPatient
        image.ImagePositionPatient = [x, y, f"{float(z) + 0.4:.9g}"]


def each(**values):
    """Return what sets elements of every image."""

    def change(image):
        for name, value in values.items():
            setattr(image, name, value)

    return change


def of_phase(**values):
    change = each(**values)
    return lambda image: change(image) if image.role == "phase" else None


def one_of_first_echo(**values):
    change = each(**values)
    return lambda image: change(image) if (image.echo, image.slice) == (0, 4) else None


def stripped(image):
    if image.role == "phase":
        del image.RescaleSlope, image.RescaleIntercept, image.RescaleType


REFUSED = {
    "slice missing everywhere": (
        "siemens",
        lambda image: image.slice != 9,
        r"series 12 \(qsm_gre\), phase, echo 1: 23 slices 3.5 mm apart, but 7 mm between 9 and 10; "
        "a slice is missing there",
    ),
    "slice shifted": ("siemens", moved, "one is not where it should be|aside of each other"),
    "echo short of its last slice": (
        "philips",
        without("phase", (2, 23)),
        r"phase: echo 3 \(15 ms\) has 23 images, another 24",
    ),
    "magnitude short of a slice": (
        "siemens",
        lambda image: image.role == "phase" or image.slice != 23,
        r"has 24 images of echo 1, series 11 \(qsm_gre\), magnitude 23",
    ),
    "no magnitude of an echo": (
        "siemens",
        lambda image: image.role == "phase" or image.echo != 1,
        r"has echoes of 5, 10, 15 ms, series 11 \(qsm_gre\), magnitude of 5, 15 ms",
    ),
    "a difference of phases": (
        "siemens",
        lambda image: image.role != "phase" or image.echo == 1,
        "begins with echo 2; a difference of phases",
    ),
    "filtered": (
        "siemens",
        of_phase(SeriesDescription="Pha_Images"),
        r"series 12 \(Pha_Images\) is filtered or projected",
    ),
    "SWI in the type": (
        "siemens",
        of_phase(ImageType=["ORIGINAL", "PRIMARY", "P", "ND", "SWI"]),
        "is filtered or projected",
    ),
    "SWI in the name of the sequence": (
        "siemens",
        of_phase(SequenceName="*swi3d3r", SeriesDescription=""),
        "series 12 is called susceptibility-weighted",
    ),
    "derived": ("ge", each(ImageType=["DERIVED", "SECONDARY", "OTHER"]), "is derived"),
    "velocities": (
        "philips",
        of_phase(ImageType=["ORIGINAL", "PRIMARY", "VELOCITY MAP", "P", "PCA"]),
        "is one of velocities",
    ),
    "flow": ("siemens", of_phase(SequenceName="*fl2d1_v150in"), "is one of velocities"),
    "a spin echo": ("siemens", each(ScanningSequence="SE"), r"no gradient echo \(.* SE\)"),
    "corrected in two ways": (
        "siemens",
        of_phase(ImageType=["ORIGINAL", "PRIMARY", "P", "DIS2D"]),
        r"in two ways \(DIS2D and ND\)",
    ),
    "two studies": (
        "siemens",
        one_of_first_echo(StudyInstanceUID="1.2.3"),
        r"images of 2 studies \(142 and 2\)",
    ),
    "two patients": ("siemens", one_of_first_echo(PatientID="other"), "images of 2 patients"),
    "two echo times in an echo": (
        "siemens",
        one_of_first_echo(EchoTime="5.1"),
        r"echo 1 has echo times of 5 ms \(23 images\) and 5.1 ms \(1 images\)",
    ),
    "no echo time": ("siemens", one_of_first_echo(EchoTime=None), "says no EchoTime"),
    "orientation": (
        "siemens",
        one_of_first_echo(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        "are not of one orientation",
    ),
    "loss": ("siemens", of_phase(LossyImageCompression="01"), "compressed with loss"),
    "Philips without a scale": ("philips", stripped, "Philips' phase without RescaleSlope"),
    "another field strength": ("siemens", each(ImagingFrequency="63.86"), "3 T.*63.86 MHz"),
    "no phase": ("siemens", lambda image: image.role != "phase", "there are no phase images"),
    "real alone": ("parts", lambda image: image.role == "real", "there are no imaginary ones"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_whole_is_refused(tmp_path, why):
    what, edit, message = REFUSED[why]
    written(tmp_path / "in", what, edit=edit)
    with pytest.raises(DataError, match=message) as caught:
        converted(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "Müller" not in str(caught.value)


def test_several_repetitions_are_refused(tmp_path):
    for again in ("one", "two"):
        written(
            tmp_path / "in" / again, "ge", edit=lambda i: each(SOPInstanceUID=generate_uid())(i)
        )
    with pytest.raises(DataError, match=r"48 images of 24 slices; .* repetitions or coils"):
        converted(tmp_path / "in", tmp_path / "out")
    for path in (tmp_path / "in").rglob("*.dcm"):  # emptied, which makes no copies of them
        image = dcmread(path)
        image.SOPInstanceUID = ""
        image.save_as(path)
    with pytest.raises(DataError, match="48 images of 24 slices"):
        converted(tmp_path / "in", tmp_path / "none")


def test_a_sum_of_echoes_is_not_the_magnitude(tmp_path):
    def add_up(image):
        image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(), "1.2.3.4"
        image.SeriesNumber = 13
        return image.role == "magnitude" and image.echo == 0

    truth = written(tmp_path / "in", "siemens")
    written(tmp_path / "in" / "sum", "siemens", edit=add_up)
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, AS_DRAWN, loaded, lead[0])


def test_an_image_that_is_there_twice_counts_once(tmp_path):
    written(tmp_path / "in", "philips")
    truth = written(tmp_path / "in" / "again", "philips")
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, AS_DRAWN, loaded, lead[0])


def test_echoes_in_series_of_their_own(tmp_path):
    def apart(image):
        number = 20 + 2 * image.echo + (image.role == "phase")
        image.SeriesInstanceUID, image.SeriesNumber = f"1.2.{number}", number

    truth = written(tmp_path / "in", "siemens", edit=apart)
    with pytest.raises(DataError, match=r"3 series have a phase: series 21 .*pass --series"):
        converted(tmp_path / "in", tmp_path / "none")
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out", [20, 21, 22, 23, 24, 25])
    require_right(truth, AS_DRAWN, loaded, lead[0])


def second_run(folder):
    """Write an acquisition of two series after another of the same study."""
    uids = {"magnitude": generate_uid(), "phase": generate_uid()}

    def later(image):
        image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(), uids[image.role]
        image.SeriesNumber = int(image.SeriesNumber) + 10
        image.AcquisitionTime = "101500"

    written(folder / "first", "siemens")
    written(folder / "second", "siemens", edit=later)


def test_of_several_the_user_chooses(tmp_path):
    second_run(tmp_path / "in")
    headers = read_frames(tmp_path / "in")
    with pytest.raises(
        DataError, match=r"2 series have a phase: series 12 .*, series 22 .*--series"
    ):
        acquisition_of(headers, tmp_path)
    chosen = acquisition_of(headers, tmp_path, [22])
    assert {f.series_number for f in chosen.frames} == {21, 22}
    assert {f.series_number for f in acquisition_of(headers, tmp_path, [22, 11]).frames} == {11, 22}
    with pytest.raises(DataError, match=r"no series 7; it holds series 11 .*"):
        acquisition_of(headers, tmp_path, [7])
    with pytest.raises(DataError, match="series asked for have no phase"):
        acquisition_of(headers, tmp_path, [11])


@pytest.mark.parametrize("time", ["101500", "094513.250000"], ids=["later", "at once"])
def test_a_field_map_of_the_study_is_not_taken_for_the_phase(tmp_path, time):
    uids = {"magnitude": generate_uid(), "phase": generate_uid()}

    def difference(image):
        image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(), uids[image.role]
        image.SeriesNumber, image.AcquisitionTime = int(image.SeriesNumber) + 20, time
        return image.echo == 1 or (image.echo == 0 and image.role == "magnitude")

    written(tmp_path / "in" / "map", "siemens", edit=difference)
    written(tmp_path / "in" / "gre", "siemens")
    headers = read_frames(tmp_path / "in")
    if time == "101500":
        assert {f.series_number for f in acquisition_of(headers, tmp_path).frames} == {11, 12}
    else:  # it could be an echo of it
        with pytest.raises(DataError, match="2 series have a phase"):
            acquisition_of(headers, tmp_path)


def test_a_series_that_is_named_and_cannot_be_taken_is_not_left_out(tmp_path):
    def filtered(image):
        image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(), "1.2.3.4"
        image.SeriesNumber, image.SeriesDescription = 30, "Pha_Images"
        return image.role == "phase"

    written(tmp_path / "in", "siemens")
    written(tmp_path / "in" / "swi", "siemens", edit=filtered)
    headers = read_frames(tmp_path / "in")
    assert {f.series_number for f in acquisition_of(headers, tmp_path).frames} == {11, 12}
    with pytest.raises(DataError, match=r"series 30 \(Pha_Images\) is filtered"):
        acquisition_of(headers, tmp_path, [12, 30])


def test_a_phase_that_is_weighted_by_its_name_alone_is_taken_if_named(tmp_path):
    written(tmp_path / "in", "siemens", edit=each(SeriesDescription="SWI multi-echo"))
    headers = read_frames(tmp_path / "in")
    with pytest.raises(DataError, match=r"is called susceptibility-weighted.* pass --series 12"):
        acquisition_of(headers, tmp_path)
    assert len(acquisition_of(headers, tmp_path, [12]).echoes) == 3


def test_a_field_strength_of_nothing_is_not_stated(tmp_path):
    written(tmp_path / "in", "siemens", edit=each(ImagingFrequency="0"))
    acquisition = acquisition_of(read_frames(tmp_path / "in"), tmp_path)
    assert acquisition.field_strength_t == 3


def test_a_magnitude_that_is_named_and_does_not_fit_is_not_left_out(tmp_path):
    def elsewhere(image):
        image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(), "1.2.3.4"
        image.SeriesNumber, image.FrameOfReferenceUID = 30, "1.2.3.5"
        return image.role == "magnitude"

    written(tmp_path / "in", "siemens")
    written(tmp_path / "in" / "other", "siemens", edit=elsewhere)
    with pytest.raises(DataError, match=r"series 30 \(qsm_gre\) does not fit series 12"):
        acquisition_of(read_frames(tmp_path / "in"), tmp_path, [12, 30])


def test_the_list_says_what_each_series_is(tmp_path):
    second_run(tmp_path / "in")
    written(tmp_path / "in", "siemens", edit=derived)
    lines = list_series(read_frames(tmp_path / "in"), tmp_path).splitlines()
    assert lines[0] == "series 11 (qsm_gre): 72 files; 72 magnitude; echoes 5, 10, 15 ms"
    assert lines[1].endswith("a map can be made of it: 3 echoes of 24 slices")
    assert "is derived" in lines[-1]


def derived(image):
    image.SeriesInstanceUID, image.SeriesNumber = "1.2.3.4", 99
    image.ImageType = ["DERIVED", "PRIMARY", "M", "QSM"]
    return image.role == "magnitude"


def test_other_files_do_not_disturb(tmp_path):
    truth = written(tmp_path / "in", "philips")
    (tmp_path / "in" / "README").write_text("no DICOM")
    (tmp_path / "in" / "empty.dcm").touch()
    _, loaded, lead = converted(tmp_path / "in", tmp_path / "out")
    require_right(truth, AS_DRAWN, loaded, lead[0])


def test_a_damaged_file_is_named(tmp_path):
    written(tmp_path / "in", "ge")
    path = tmp_path / "in" / "IM-0080.dcm"
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match=r"IM-0080\.dcm"):
        converted(tmp_path / "in", tmp_path / "out")


def test_nonsense_after_the_preamble_is_no_image(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 300)
    with pytest.raises(DataError, match="no MR image in DICOM among its 1 files"):
        acquisition_of(read_frames(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["PixelSpacing", "ImagePositionPatient", "Rows"])
def test_images_that_lie_nowhere_are_none(tmp_path, name):
    def empty(image):
        image[name].value = [0, 0] if name == "PixelSpacing" else None
        return image.slice == 0

    written(tmp_path / "in", "ge", edit=empty)
    with pytest.raises(DataError, match="no MR image in DICOM among its 6 files"):
        acquisition_of(read_frames(tmp_path / "in"), tmp_path)


def test_an_empty_folder_and_none(tmp_path):
    with pytest.raises(DataError, match="no MR image in DICOM among its 0 files"):
        acquisition_of(read_frames(tmp_path), tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        read_frames(tmp_path / "none")


def test_units_of_a_phase(tmp_path):
    for vendor, unit in (("siemens", None), ("philips", "mrad"), ("ge", "mrad")):
        write_series(tmp_path / vendor, vendor)
        first = acquisition_of(read_frames(tmp_path / vendor), tmp_path).slices[0]
        assert phase_unit(first, "it") == unit


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: storage.letters)
def test_a_volume_in_any_storage_is_the_same_images(images, storage):
    slices, truth = images
    volume = np.random.default_rng(0).random(truth.mask.shape, dtype=np.float32)
    found = as_images(storage.of(volume), storage.affine(truth.affine, volume.shape), slices)
    assert np.array_equal(found, volume.transpose(2, 1, 0))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("philips")
    truth = written(folder, "philips")
    return acquisition_of(read_frames(folder), folder).slices, truth


def test_a_volume_on_another_grid_is_none_of_the_images(tmp_path):
    written(tmp_path / "in", "philips")
    slices = acquisition_of(read_frames(tmp_path / "in"), tmp_path).slices
    affine = affine_of(slices)
    volume = np.random.default_rng(0).random((48, 56, 24), dtype=np.float32)
    assert np.array_equal(as_images(volume, affine, slices), volume.transpose(2, 1, 0))
    for off in (affine @ np.diag([1, 1, 1.01, 1]), affine + np.eye(4, k=3) * 0.5):
        with pytest.raises(DataError, match="lies on another grid"):
            as_images(volume, off, slices)
    with pytest.raises(DataError, match="lies on another grid"):
        as_images(volume[1:], affine, slices)


def test_deflated_images_inflate_to_no_more_than_is_bounded(tmp_path, monkeypatch):
    written(tmp_path, "ge", syntax=DeflatedExplicitVRLittleEndian)
    assert read_frames(tmp_path).frames
    monkeypatch.setattr(frames, "MOST_INFLATED", 500)
    with pytest.raises(DataError, match=r"IM-0000\.dcm: inflates to more than"):
        read_frames(tmp_path)
