"""Which files a calibration folder or list names, and what is said where it does not tell."""

from pathlib import Path

import pytest

from qsm_deploy.calibration.int8.volume_files import find_volumes
from qsm_deploy.kernels.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_maps_with_their_masks_beside_them(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii", "b_mask.nii.gz", "a.nii.gz", "a_mask.nii.gz", "chi.nii.gz", "x.txt")
    first, second = find_volumes(tmp_path)
    assert (first.fields, first.mask) == ((tmp_path / "a.nii.gz",), tmp_path / "a_mask.nii.gz")
    assert second.fields == (tmp_path / "b.nii",)
    assert first.params is None


def test_folders_as_qsm_phantom_writes_them(tmp_path: Path) -> None:
    names = ("field.nii.gz", "mask.nii.gz", "chi.nii.gz", "labels.nii.gz", "params.json")
    touch(tmp_path, *(f"{head}/{name}" for head in ("two", "one") for name in names))
    found = find_volumes(tmp_path)
    assert [volume.fields[0].parent.name for volume in found] == ["one", "two"]
    assert found[0].params == tmp_path / "one" / "params.json"
    assert find_volumes(tmp_path / "two") == found[1:]


def test_the_only_map_of_a_folder_may_have_any_name(tmp_path: Path) -> None:
    touch(tmp_path, "tissue_phase_rad.nii.gz", "mask.nii.gz", "chi_ref.nii.gz")
    assert find_volumes(tmp_path)[0].fields == (tmp_path / "tissue_phase_rad.nii.gz",)


def test_a_list_names_fields_and_mask(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# heads\n\na.nii 'my mask.nii'\nd/a.nii d/b.nii d/m.nii\n")
    touch(tmp_path, "d/params.json")
    first, second = find_volumes(tmp_path / "list.txt")
    assert first.mask == tmp_path / "my mask.nii"
    assert second.fields == (tmp_path / "d/a.nii", tmp_path / "d/b.nii")
    assert second.params == tmp_path / "d/params.json"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no field maps for the calibration; expected NAME.nii.gz"),
        (("readme.md", "sub/x.json"), "no field maps"),
        (("a.nii.gz",), "its mask a_mask.nii.gz is missing"),
        (("head/field.nii.gz",), "its mask field_mask.nii.gz is missing"),
        (("mask.nii.gz", "chi_cosmos.nii.gz"), "no field maps"),
        (("mask.nii", "one.nii", "two.nii"), "one or two, which one is the field map"),
    ],
)
def test_a_folder_that_does_not_tell(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        find_volumes(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no field maps"),
        ("a.nii\n", "line 1: no mask for a.nii"),
        ("a.nii 'm.nii\n", "line 1: No closing quotation"),
        ("\xff\xfe".encode("latin-1"), "not a readable text file"),
    ],
)
def test_a_list_that_is_none(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=message):
        find_volumes(path)


def test_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_volumes(tmp_path / "nowhere")
    touch(tmp_path, "field.nii.gz")
    with pytest.raises(DataError, match="neither a folder nor a list"):
        find_volumes(tmp_path / "field.nii.gz")
