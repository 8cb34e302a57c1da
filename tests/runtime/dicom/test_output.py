"""Maps as DICOM: what others read of them is what was made, where it was measured."""

import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, MRImageStorage, RLELossless

from qsm_deploy.kernels.errors import DataError, MissingDependencyError, UsageError
from qsm_deploy.runtime.dicom import choice
from qsm_deploy.runtime.dicom.burn_in import letters_of
from qsm_deploy.runtime.dicom.frames import read_frames
from qsm_deploy.runtime.dicom.output import DicomOut
from tests.runtime.dicom.vendors import SHAPE, VENDORS, gradient_echo, write_series
from tests.runtime.storages import SPREAD

RUN = {
    "made_by": "qsm-deploy 0",
    "title": "xQSM",
    "model": {"network": "xqsm", "weights_sha256": "ab" * 32},
}
SOURCES = [(vendor, enhanced) for vendor in VENDORS for enhanced in (False, True)]
KINDS = {"mr": 0.5, "pm": 1e-4}  # and how far a value may be off [ppb]
NAMES = {
    "ISO_IR 100": "Müller^Jürgen",
    "ISO_IR 192": "Müller^Jürgen=山田",
    "ISO_IR 144": "Иванов^Пётр",
    "GB18030": "Wang^XiaoDong=王^小东",
    "\\ISO 2022 IR 87": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "ISO 2022 IR 13\\ISO 2022 IR 87": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    "\\ISO 2022 IR 149": "Hong^Gildong=洪^吉洞=홍^길동",
}


def acquisition_of(folder):
    """Return the gradient echo in a folder."""
    return choice.acquisition_of(read_frames(folder), folder)


def map_of(shape=SHAPE):
    """Return a map that is another one whichever way it is turned [ppm]."""
    return np.random.default_rng(5).normal(0, 0.1, shape).astype(np.float32)


def write(out, maps=None, affine=None):
    """Write maps, of the head's axes unless it is said otherwise, and return their files."""
    maps = {"chi_ppm": map_of()} if maps is None else maps
    out.check([*maps], force=False)
    files = out.files(maps, gradient_echo().affine if affine is None else affine, RUN)
    for path, content in files.items():
        path.write_bytes(content)
    return [*files]


def read_by_dcm2niix(folder, into):
    """Return what dcm2niix makes of a folder, in RAS as nearly as its axes go."""
    into.mkdir()
    program = Path(sys.executable).with_name("dcm2niix")
    command = [program, "-b", "n", "-z", "n", "-f", "map", "-o", into, folder]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = into.iterdir()
    return nib.as_closest_canonical(nib.load(file))


def require_valid(files, *, with_sources=()):
    """Check files by the validator of an object and the one of a study, if they are there."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("no DICOM tool: dciodvfy, of the package dicom3tools")
    for file in files:
        said = subprocess.run(["dciodvfy", "-new", file], capture_output=True, text=True).stderr
        assert "Error" not in said, said
    together = [*files, *with_sources]
    said = subprocess.run(["dcentvfy", *together], capture_output=True, text=True).stderr
    assert "Error" not in said, said


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return a function that gives a written gradient echo, made once."""
    made = {}

    def get(vendor, enhanced=False):
        if (vendor, enhanced) not in made:
            folder = tmp_path_factory.mktemp(vendor)
            write_series(folder, vendor, enhanced=enhanced)
            made[vendor, enhanced] = folder
        return made[vendor, enhanced]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vendor", "enhanced"), SOURCES)
