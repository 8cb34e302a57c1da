"""``qsm-run --bids --html``: a page of every recording, and the index that is made of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.cohort import pages
from qsm_deploy.runtime.cohort.index import Seen, index_page, judge
from qsm_deploy.runtime.page.parts import json_script
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from tests.browsing import Page, assert_asks_nobody

SHAPE = (18, 20, 14)
BROKEN, NOISY, CUT = "sub-2", "sub-4", "sub-6"


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Return a dataset of seven boxes: one is broken, one noisy, and a mask is cut."""
    root = tmp_path / "study"
    root.mkdir()
    about = {"Name": "Boxes", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    for n in range(1, 8):
        name = f"sub-{n}"
        rng = np.random.default_rng(n)
        mask = np.zeros(SHAPE, np.uint8)
        mask[2:-2, 2 : -2 - n % 2, 2:-2] = 1
        field = rng.normal(0, 0.002 if name != NOISY else 0.02, SHAPE).astype(np.float32)
        field[7:10, 8:11, 6:9] += 0.08
        if name == BROKEN:
            field[:] = np.nan
        if name == CUT:
            mask[:, :13] = 0
        anat = root / name / "anat"
        anat.mkdir(parents=True)
        for kind, volume in (("localfield", field * mask), ("mask", mask)):
            (anat / f"{name}_{kind}.nii.gz").write_bytes(nifti_bytes(volume, affine))
        (anat / f"{name}_localfield.json").write_text('{"Units": "ppm"}')
    return root


@pytest.fixture
def run(dataset, tmp_path, capsys):
    """Return a function that runs qsm-run on the dataset, its pages in ``pages``."""

    def run_on(line: str = "") -> tuple[int, str]:
        words = ["--bids", str(dataset), "--method", "tkd", "-q", *line.split()]
        code = main([*words, "--html", str(tmp_path / "pages")])
        return code, capsys.readouterr().err

    return run_on


def rows_of(index: Path) -> list[list[str]]:
    return Page(index.read_text()).rows[1:]


def test_what_looks_wrong_comes_first_with_its_reason(run, tmp_path) -> None:
    assert run()[0] == 3
    index = tmp_path / "pages" / "index.html"
    names = [row[1] for row in rows_of(index)]
    assert names[0] == BROKEN
    assert set(names[1:3]) == {NOISY, CUT}
    assert sorted(names) == [f"sub-{n}" for n in range(1, 8)]
    told = {row[1]: row[2] for row in rows_of(index)}
    assert "NaN or Inf" in told[BROKEN]
    assert str(tmp_path) not in index.read_text()
    assert "noise" in told[NOISY]
    assert "mask 1 ml, the cohort's median is" in told[CUT]
    assert not told["sub-1"] + told["sub-3"] + told["sub-5"]
    text = index.read_text()
    assert_asks_nobody(text)
    assert text.count("<img") == 6
    for name in names:
        page = (tmp_path / "pages" / f"{name}.html").read_text()
        assert_asks_nobody(page)
        assert page.count('class="volume"') == (0 if name == BROKEN else 2)
        assert f'href="{name}.html"' in text


def test_a_run_that_is_resumed_or_interrupted_has_a_whole_index(run, dataset, tmp_path) -> None:
    assert run("--participant-label 1 2")[0] == 3
    index = tmp_path / "pages" / "index.html"
    assert [row[1] for row in rows_of(index)] == [BROKEN, "sub-1"]
    first = (tmp_path / "pages" / "sub-1.html").read_bytes()
    assert run("--resume --participant-label 1 3")[0] == 0
    assert rows_of(index)[0][1] == BROKEN
    assert len(rows_of(index)) == 3
    assert (tmp_path / "pages" / "sub-1.html").read_bytes() == first
    for kind in ("localfield", "mask"):  # what was broken is repaired
        repaired = dataset / BROKEN / "anat" / f"{BROKEN}_{kind}.nii.gz"
        whole = dataset / "sub-1" / "anat" / f"sub-1_{kind}.nii.gz"
        repaired.write_bytes(whole.read_bytes())
    index.unlink()
    assert run("--participant-label 2")[0] == 0
    assert {row[1] for row in rows_of(index)} == {"sub-1", BROKEN, "sub-3"}
    assert not any("NaN" in row[2] for row in rows_of(index))


def test_a_map_from_before_is_in_the_index_without_a_page_until_it_is_made_again(
    run, dataset, tmp_path, capsys
) -> None:
    assert main(["--bids", str(dataset), "--method", "tkd", "--participant-label", "1", "-q"]) == 0
    assert run("--resume --participant-label 1 3")[0] == 0
    index = tmp_path / "pages" / "index.html"
    assert rows_of(index)[0][1:3] == ["sub-1", pages.EARLIER]
    assert run("--force --participant-label 1")[0] == 0
    assert [row[2] for row in rows_of(index)] == [""] * 2


def test_what_was_wrong_with_a_subject_goes_when_its_recordings_are_found(
    run, dataset, tmp_path
) -> None:
    anat, session = dataset / "sub-3" / "anat", dataset / "sub-3" / "ses-a"
    hidden = dataset / "anat"
    anat.rename(hidden)
    anat.mkdir()
    assert run("--participant-label 1 3")[0] == 3
    index = tmp_path / "pages" / "index.html"
    assert [row[1] for row in rows_of(index)] == ["sub-3", "sub-1"]
    assert run("--participant-label 4")[0] == 0  # which tells nothing of the third
    assert {row[1] for row in rows_of(index)} == {"sub-1", "sub-3", "sub-4"}
    anat.rmdir()
    session.mkdir()
    hidden.rename(session / "anat")
    for path in (session / "anat").iterdir():
        path.rename(path.with_name(path.name.replace("sub-3_", "sub-3_ses-a_")))
    assert run("--participant-label 3")[0] == 0
    assert {row[1] for row in rows_of(index)} == {"sub-1", "sub-3_ses-a", "sub-4"}


def test_a_page_of_one_run_is_none_of_the_cohort(run, dataset, tmp_path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    field, mask = (
        str(dataset / "sub-1" / "anat" / f"sub-1_{kind}.nii.gz") for kind in ("localfield", "mask")
    )
    words = ["-m", mask, "--units", "ppm", "--method", "tkd", "-q", "-o", str(tmp_path / "chi.nii")]
    assert main([field, *words, "--html", str(folder / "sub-1.html")]) == 0
    assert run("--participant-label 3")[0] == 0
    assert [row[1] for row in rows_of(folder / "index.html")] == ["sub-3"]
    code, said = run("--participant-label 1")
    assert code == 2
    assert "sub-1.html is no page of qsm-run --bids" in said


def test_the_index_tells_who_made_the_maps_and_its_pictures_have_a_text_and_a_size() -> None:
    def seen(name: str, title: str, size_mm: list[float]) -> Seen:
        drawn = {"png": "", "size_mm": size_mm}
        return Seen(f"{name}.html", {"name": name, "title": title, "thumbnail": drawn})

    failed = Seen("d.html", {"name": "d", "failed": "why"})
    sizes = {"a": [160, 4], "b": [20, 180], "c": [90, 90]}
    text = index_page([*(seen(n, f"m{len(n)}", s) for n, s in sizes.items()), failed])
    assert "Made: 3 by m1." in text
    assert 'width="120" height="3" alt="axial plane of a"' in text
    assert 'width="14" height="120" alt="axial plane of b"' in text
    assert 'width="120" height="120" alt="axial plane of c"' in text
    assert text.count('href="d.html"') == 1
    two = index_page([seen("a", "tv", [1, 1]), seen("b", "tkd", [1, 1]), seen("c", "tv", [1, 1])])
    assert "Made: 2 by tv; 1 by tkd." in two
    assert "Made:" not in index_page([failed])


def test_a_folder_that_cannot_be_made_is_named_with_its_flag(dataset, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    words = ["--bids", str(dataset), "--method", "tkd", "-q", "--html", str(tmp_path / "file")]
    assert main(words) == 3
    assert "choose another --html" in capsys.readouterr().err
    assert not (dataset / "derivatives").exists()


def test_a_map_and_its_page_are_there_though_the_index_cannot_be_written(
    dataset, tmp_path, monkeypatch, capsys
) -> None:
    def full(*_) -> None:
        raise DataError("no space")

    monkeypatch.setattr(pages.Pages, "index", full)
    words = ["--bids", str(dataset), "--method", "tkd", "-q", "--participant-label", "1"]
    assert main([*words, "--html", str(tmp_path / "pages")]) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()).is_file()
    assert "failed" not in (tmp_path / "pages" / "sub-1.html").read_text()
    assert "sub-1: no space" in err


def test_every_page_leads_back_to_the_index(run, tmp_path) -> None:
    run("")
    made = sorted(path.name for path in (tmp_path / "pages").glob("sub-*.html"))
    assert made
    for name in made:
        assert '<a href="index.html">' in (tmp_path / "pages" / name).read_text()


def test_a_map_and_its_page_appear_together(dataset, tmp_path, monkeypatch, capsys) -> None:
    def killed(*_, **__) -> None:
        raise KeyboardInterrupt

    words = ["--bids", str(dataset), "--method", "tkd", "-q", "--participant-label", "1"]
    words += ["--html", str(tmp_path / "pages")]
    monkeypatch.setattr("qsm_deploy.runtime.job.one_scan.write_together", killed)
    assert main(words) == 130
    assert not [*dataset.rglob("*Chimap*")]
    assert not (tmp_path / "pages" / "sub-1.html").exists()
    monkeypatch.undo()
    assert main([*words, "--resume"]) == 0
    assert "failed" not in (tmp_path / "pages" / "sub-1.html").read_text()


def test_no_file_of_others_is_written_over(run, tmp_path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "index.html").write_text("<h1>mine</h1>")
    code, said = run("--participant-label 1")
    assert code == 2
    assert "index.html is no page of qsm-run --bids; choose another --html" in said
    assert (folder / "index.html").read_text() == "<h1>mine</h1>"


def test_a_dry_run_writes_no_page_and_names_need_pages(run, dataset, tmp_path, capsys) -> None:
    assert run("--dry-run --participant-label 1")[0] == 0
    assert not (tmp_path / "pages").exists()
    assert main(["--bids", str(dataset), "--html-names"]) == 2
    assert "add --html FOLDER" in capsys.readouterr().err


def test_a_cohort_of_few_has_nothing_odd_and_what_all_have_is_said_once() -> None:
    def seen(n: int, **more) -> Seen:
        return Seen(f"{n}.html", {"name": f"{n}", "mask_ml": 1000.0, "notes": ["x"], **more})

    few = [seen(1), seen(2), seen(3, mask_ml=1.0)]
    judge(few)
    assert [one.lines for one in few] == [["x"]] * 3
    many = [*map(seen, range(8)), seen(9, mask_ml=700.0, notes=["x", "y"])]
    judge(many)
    assert [one.lines for one in many] == [[]] * 8 + [
        ["mask 700 ml, the cohort's median is 1000 ml", "y"]
    ]
    assert sorted(many, key=Seen.rank)[0] is many[-1]


def test_what_most_note_with_other_numbers_is_usual() -> None:
    def seen(n: int, *notes: str) -> Seen:
        return Seen(f"{n}.html", {"name": f"{n}", "title": "tv", "notes": notes})

    many = [
        *(seen(n, f"taking {30.5 + n} % of the volume", "x 1") for n in range(4)),
        seen(4, "y 2"),
    ]
    assert "Noted of most: taking … % of the volume" in index_page(many)
    assert [one.lines for one in many] == [[]] * 4 + [["y 2"]]


def test_notes_are_compared_without_the_names_that_pages_may_tell(run, dataset, tmp_path) -> None:
    for mask in dataset.glob("sub-*/anat/*_mask.nii.gz"):
        mask.write_bytes(nifti_bytes(np.ones(SHAPE, np.uint8), np.diag([1.0, 1.0, 2.0, 1.0])))
    assert run("--html-names")[0] == 3
    text = (tmp_path / "pages" / "index.html").read_text()
    assert "Noted of most: the mask: … % of the volume is inside" in text
    assert "sub-1_mask.nii.gz: 100 % of" in (tmp_path / "pages" / "sub-1.html").read_text()


def test_a_voxel_size_that_not_most_have_is_odd() -> None:
    def seen(n: int, *size: float) -> Seen:
        return Seen(f"{n}.html", {"name": f"{n}", "title": "tv", "voxel_size_mm": size})

    alike = [seen(n, 1, 1, 2.0001) for n in range(4)]
    other = seen(4, 1, 1, 3)
    index_page([*alike, other])
    assert [one.lines for one in alike] == [[]] * 4
    assert other.lines == ["voxel 1 x 1 x 3 mm, most have 1 x 1 x 2"]
    halves = [seen(n, 1, 1, 2 + n % 2) for n in range(10)]
    judge(halves)
    assert not any(one.lines for one in halves)
    judge([])


THUMBNAIL = {"png": "AAAA", "size_mm": [10, 20.5]}


@pytest.mark.parametrize(
    ("said", "rows"),
    [
        ({"thumbnail": THUMBNAIL}, 1),
        ({"thumbnail": THUMBNAIL | {"png": '"><script>'}}, 0),
        ({"thumbnail": THUMBNAIL | {"size_mm": [0, 0]}}, 0),
        ({"thumbnail": 1}, 0),
        ({"mask_ml": "x"}, 0),
        ({"voxel_size_mm": 1}, 0),
        ({"notes": [1]}, 0),
        ({"title": []}, 0),
        ({"name": {"a": 1}}, 0),
    ],
)
def test_what_says_of_itself_what_cannot_be_is_no_page(tmp_path, said, rows) -> None:
    summary = {"name": "sub-1", "title": "tkd"} | said
    (tmp_path / "sub-1.html").write_text(json_script(summary, "summary"))
    pages.Pages(tmp_path, tmp_path).index()
    assert len(rows_of(tmp_path / "index.html")) == rows
