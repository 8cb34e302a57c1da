"""Which transform of a header tells B0: the scanner's, and never a template's without a word."""

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.runtime.scan.nifti import load_on_grid, load_volume, nifti_bytes
from qsm_deploy.runtime.scan.params import Params
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles, load_scan
from qsm_deploy.runtime.scan.transforms import transforms_of

SHAPE = (12, 11, 10)


def affine(degrees=0.0, axis="x", voxel=(1.0, 1.0, 1.0)):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler(axis, degrees, degrees=True).as_matrix() @ np.diag(voxel)
    matrix[:3, 3] = -6, -5, -4
    return matrix


TILTED, UPRIGHT = affine(20), affine()
SHEARED = TILTED.copy()
SHEARED[:3, 1] += 0.1 * SHEARED[:3, 0]


def header_of(qform=None, sform=None):
    """Return the header of a volume with these transforms, each with its code, if any."""
    image = nib.Nifti1Image(np.zeros(SHAPE, np.float32), None)
    for matrix, place in ((qform, image.set_qform), (sform, image.set_sform)):
        if matrix is not None:
            place(*matrix)
    if qform is None:
        image.header["qform_code"] = 0
    return image.header


@pytest.mark.parametrize(
    ("qform", "sform", "right", "says"),
    [
        ((TILTED, 1), (TILTED, 1), TILTED, []),
        ((TILTED, 1), (affine(21), 1), affine(21), []),  # a rounding: the sform
        ((TILTED, 1), None, TILTED, []),
        (None, (TILTED, 1), TILTED, []),
        ((UPRIGHT, 2), (TILTED, 1), TILTED, ["B0 from the sform (scanner); the qform (aligned)"]),
        ((TILTED, 1), (UPRIGHT, 2), TILTED, ["(aligned) lies 20 degrees off"]),
        ((TILTED, 1), (UPRIGHT, 4), TILTED, ["B0 from the qform (scanner); the sform (MNI)"]),
        ((TILTED, 1), (affine(20, voxel=(1.1, 1.1, 1.1)), 3), TILTED, ["other voxel sizes"]),
        ((TILTED, 1), (TILTED @ np.diag([-1, 1, 1, 1]), 5), TILTED, ["names other axes"]),
        ((TILTED, 1), (TILTED, 2), TILTED, []),
        ((TILTED, 1), (SHEARED, 1), TILTED, []),
        (None, (TILTED, 2), TILTED, ["aligned, not scanner"]),
        ((TILTED, 2), (TILTED, 2), TILTED, ["aligned, not scanner"]),
        ((TILTED, 2), (UPRIGHT, 4), TILTED, ["B0 from the qform (aligned)", "aligned, not"]),
        (None, None, UPRIGHT, ["neither qform nor sform"]),
    ],
)
def test_the_scanners_is_taken(qform, sform, right, says):
    found = transforms_of(header_of(qform, sform))
    np.testing.assert_allclose(found.affine[2, :3], right[2, :3], atol=1e-6)
    assert found.doubt is None
    assert len(found.notes) == len(says)
    for note, words in zip(found.notes, says, strict=True):
        assert words in note


@pytest.mark.parametrize(
    ("qform", "sform", "says"),
    [
        (
            (TILTED, 1),
            (UPRIGHT, 1),
            r"both say scanner, and the qform lies 20 degrees off: B0 along qform \(0, 0\.34",
        ),
        ((TILTED, 2), (UPRIGHT, 2), "both say aligned, and the qform lies 20 degrees off"),
        (None, (UPRIGHT, 4), r"template space \(MNI\): where B0 was is not in the header"),
        ((UPRIGHT, 3), (UPRIGHT, 5), "template space"),
        ((UPRIGHT, 4), None, "template space"),
    ],
)
def test_a_header_that_does_not_tell_needs_the_user(tmp_path, qform, sform, says):
    path = tmp_path / "field.nii"
    field = 0.02 * np.random.default_rng(1).standard_normal(SHAPE, dtype=np.float32)
    path.write_bytes(nib.Nifti1Image(field, None, header_of(qform, sform)).to_bytes())
    with pytest.raises(GeometryError, match=says) as refused:
        load_scan(ScanFiles((path,)), Reading())
    assert "pass --b0-direction X Y Z in voxel axes" in str(refused.value)
    stated = Params(b0_direction=(0.0, 0.6, 0.8))
    for reading in (Reading(flags=stated), Reading(from_file=stated)):
        assert load_scan(ScanFiles((path,)), reading).geometry.b0_direction == (0, 0.6, 0.8)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_both_say_scanner_where_two_axes_lie_equally_near(axis):
    """At 45 degrees the last digit would decide what an axis is called."""
    tilted = affine(45, axis)
    for n in range(3):
        flipped = tilted @ np.diag([-1 if m == n else 1 for m in range(3)] + [1])
        for matrix in (tilted, flipped):
            assert transforms_of(header_of((matrix, 1), (matrix, 1))).doubt is None