def test_others_read_the_same_map_at_the_same_place(sources, tmp_path, vendor, enhanced, kind):
    source = sources(vendor, enhanced)
    out = DicomOut(tmp_path / "out", acquisition_of(source), kind)
    files = write(out)
    expected = nib.as_closest_canonical(nib.Nifti1Image(map_of() * 1000, gradient_echo().affine))
    found = read_by_dcm2niix(out.folder, tmp_path / "nii")
    off = np.linalg.inv(expected.affine) @ found.affine - np.eye(4)
    assert np.abs(off[:3] @ (*SHAPE, 1)).max() < 1e-3
    off_ppb = np.abs(found.get_fdata() - expected.get_fdata())
    assert off_ppb.max() <= KINDS[kind] + 1e-4
    images = [dcmread(file) for file in files]
    volume = (
        highdicom.imread(files[0]).get_volume(apply_real_world_transform=True)
        if kind == "pm"
        else highdicom.get_volume_from_series(images, apply_real_world_transform=True)
    )
    ras = np.diag([-1, -1, 1, 1]) @ volume.affine
    lying = nib.as_closest_canonical(nib.Nifti1Image(volume.array, ras))
    np.testing.assert_allclose(lying.affine, found.affine, atol=1e-3)
    np.testing.assert_allclose(lying.get_fdata(), found.get_fdata(), atol=1e-4)
    require_valid(files[:1], with_sources=sorted(source.rglob("*.dcm")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "stored"),
    [*zip(SPREAD, reversed(SPREAD), strict=True)],
    ids=lambda storage: storage.letters,
)
def test_whatever_axes_images_and_map_have(tmp_path, storage, stored):
    truth = gradient_echo()
    write_series(
        tmp_path / "in", "siemens", storage=storage, edit=lambda image: image.echo == 0, nested=True
    )
    out = DicomOut(tmp_path / "out", acquisition_of(tmp_path / "in"))
    chi = np.asfortranarray(stored.of(map_of()))
    before = chi.copy()
    files = write(out, {"chi_ppm": chi}, stored.affine(truth.affine, SHAPE))
    np.testing.assert_array_equal(chi, before)
    seen = np.zeros(SHAPE, bool)
    for file in files:
        image = dcmread(file)
        right, down = np.reshape(image.ImageOrientationPatient, (2, 3))
        rows, columns = np.indices(image.pixel_array.shape)
        between_rows, between_columns = image.PixelSpacing
        lps = np.asarray(image.ImagePositionPatient) + (
            columns[..., None] * right * between_columns + rows[..., None] * down * between_rows
        )
        ras = lps * (-1, -1, 1)
        voxels = (ras - truth.affine[:3, 3]) @ np.linalg.inv(truth.affine[:3, :3]).T
        assert np.abs(voxels - np.rint(voxels)).max() < 1e-3
        index = tuple(np.moveaxis(np.rint(voxels).astype(int), -1, 0))
        assert np.abs(image.pixel_array - 1000 * map_of()[index]).max() <= 0.5 + 1e-4
        seen[index] = True
    assert seen.all()
    assert [dcmread(file).InstanceNumber for file in files] == [*range(1, len(files) + 1)]


@pytest.mark.parametrize(("vendor", "enhanced"), SOURCES)
def test_what_an_image_says(sources, tmp_path, vendor, enhanced):
    acquisition = acquisition_of(sources(vendor, enhanced))
    maps = {"chi_ppm": map_of(), "chi_positive_ppm": map_of(), "chi_negative_ppm": map_of()}
    images = [dcmread(file) for file in write(DicomOut(tmp_path / "out", acquisition), maps)]
    source = dcmread(acquisition.slices[0].path)
    count = len(acquisition.slices)
    assert len(images) == 3 * count
    number = acquisition.slices[0].series_number * 100 + 1
    assert [i.SeriesNumber for i in images[::count]] == [number, number + 1, number + 2]
    assert [i.SeriesDescription for i in images[::count]] == [
        "QSM chi [ppb] RESEARCH",
        "QSM chi positive [ppb] RESEARCH",
        "QSM chi negative [ppb] RESEARCH",
    ]
    assert len({i.SeriesInstanceUID for i in images}) == 3
    assert len({i.SOPInstanceUID for i in images}) == 3 * count
    assert source.SeriesInstanceUID not in {i.SeriesInstanceUID for i in images}
    for image in images:
        for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientName", "StudyDate"):
            assert image[name].value == source[name].value
        assert image.SOPClassUID == image.file_meta.MediaStorageSOPClassUID == MRImageStorage
        assert [*image.ImageType] == ["DERIVED", "PRIMARY", "M", "QSM"]
        assert (image.EchoTime, image.EchoTrainLength) == (None, None)
        assert image.MagneticFieldStrength == 3
        assert not [e.tag for e in image.iterall() if e.tag.is_private]
        gone = {"EchoNumbers", "NumberOfFrames", "ReferencedSOPInstanceUID", "FrameType"}
        assert not gone & {*image.dir()}
        assert (image.RescaleSlope, image.RescaleIntercept, image.RescaleType) == (1, 0, "PPB")
        assert (image.WindowCenter, image.WindowWidth) == (0, 400)
        assert image.ContentQualification == "RESEARCH"
        assert image.ImageComments == "research, not for diagnosis"
        assert "ab" * 32 in image.DerivationDescription
        assert len(image.ContributingEquipmentSequence) == 1
        (mapping,) = image.RealWorldValueMappingSequence
        assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "[ppb]"
        assert mapping["RealWorldValueFirstValueMapped"].VR == "SS"
    referred = images[2].SourceImageSequence
    expected = [echo.first[2] for echo in acquisition.echoes]
    if enhanced:
        assert {item.ReferencedSOPInstanceUID for item in referred} == {
            dcmread(frame.path).SOPInstanceUID for frame in expected
        }
        assert [*referred[0].ReferencedFrameNumber] == [f.number + 1 for f in expected]
    else:
        uids = [dcmread(frame.path).SOPInstanceUID for frame in expected]
        assert [item.ReferencedSOPInstanceUID for item in referred] == uids


