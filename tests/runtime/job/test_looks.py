"""``qsm-run --html``: the page of a run, with its values, what is known of it, and no names."""

import base64
import gzip
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import qsm_deploy.runtime as qsm
from qsm_deploy.calibration.phantom.cli import main as phantom
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.job.looks import without_names
from qsm_deploy.runtime.page.rows import scan_rows
from qsm_deploy.runtime.scan.scan import ScanFiles
from tests.browsing import Page, assert_asks_nobody, driven

PATIENT = "DOE_JANE"


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    """Return a folder with a small head whose files have a patient's name."""
    folder = tmp_path_factory.mktemp("head")
    words = ["--shape", "24", "28", "18", "--voxel-size", "1", "1", "1.5", "--seed", "1", "-q"]
    assert phantom([str(folder), "--force", *words]) == 0
    for name in ("field", "mask", "chi"):
        (folder / f"{name}.nii.gz").rename(folder / f"{PATIENT}_{name}.nii.gz")
    return folder


@pytest.fixture
def run(head, tmp_path, capsys):
    """Return a function that runs qsm-run on the head, ``@`` being the test's folder."""

    def run_on(line: str = "") -> tuple[int, str]:
        words = [word.replace("@", f"{tmp_path}/") for word in line.split()]
        files = [str(head / f"{PATIENT}_{name}.nii.gz") for name in ("field", "mask")]
        capsys.readouterr()
        code = main([files[0], "-m", files[1], "--method", "tkd", "-q", *words])
        return code, capsys.readouterr().err

    return run_on


def facts(text: str) -> dict:
    return json.loads(re.findall(r'class="facts">(.*?)</script>', text)[0])


def test_the_page_holds_the_map_and_what_is_known_and_asks_nobody(run, head, tmp_path) -> None:
    truth = head / f"{PATIENT}_chi.nii.gz"
    assert run(f"-o @chi.nii.gz --truth {truth} --html @page.html --report @run.json")[0] == 0
    text = (tmp_path / "page.html").read_text()
    said = json.loads((tmp_path / "run.json").read_text())
    assert_asks_nobody(text)
    assert [row["name"] for row in facts(text)["rows"]] == [
        *("local field", "susceptibility χ", "true χ", "error of χ")
    ]
    packed = re.findall(r'class="volume">([^<]*)<', text)[1]
    shape = facts(text)["shape"]
    volume = np.frombuffer(gzip.decompress(base64.b64decode(packed)), "<i2")
    volume = volume.reshape(shape, order="F")[::-1]  # x runs to the left of the head
    chi = nib.load(tmp_path / "chi.nii.gz").get_fdata(dtype=np.float32)
    mask = nib.load(head / f"{PATIENT}_mask.nii.gz").get_fdata() > 0
    assert np.count_nonzero(volume != -32768) == mask.sum()
    assert sorted(volume[volume != -32768]) == sorted(np.round(1000 * chi[mask]))
    first = np.argwhere(mask).min(axis=0)
    corner = tuple(np.argwhere(volume != -32768).min(axis=0))
    box = tuple(slice(a - b, a - b + n) for a, b, n in zip(first, corner, shape, strict=True))
    assert (volume == np.where(mask, np.round(1000 * chi), -32768)[box]).all()
    rows = {row[0]: row[1] for row in Page(text).rows if len(row) == 2}
    assert rows["field residual"] == f"{said['field_residual']:.3f}"
    assert rows["NRMSE [%]"] == f"{said['metrics']['nrmse_percent']:.4g}"
    assert rows["mask"].startswith(f"{mask.sum()} voxels, {1.5 * mask.sum() / 1000:.0f} ml")
    assert rows["method"].startswith("tkd")
    assert "research, not for diagnosis" in text


def test_it_names_no_file_unless_it_is_told_to(run, tmp_path) -> None:
    for flag, named in (("", False), ("--html-names", True)):
        assert run(f"--force -o @chi.nii.gz --html @page.html {flag}")[0] == 0
        assert (PATIENT in (tmp_path / "page.html").read_text()) == named
    files = ScanFiles((Path("/data/DOE/f1.nii"), Path("f2.nii")), noise_map=Path("DOE/noise.nii"))
    note = "/data/DOE/f1.nii: odd; f1.json, f2.nii and DOE/noise.nii too, not off1.nii"
    said = "the field: odd; the field, the field and the noise map too, not off1.nii"
    assert without_names(note, files) == said