def test_both_say_scanner_but_the_axes_are_others():
    flipped = TILTED @ np.diag([-1, 1, 1, 1])
    assert "both say scanner" in transforms_of(header_of((TILTED, 1), (flipped, 1))).doubt


@pytest.mark.parametrize(
    ("unit", "voxel", "mm"), [("micron", 70.0, 0.07), ("meter", 7e-4, 0.7), ("unknown", 0.7, 0.7)]
)
@pytest.mark.parametrize("forms", ["qform", "sform", "none"])
def test_lengths_become_millimetres(tmp_path, unit, voxel, mm, forms):
    path, matrix = tmp_path / "field.nii", affine(20, voxel=(voxel,) * 3)
    header = header_of((matrix, 1) if forms == "qform" else None)
    if forms == "sform":
        header.set_sform(matrix, 1)
    header.set_zooms((voxel,) * 3)
    header.set_xyzt_units(unit)
    path.write_bytes(nib.Nifti1Image(np.ones(SHAPE, np.float32), None, header).to_bytes())
    volume = load_volume(path)
    np.testing.assert_allclose(volume.geometry.voxel_size_mm, mm, rtol=1e-6)
    assert any("lengths in" in note for note in volume.transforms.notes) == (unit != "unknown")


@pytest.mark.parametrize(
    "quaternion", [(0.70711, 0.70711, 0), (0.5, 0.5, 0.70711), (0.57735, 0.57736, 0.57735)]
)
def test_a_quaternion_of_five_digits_is_rounded(tmp_path, quaternion):
    path, header = tmp_path / "field.nii", header_of((UPRIGHT, 1))
    for name, value in zip("bcd", quaternion, strict=True):
        header[f"quatern_{name}"] = value
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(4) + np.ones(SHAPE, np.float32).tobytes())
    volume = load_volume(path)
    right = Rotation.from_quat([*quaternion, 0]).as_matrix()
    np.testing.assert_allclose(volume.affine[:3, :3], right, atol=6e-3)
    # and everybody can read what is written with it
    path.write_bytes(nifti_bytes(volume.data, volume.affine, like=volume.header, compress=False))
    np.testing.assert_allclose(nib.load(path).affine[:3, :3], right, atol=6e-3)


def test_a_quaternion_of_another_length_is_none(tmp_path):
    header = header_of((UPRIGHT, 1))
    header["quatern_b"], header["quatern_c"] = 0.9, 0.9
    with pytest.raises(GeometryError, match=r"neither qform nor sform is valid .a quaternion"):
        transforms_of(header)
    header.set_sform(TILTED, 1)
    np.testing.assert_allclose(transforms_of(header).affine, TILTED, atol=1e-6)


@pytest.mark.parametrize(("matrix", "fits"), [(TILTED, True), (UPRIGHT, True), (affine(10), False)])
def test_a_mask_may_lie_on_either_grid(tmp_path, matrix, fits):
    field, mask = tmp_path / "field.nii", tmp_path / "mask.nii"
    header = header_of((TILTED, 1), (UPRIGHT, 2))
    field.write_bytes(nib.Nifti1Image(np.ones(SHAPE, np.float32), None, header).to_bytes())
    mask.write_bytes(nib.Nifti1Image(np.ones(SHAPE, np.uint8), matrix).to_bytes())
    like = load_volume(field)
    if fits:
        assert load_on_grid(mask, like).data.all()
        return
    with pytest.raises(GeometryError, match="disagree"):
        load_on_grid(mask, like)
