"""``qsm-run --dicom`` from a folder to maps, as a user types it."""

import json
import tempfile

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.dicom.output import DicomOut
from tests.runtime.dicom.test_output import read_by_dcm2niix
from tests.runtime.dicom.vendors import NAME, VENDORS, gradient_echo, write_series
from tests.runtime.storages import STORAGES


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return what runs a command line in an empty folder, and gives its code and what it says."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    truth = gradient_echo()
    nib.save(nib.Nifti1Image(truth.mask.astype(np.uint8), truth.affine), "mask.nii.gz")

    def call(*arguments):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        assert not [*(tmp_path / "temporary").iterdir()], "what was converted stays"
        assert NAME.partition("^")[0] not in said.out + said.err
        return code, said.out, said.err

    return call


FAST = ("--method", "tkd", "-m", "mask.nii.gz", "--background-removal", "vsharp")


def test_one_phase_gives_one_map_of_every_vendor(run, tmp_path):
    made = {}
    for vendor in VENDORS:
        write_series(tmp_path / vendor, vendor)
        code, out, err = run("--dicom", vendor, *FAST, "--report", f"{vendor}.json")
        assert (code, out) == (0, f"{tmp_path / vendor}_chi.nii.gz\n"), err
        made[vendor] = nib.load(f"{vendor}_chi.nii.gz")
        fields = json.loads((tmp_path / f"{vendor}.json").read_text())["input"]["fields"]
        assert fields[0].endswith("_echo-1_phase.nii")
    one, *others = (volume.get_fdata() for volume in made.values())
    inside = one != 0
    for other in others:
        assert np.linalg.norm((other - one)[inside]) < 0.05 * np.linalg.norm(one[inside])


@pytest.mark.parametrize("kind", ["mr", "pm"])
def test_the_map_goes_back_as_dicom_and_nifti_alike(run, tmp_path, kind):
    write_series(tmp_path / "study", "siemens", storage=STORAGES[22])
    how = ("--dicom-out", "map", "--dicom-out-kind", kind, "--dicom-series", "7")
    code, out, err = run("--dicom", "study", *FAST, *how, "-o", "chi.nii.gz", "--out-units", "ppb")
    assert (code, out) == (0, "chi.nii.gz\nmap\n"), err
    images = [dcmread(path) for path in (tmp_path / "map").iterdir()]
    assert {image.SeriesNumber for image in images} == {7}
    assert len(images) == (24 if kind == "mr" else 1)
    found = read_by_dcm2niix(tmp_path / "map", tmp_path / "nii")
    chi = nib.as_closest_canonical(nib.load("chi.nii.gz"))
    assert found.affine == pytest.approx(chi.affine, abs=1e-3)
    assert found.get_fdata() == pytest.approx(chi.get_fdata(), abs=0.501)


def test_without_o_only_dicom_is_written(run, tmp_path):
    write_series(tmp_path / "study", "ge")
    code, out, _ = run("--dicom", "study", *FAST, "--dicom-out", "map")
    assert (code, out) == (0, "map\n")
    assert {path.name for path in tmp_path.iterdir()} == {
        "study",
        "map",
        "mask.nii.gz",
        "temporary",
    }


def test_what_is_only_planned_leaves_nothing(run, tmp_path):
    write_series(tmp_path / "study", "philips")
    code, out, _ = run("--dicom", "study", *FAST, "--dicom-out", "map", "--dry-run")
    assert code == 0
    assert "would write" in out
    assert not (tmp_path / "map").exists()


def test_the_list_of_series(run, tmp_path):
    write_series(tmp_path / "study", "siemens")
    code, out, err = run("--dicom", "study", "--list")
    assert (code, err) == (0, "")
    assert [line.partition(" (")[0] for line in out.splitlines()] == ["series 11", "series 12"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--series", "3"), 3, r"no series 3; it holds series 5 \(qsm_gre\)"),
        (("--dicom-out", "study"), 2, "holds 144 files that are none of this map"),
        (("--dicom-out", "no/map"), 3, "no is not a folder"),
        (("--dicom-out", "map", "-o", "map/x.nii.gz"), 2, "would lie among the images"),
        (("--magnitude", "mask.nii.gz"), 2, "--dicom finds its images itself; drop --magnitude"),
        (("--bids", "study"), 2, "drop --bids"),
        (
            ("--dicom-out", "map", "--until", "total-field", "--total-field", "t.nii.gz"),
            2,
            "of a map",
        ),
        (("field.nii.gz",), 2, "field.nii.gz is no model"),
    ],
)
def test_what_makes_no_sense_is_said(run, tmp_path, flags, code, message):
    write_series(tmp_path / "study", "philips")
    found, _, err = run("--dicom", "study", *flags)
    assert found == code
    assert message.replace("\\", "") in err


def test_flags_of_dicom_need_it(run):
    for flag in (("--list",), ("--series", "3"), ("--dicom-out", "map")):
        code, _, err = run("field.nii.gz", *flag)
        assert code == 2
        assert f"{flag[0]} needs --dicom FOLDER" in err
    for flag in (("--dicom-out-kind", "mr"), ("--dicom-series", "3"), ("--burn-in", "x")):
        code, _, err = run("--dicom", "study", *flag)
        assert code == 2
        assert f"{flag[0]} needs --dicom-out FOLDER" in err


def test_nifti_outlives_what_cannot_be_written_as_dicom(run, tmp_path, monkeypatch):
    def fail(*_):
        raise DataError("gone")

    write_series(tmp_path / "study", "ge")
    monkeypatch.setattr(DicomOut, "files", fail)
    code, _, err = run("--dicom", "study", *FAST, "--dicom-out", "map", "-o", "chi.nii.gz")
    assert code == 3
    assert "gone" in err
    assert nib.load("chi.nii.gz").get_fdata().any()


def test_a_field_strength_that_nobody_states(run, tmp_path):
    def strip(image):
        del image.MagneticFieldStrength, image.ImagingFrequency

    write_series(tmp_path / "study", "ge", edit=strip)
    code, _, err = run("--dicom", "study", *FAST)
    assert code == 2
    assert "series 5 says neither MagneticFieldStrength nor ImagingFrequency; pass --field" in err
    assert run("--dicom", "study", *FAST, "--field-strength", "3")[0] == 0


def test_maps_on_the_way_are_kept(run, tmp_path):
    write_series(tmp_path / "study", "ge", parts=True)
    flags = ("--until", "local-field", "--local-field", "local.nii.gz")
    code, out, err = run("--dicom", "study", *FAST[2:], *flags)
    assert (code, out) == (0, "local.nii.gz\n"), err