@pytest.mark.parametrize("enhanced", [False, True])
def test_what_a_parametric_map_says(sources, tmp_path, enhanced):
    acquisition = acquisition_of(sources("philips", enhanced))
    (file,) = write(DicomOut(tmp_path / "out", acquisition, "pm", series_number=9))
    image, source = dcmread(file), dcmread(acquisition.slices[0].path)
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientName", "StudyTime"):
        assert image[name].value == source[name].value
    assert (image.SeriesNumber, image.SeriesDescription) == (9, "QSM chi [ppb] RESEARCH")
    assert image.SeriesInstanceUID != source.SeriesInstanceUID
    assert image.ContentQualification == "RESEARCH"
    assert "research, not for diagnosis" in image.ImageComments
    assert not [e.tag for e in image.iterall() if e.tag.is_private]
    (shared,) = image.SharedFunctionalGroupsSequence
    (mapping,) = shared.RealWorldValueMappingSequence
    assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "[ppb]"
    assert shared.FrameVOILUTSequence[0].WindowWidth == 400
    equipment = image.ContributingEquipmentSequence[-1]
    assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    referred = {e.value for e in image.iterall() if e.keyword == "ReferencedSOPInstanceUID"}
    phase = {frame.path for echo in acquisition.echoes for frame in echo.first}
    assert referred == {dcmread(path).SOPInstanceUID for path in phase}