def test_slices_and_window_are_those_of_the_figure(run, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    look = "--slices 1 -2 3 --window -20 80 --out-units ppb"
    assert run(f"-o @chi.nii.gz --figure @chi.png --html @page.html {look}")[0] == 0
    text = (tmp_path / "page.html").read_text()
    windows = [row["window"] for row in facts(text)["rows"]]
    assert windows == [[-50, 50], [-20, 80]]
    body = "return [...document.querySelectorAll('.titles output')].map((t) => t.textContent)"
    titles = driven(text, tmp_path, body)
    lies = [float(title.split()[2]) * (1 - 2 * (title.split()[1] in "LPI")) for title in titles]
    assert np.abs(np.subtract(lies, (3, -2, 1))).max() <= 0.75


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--html @page.htm", "must end in .html"),
        ("--html @old.html", "old.html exists; pass --force"),
        ("--html-names", "--html-names is of a page; add --html FILE.html"),
        ("--html @page.html --window 3 1", "--window is 3 1, expected LOW HIGH"),
        ("--html @page.html --slices 900 0 0", "lies outside the mask"),
        ("--html @page.html --report @page.html", "two outputs would go to"),
        ("--html @no/page.html", "is not a folder"),
    ],
)
def test_what_cannot_be_written_or_shown_is_refused_before_any_work(
    line, says, run, tmp_path
) -> None:
    (tmp_path / "old.html").write_text("kept")
    code, said = run(f"-o @chi.nii.gz {line}")
    assert code in (2, 3)
    assert says in said
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]


def test_a_page_of_a_field_alone_is_refused(head, tmp_path, capsys) -> None:
    field = str(head / f"{PATIENT}_field.nii.gz")
    page = str(tmp_path / "page.html")
    words = ["--total-field", field, "--until", "local-field", "--local-field"]
    assert main([*words, str(tmp_path / "local.nii"), "--html", page]) == 2
    assert "--html is of a map" in capsys.readouterr().err


def test_python_writes_it_too_and_a_dry_run_none(head, tmp_path) -> None:
    field, mask = (head / f"{PATIENT}_{name}.nii.gz" for name in ("field", "mask"))
    said = {"mask": mask, "method": "tkd", "html": tmp_path / "page.html"}
    qsm.run(field, **said, dry_run=True)
    assert not said["html"].exists()
    result = qsm.run(field, **said)
    assert result.report["field_residual"] > 0
    assert "How it was made" in said["html"].read_text()


def test_every_map_that_is_given_has_a_row(head) -> None:
    field, mask = (head / f"{PATIENT}_{name}.nii.gz" for name in ("field", "mask"))
    scan = qsm.run(field, mask=mask, method="tkd").scan
    maps = dict.fromkeys(("chi_positive_ppm", "chi_negative_ppm"), scan.measured[0])
    names = [row.name for row in scan_rows(scan, maps, window=(0, 1))]
    assert names == ["local field", "paramagnetic χ+", "diamagnetic χ-"]
    assert [row.window for row in scan_rows(scan, maps, window=(0, 1))][1:] == [(0, 1)] * 2


@pytest.mark.slow
def test_field_and_map_of_a_whole_head_are_below_4_2_mb(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    assert phantom([str(tmp_path), "--seed", "1", "-q", "--force"]) == 0
    files = [str(tmp_path / "field.nii.gz"), "-m", str(tmp_path / "mask.nii.gz")]
    assert (
        main([*files, "-q", "-o", str(tmp_path / "c.nii"), "--html", str(tmp_path / "p.html")]) == 0
    )
    assert (tmp_path / "p.html").stat().st_size < 4.2e6
    state = "return document.documentElement.dataset.state"
    assert driven((tmp_path / "p.html").read_text(), tmp_path, state) == "ready"


def test_a_page_of_dicom_names_no_patient(tmp_path, monkeypatch) -> None:
    pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    from tests.runtime.dicom.vendors import NAME, gradient_echo, write_series

    monkeypatch.chdir(tmp_path)
    write_series(tmp_path / PATIENT, "siemens")
    truth = gradient_echo()
    nib.save(nib.Nifti1Image(truth.mask.astype(np.uint8), truth.affine), "mask.nii.gz")
    flags = ["--method", "tkd", "-m", "mask.nii.gz", "--background-removal", "vsharp", "-q"]
    assert main(["--dicom", PATIENT, *flags, "-o", "chi.nii", "--html", "page.html"]) == 0
    text = Path("page.html").read_text()
    assert [row["name"] for row in facts(text)["rows"]] == ["local field", "susceptibility χ"]
    for word in (*NAME.split("^"), "P-0815", PATIENT, "_echo-"):
        assert word not in text
