"""B0 from the scanner's transform, whatever a template's says, through qsm-run."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.cli import main

SHAPE, VOXEL_MM = (46, 55, 48), (3.0, 3.0, 3.0)
TILT_DEG = 20


def affine(degrees):
    matrix = np.diag([*VOXEL_MM, 1.0])
    matrix[:3, :3] = Rotation.from_euler("x", degrees, degrees=True).as_matrix() * VOXEL_MM
    matrix[:3, 3] = -70, -80, -60
    return matrix


SCANNER, TEMPLATE = affine(TILT_DEG), affine(0)
SHEARED = SCANNER.copy()
SHEARED[:3, 1] += 0.1 * SCANNER[:3, 0]


@pytest.fixture(scope="module")
def head():
    return head_phantom(Geometry.from_affine(SHAPE, SCANNER), seed=501)


def save(path, data, qform=None, sform=None):
    image = nib.Nifti1Image(data, None)
    image.header["qform_code"] = 0
    for form, put in ((qform, image.set_qform), (sform, image.set_sform)):
        if form is not None:
            put(*form)
    image.header.set_zooms(VOXEL_MM)
    nib.save(image, path)
    return path


@pytest.fixture
def run(tmp_path, head, capsys):
    """Return a function that runs tkd: its exit code, what it says, and the error of the map."""

    def judge(qform, sform, *flags, beside=None):
        volumes = {"mask": head.mask.astype(np.uint8), "labels": head.labels}
        volumes["truth"] = head.chi_ppm
        words = [save(tmp_path / "field.nii", head.local_field_ppm, qform, sform), *flags]
        for name, data in volumes.items():
            path = tmp_path / f"{name}.nii"
            if beside is None:
                save(path, data, qform, sform)
            else:  # as nibabel saves what a program makes of it: a sform alone
                nib.save(nib.Nifti1Image(data, beside), path)
            words += [f"--{name}", path]
        report = tmp_path / "run.json"
        words += ["--method", "tkd", "-o", tmp_path / "chi.nii", "--report", report, "--force"]
        code = main([str(word) for word in words])
        said = capsys.readouterr().err
        if code:
            return code, said, None
        return code, said, json.loads(report.read_text())["metrics"]["nrmse_percent"]

    return judge


@pytest.fixture
def right(run):
    """Return the error of the map where nothing is in doubt."""
    return run((SCANNER, 1), (SCANNER, 1))[2]


@pytest.mark.parametrize(
    ("qform", "sform", "says"),
    [
        ((SCANNER, 1), None, None),
        (None, (SCANNER, 1), None),
        ((SCANNER, 2), (SCANNER, 1), None),
        ((SCANNER, 1), (TEMPLATE, 4), "B0 from the qform (scanner); the sform (MNI) lies 20"),
        ((SCANNER, 1), (TEMPLATE, 2), "B0 from the qform (scanner); the sform (aligned) lies 20"),
        ((TEMPLATE, 2), (SCANNER, 1), "B0 from the sform (scanner); the qform (aligned) lies 20"),
        ((SCANNER, 1), (SHEARED, 1), None),
        ((SCANNER, 2), None, "header says aligned, not scanner"),
    ],
)
def test_the_scanner_tells(run, right, qform, sform, says):
    code, said, error = run(qform, sform)
    assert code == 0
    assert error == pytest.approx(right, abs=0.1)
    if says is None:
        assert "B0 from" not in said
    else:
        assert says in said


def test_nobody_tells(run, right):
    code, said, error = run(None, None)
    assert code == 0
    assert "neither qform nor sform: taking B0 along the third voxel axis" in said
    assert error > right + 20


@pytest.mark.parametrize(
    ("qform", "sform", "says"),
    [
        (None, (TEMPLATE, 4), "template space (MNI): where B0 was is not in the header"),
        (
            (SCANNER, 1),
            (TEMPLATE, 1),
            "the qform lies 20 degrees off: B0 along qform (0, 0.342, 0.9397) and sform (0, 0, 1)",
        ),
        (
            (SCANNER, 2),
            (TEMPLATE, 2),
            "the qform lies 20 degrees off: B0 along qform (0, 0.342, 0.9397) and sform (0, 0, 1)",
        ),
    ],
)
def test_what_does_not_tell_is_refused(run, right, qform, sform, says):
    code, said, _ = run(qform, sform)
    assert code == 3
    assert says in said
    assert "pass --b0-direction X Y Z" in said
    stated = np.round(SCANNER[2, :3] / VOXEL_MM, 6)
    code, _, error = run(qform, sform, "--b0-direction", *stated)
    assert code == 0
    assert error == pytest.approx(right, abs=0.1)


@pytest.mark.parametrize("beside", [SCANNER, TEMPLATE])
def test_what_lies_beside_may_have_either_transform(run, right, beside):
    code, _, error = run((SCANNER, 1), (TEMPLATE, 4), beside=beside)
    assert code == 0
    assert error == pytest.approx(right, abs=0.1)
    code, said, _ = run((SCANNER, 1), (TEMPLATE, 4), beside=affine(10))
    assert code == 3
    assert "disagree" in said