def test_of_parts_both_are_named_as_sources(tmp_path):
    write_series(tmp_path / "in", "ge", parts=True)
    acquisition = acquisition_of(tmp_path / "in")
    image = dcmread(write(DicomOut(tmp_path / "out", acquisition))[0])
    assert len(image.SourceImageSequence) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("syntax", "enhanced"),
    [(ImplicitVRLittleEndian, False), (RLELossless, True)],
    ids=["implicit", "enhanced"],
)
@pytest.mark.parametrize("charset", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_keeps_its_bytes(tmp_path, charset, kind, syntax, enhanced):
    write_series(
        tmp_path / "in",
        "philips",
        name=NAMES[charset],
        charset=charset.split("\\"),
        edit=lambda image: image.echo == 0 and image.slice < 2,
        syntax=syntax,
        enhanced=enhanced,
    )
    acquisition = acquisition_of(tmp_path / "in")
    small = map_of()[:, :, :2]
    file = write(DicomOut(tmp_path / "out", acquisition, kind), {"chi_ppm": small})[0]
    source, image = dcmread(acquisition.slices[0].path), dcmread(file)
    for keyword in ("PatientName", "PatientID", "SpecificCharacterSet"):
        found, wanted = (_bytes_of(d, keyword) for d in (image, source))
        assert found == wanted
    assert str(image.PatientName) == NAMES[charset]


def _bytes_of(read, keyword):
    value = read.get_item(keyword).value
    return value if isinstance(value, bytes) else str(value).encode()


def test_what_belongs_to_the_source_alone_is_left_behind(tmp_path):
    def add(image):
        image.add_new(0x60000010, "US", 56)  # an overlay
        image.PixelPaddingValue = 0
        image.IconImageSequence = [Dataset()]
        image.add_new(0x00283010, "SQ", [])
        image.LossyImageCompression = "00"
        image.Laterality = ""
        image.ImageComments = "motion"
        image.OtherPatientIDs = "7"
        nested = Dataset()
        nested.private_block(0x0029, "THEIRS", create=True).add_new(1, "LO", "secret")
        nested.CodeMeaning = "kept"
        image.RequestAttributesSequence = [nested]
        return image.echo == 0 and image.slice < 2

    write_series(tmp_path / "in", "siemens", edit=add)
    out = DicomOut(tmp_path / "out", acquisition_of(tmp_path / "in"))
    files = write(out, {"chi_ppm": map_of()[:, :, :2]})
    image = dcmread(files[0])
    assert 0x60000010 not in image
    gone = {"PixelPaddingValue", "IconImageSequence", "VOILUTSequence", "LossyImageCompression"}
    assert not (gone | {"Laterality"}) & {*image.dir()}
    assert b"secret" not in files[0].read_bytes()
    assert image.RequestAttributesSequence[0].CodeMeaning == "kept"
    assert image.OtherPatientIDs == "7"
    assert "motion" not in image.ImageComments


def of_two_slices(folder, edit=lambda image: None, **options):
    write_series(
        folder,
        "siemens",
        edit=lambda image: [edit(image), image.echo == 0 and image.slice < 2][1],
        **options,
    )


def test_implicit_elements_that_no_dictionary_has(tmp_path):
    of_two_slices(tmp_path / "in", syntax=ImplicitVRLittleEndian)
    for path in (tmp_path / "in").iterdir():
        whole, first = path.read_bytes(), b"\x08\x00\x05\x00"  # the character set
        length = b"\x08\x00\x00\x00\x04\x00\x00\x00\x10\x00\x00\x00"  # of the group, as once
        path.write_bytes(whole.replace(first, length + first, 1))
    out = DicomOut(tmp_path / "out", acquisition_of(tmp_path / "in"))
    image = dcmread(write(out, {"chi_ppm": map_of()[:, :, :2]})[0])
    assert str(image.PatientName) == NAMES["ISO_IR 100"]


def test_a_source_of_the_retired_order_of_bytes(tmp_path):
    of_two_slices(tmp_path / "in", syntax=ExplicitVRBigEndian)
    out = DicomOut(tmp_path / "out", acquisition_of(tmp_path / "in"))
    files = write(out, {"chi_ppm": map_of()[:, :, :2]})
    image = dcmread(files[0])
    assert (image.Rows, [*image.AcquisitionMatrix]) == (SHAPE[1], [0, 48, 56, 0])
    require_valid(files)


def bare(image):
    for keyword in ("PatientSex", "StudyID", "SliceThickness", "BodyPartExamined", "ScanOptions"):
        del image[keyword]
    for keyword in ("Manufacturer", "PatientPosition", "RepetitionTime", "Modality"):
        del image[keyword]


def of_a_knee(image):
    image.BodyPartExamined, image.Laterality = "KNEE", "L"


def elsewhere(image):
    image.TimezoneOffsetFromUTC = "-0930"


@pytest.mark.parametrize("edit", [bare, of_a_knee, elsewhere])
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_scanners_that_say_less_or_more(tmp_path, edit, kind):
    write_series(
        tmp_path / "in",
        "philips",
        edit=lambda image: [edit(image), image.echo == 0 and image.slice < 2][1],
    )
    out = DicomOut(tmp_path / "out", acquisition_of(tmp_path / "in"), kind)
    files = write(out, {"chi_ppm": map_of()[:, :, :2]})
    image = dcmread(files[0])
    if edit is of_a_knee:
        assert (image.BodyPartExamined, image.Laterality) == ("KNEE", "L")
    if edit is elsewhere:
        there = datetime.now(timezone(-timedelta(hours=9, minutes=30)))
        written = datetime.strptime(image.ContentDate + image.ContentTime, "%Y%m%d%H%M%S.%f")
        assert abs(there.replace(tzinfo=None) - written) < timedelta(minutes=5)
    require_valid(files)


def test_without_a_frame_of_reference_nothing_is_written(tmp_path):
    write_series(tmp_path / "in", "ge", edit=lambda image: image.__delattr__("FrameOfReferenceUID"))
    out = DicomOut(tmp_path / "out", acquisition_of(tmp_path / "in"))
    with pytest.raises(DataError, match="no frame of reference"):
        out.check(force=False)


@pytest.mark.parametrize("enhanced", [False, True])
def test_numbers_too_long_for_dicom_are_shortened(tmp_path, enhanced):
    def lengthen(image):
        image.add_new("ImagingFrequency", "DS", "123.25993347167969")
        return image.echo == 0 and image.slice < 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as scanners do
        write_series(tmp_path / "in", "siemens", edit=lengthen, enhanced=enhanced)
    out = DicomOut(tmp_path / "out", acquisition_of(tmp_path / "in"))
    image = dcmread(write(out, {"chi_ppm": map_of()[:, :, :2]})[0])
    assert image.get_item("ImagingFrequency").value.strip() == b"123.259933"


def test_what_exceeds_16_bits_is_clipped_and_counted(sources, tmp_path):
    chi = map_of()
    chi[0, 0, 0], chi[1, 0, 0], chi[2, 0, 0] = 40, -33, 32.767
    out = DicomOut(tmp_path / "out", acquisition_of(sources("siemens")))
    images = [dcmread(file) for file in write(out, {"chi_ppm": chi})]
    pixels = np.stack([image.pixel_array for image in images])
    assert (pixels.min(), pixels.max()) == (-32767, 32767)
    for image in images:
        assert f"2 of {chi.size} voxels of the map clipped" in image.ImageComments


@pytest.mark.parametrize("wrong", ["cut", "moved", "turned", "transposed"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_grid_is_refused(sources, tmp_path, wrong, kind):
    out = DicomOut(tmp_path / "out", acquisition_of(sources("siemens")), kind)
    chi, affine = map_of(), gradient_echo().affine.copy()
    if wrong == "cut":
        chi = chi[:, :-1]
    elif wrong == "moved":
        affine[0, 3] += 0.2
    elif wrong == "turned":
        affine[:3, :3] = nib.eulerangles.euler2mat(0.02) @ affine[:3, :3]
    else:
        chi = chi.transpose(1, 0, 2)
    with pytest.raises(DataError, match="another grid"):
        write(out, {"chi_ppm": chi}, affine)
    assert not [*out.folder.iterdir()]


def test_a_field_is_no_map(sources, tmp_path):
    out = DicomOut(tmp_path / "out", acquisition_of(sources("siemens")))
    for call in (lambda names: out.check(names, force=True), lambda n: out.files(n, None, RUN)):
        with pytest.raises(UsageError, match="local_field_ppm is no susceptibility"):
            call({"local_field_ppm": map_of()})


def test_a_folder_holds_one_run(sources, tmp_path):
    acquisition = acquisition_of(sources("siemens"))
    out = DicomOut(tmp_path / "out", acquisition)
    files = write(out)
    with pytest.raises(UsageError, match="exists; pass --force"):
        out.check(force=False)
    out.check(force=True)
    with pytest.raises(UsageError, match="none of this map"):  # a viewer would load both
        replace(out, kind="pm").check(force=True)
    (out.folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        out.check(force=True)
    for folder, said in (
        (files[0], "is no folder"),
        (tmp_path / "no" / "out", "no is not a folder"),
    ):
        with pytest.raises(DataError, match=said):
            replace(out, folder=folder).check(force=True)


def test_a_parametric_map_needs_its_library(sources, tmp_path, monkeypatch):
    out = DicomOut(tmp_path / "out", acquisition_of(sources("siemens")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out.check(force=False)
    with pytest.raises(MissingDependencyError, match=r"highdicom"):
        replace(out, kind="pm").check(force=False)


@pytest.mark.parametrize("number", [0, -3, 2**31])
def test_numbers_of_no_series_are_refused(sources, tmp_path, number):
    out = DicomOut(tmp_path, acquisition_of(sources("siemens")), series_number=number)
    with pytest.raises(UsageError, match="--dicom-series"):
        out.check(force=False)


def test_a_text_is_drawn_if_it_is_asked_for(sources, tmp_path):
    acquisition = acquisition_of(sources("siemens"))
    out = DicomOut(tmp_path / "out", acquisition, burn_in="RESEARCH")
    plain = DicomOut(tmp_path / "plain", acquisition)
    for drawn, bare in zip(*(map(dcmread, write(o)) for o in (out, plain)), strict=True):
        assert (drawn.BurnedInAnnotation, bare.BurnedInAnnotation) == ("YES", "NO")
        assert "covers the map" in drawn.ImageComments
        rows, columns = np.nonzero(drawn.pixel_array != bare.pixel_array)
        assert rows.max() < 12 <= 30 < columns.max()
        assert {*drawn.pixel_array[:5, :5].ravel()} <= {-200, 200}
    letters = letters_of("RESEARCH", (56, 48))
    edges = (letters[:, [0, -1]], letters[[0, -1]])
    assert not any(edge.any() for edge in edges)  # none is cut
    refused = [(text, "no line") for text in ("", "a\nb", "Übung")]
    for text, said in (*refused, ("X" * 60, "wider")):
        with pytest.raises(UsageError, match=said):
            replace(out, burn_in=text, folder=tmp_path / "third").check(force=False)
    with pytest.raises(UsageError, match="Parametric Map"):
        replace(out, kind="pm").check(force=False)


def test_an_image_that_has_gone_is_named(sources, tmp_path):
    shutil.copytree(sources("siemens"), tmp_path / "in")
    acquisition = acquisition_of(tmp_path / "in")
    acquisition.slices[3].path.unlink()
    with pytest.raises(DataError, match=acquisition.slices[3].path.name):
        write(DicomOut(tmp_path / "out", acquisition))
