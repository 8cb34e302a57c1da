"""``--status``, the files of outcomes, and the table: what is left of a cohort when all is over."""

import csv
import json
import os
import shutil

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.cohort import outcomes
from qsm_deploy.runtime.cohort.outcomes import Outcome, OutcomeFile, told_outcomes
from qsm_deploy.runtime.cohort.sharding import Shard
from qsm_deploy.runtime.console import atomic
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from tests.runtime.cohort.conftest import SHAPE, add_recording

OURS = "derivatives/qsm-deploy"
LISTED = '{"recording": "sub-01", "state": "failed", "exit_code": []}'
NUCLEI = "index\tname\n1\tLeft-Pallidum\n2\tRight-Pallidum\n3\tLeft-Cerebral-White-Matter\n"


@pytest.fixture
def study(new_dataset):
    """Return three recordings, the second of which has no unit."""
    root = new_dataset("sub-01", "sub-02", "sub-03")
    (root / "sub-02/anat/sub-02_localfield.json").write_text("{}")
    return root


def table_of(path) -> dict[str, dict[str, str]]:
    rows = csv.DictReader(path.read_text().splitlines(), delimiter="\t")
    return {row["recording"]: row for row in rows}


class TestStatus:
    def test_before_after_and_in_between(self, study, run) -> None:
        words = ("--bids", study, "--method", "tkd")
        code, out, err = run("--bids", study, "--status")
        assert (code, err) == (3, "")
        assert out.splitlines() == [
            "3 recordings: 0 done, 0 failed, 3 missing",
            "missing: sub-01, sub-02, sub-03",
        ]
        assert not (study / "derivatives").exists()
        assert run(*words, "--participant-label", "01", "02")[0] == 3
        code, out, _ = run("--bids", study, "--status", "--json")
        status = json.loads(out)
        counts = {key: status[key] for key in ("recordings", "done", "failed", "missing")}
        assert counts == {"recordings": 3, "done": 1, "failed": 1, "missing": 1}
        assert status["without_map"] == ["sub-03"]
        [failure] = status["failures"]
        assert (failure["recording"], failure["exit_code"]) == ("sub-02", 3)
        assert "sub-02_localfield.json: Units are not stated" in failure["reason"]
        [reason] = status["reasons"]
        assert reason["reason"] == failure["reason"]
        (study / "sub-02/anat/sub-02_localfield.json").write_text('{"Units": "ppm"}')
        assert run(*words, "--resume")[0] == 0
        assert run("--bids", study, "--status")[:2] == (
            0,
            "3 recordings: 3 done, 0 failed, 0 missing\n",
        )

    def test_a_map_that_went_counts_no_more(self, study, run) -> None:
        assert run("--bids", study, "--method", "tkd", "--participant-label", "01")[0] == 0
        (study / OURS / "sub-01/anat/sub-01_Chimap.nii.gz").unlink()
        _, out, _ = run("--bids", study, "--status")
        assert out.startswith("3 recordings: 0 done, 0 failed, 3 missing\n")

    def test_what_cannot_be_taken_is_a_failure_nobody_has_to_try(self, study, run) -> None:
        anat = study / "sub-03/anat"
        (anat / "sub-03_localfield.nii").write_bytes(b"")
        _, out, _ = run("--bids", study, "--status")
        assert out.splitlines()[0] == "3 recordings: 0 done, 1 failed, 2 missing"
        assert "2 images fit as local field" in out

    def test_what_is_not_used_is_named(self, study, run) -> None:
        add_recording(study, os.fsdecode(b"sub-05-\xff"))
        _, out, err = run("--bids", study, "--status")
        assert out.startswith("3 recordings: 0 done, 0 failed, 3 missing\n")
        assert err.startswith("note: found and not used: sub-05-\\udcff_localfield.nii.gz, ")

    @pytest.mark.parametrize("kind", ["localfield.nii.gz", "mask.nii.gz", "localfield.json"])
    @pytest.mark.parametrize("cluster", [(), ("--cluster", "local:2")], ids=["here", "children"])
    def test_a_pipe_is_not_waited_for(self, new_dataset, run, kind, cluster) -> None:
        root = new_dataset("sub-01", "sub-02", "sub-03")
        pipe = root / f"sub-02/anat/sub-02_{kind}"
        pipe.unlink()
        os.mkfifo(pipe)
        code, out, err = run("--bids", root, "--method", "tkd", *cluster)
        assert (code, len(out.splitlines())) == (3, 2)
        assert f"error: sub-02: {pipe}: no regular file" in err

    def test_maps_of_a_local_field_count(self, study, run) -> None:
        place = study / OURS / "sub-01/anat/sub-01_desc-local_fieldmap.nii.gz"
        place.parent.mkdir(parents=True)
        place.write_bytes(b"a map")
        assert "1 done" in run("--bids", study, "--status")[1]

    def test_an_empty_file_is_no_map(self, study, run) -> None:
        words = ("--bids", study, "--method", "tkd", "--participant-label", "01")
        assert run(*words)[0] == 0
        (study / OURS / "sub-01/anat/sub-01_Chimap.nii.gz").write_bytes(b"")
        assert run("--bids", study, "--status", "--participant-label", "01")[0] == 3
        assert len(run(*words, "--resume")[1].splitlines()) == 1

    @pytest.mark.parametrize("flags", [(), ("--resume",), ("--force",), ("--shard", "1/1")])
    def test_the_maps_of_another_dataset(self, study, run, tmp_path, flags) -> None:
        output = tmp_path / "maps"
        link = tmp_path / "by-a-link"
        link.symlink_to(study)
        words = ("--method", "tkd", "--participant-label", "01", "-o", output)
        assert run("--bids", link, *words)[0] == 0
        assert run("--bids", study, *words, "--resume")[0] == 0
        other = tmp_path / "other"
        shutil.copytree(study, other)
        for more in (flags, ("--status",)):
            code, _, err = run("--bids", other, *words, *more)
            assert (code, f"{output} holds the maps of {study}" in err) == (2, True)
        code, _, err = run("--bids", study, "-o", study / "derivatives")
        assert (code, "is a folder of datasets" in err) == (2, True)

    @pytest.mark.parametrize("flag", ["--force", "--dry-run", "--cluster local:2", "--html x"])
    def test_it_only_looks(self, study, run, flag) -> None:
        code, _, err = run("--bids", study, "--status", *flag.split())
        assert (code, "--status looks and makes nothing" in err) == (2, True)

    def test_a_participant_without_data_in_the_shard_that_it_would_be_in(self, study, run) -> None:
        (study / "sub-07/anat").mkdir(parents=True)
        for words in (("--method", "tkd"), ("--status",)):
            code, _, _ = run("--bids", study, *words, "--participant-label", "07", "--shard", "1/1")
            assert code == 3

    def test_a_part_of_it(self, study, run) -> None:
        assert run("--bids", study, "--status", "--shard", "1/3")[1].startswith("0 recordings")
        assert run("--bids", study, "--status", "--shard", "2/3")[1].startswith("3 recordings")
        assert "1 recordings" in run("--bids", study, "--status", "--participant-label", "03")[1]


class TestTable:
    def test_a_row_of_each_and_the_nuclei_by_their_names(self, study, run) -> None:
        labels = np.zeros(SHAPE, np.uint8)
        labels[8:10, 9:11, 7:9], labels[12:14, 9:11, 7:9], labels[3:5, 3:5, 3:5] = 1, 2, 3
        (study / "sub-01/anat/sub-01_dseg.nii.gz").write_bytes(nifti_bytes(labels, np.eye(4)))
        (study / "dseg.tsv").write_text(NUCLEI)
        assert run("--bids", study, "--method", "tkd")[0] == 3
        rows = table_of(study / OURS / "group_Chimap.tsv")
        assert [*rows] == ["sub-01", "sub-02", "sub-03"]
        assert "chi_ppb_Left-Cerebral-White-Matter" not in rows["sub-01"]
        import nibabel as nib

        chi = nib.load(study / OURS / "sub-01/anat/sub-01_Chimap.nii.gz").get_fdata()
        for index, name in ((1, "Left-Pallidum"), (2, "Right-Pallidum")):
            expected = 1000 * chi[labels == index].mean()
            assert float(rows["sub-01"][f"chi_ppb_{name}"]) == pytest.approx(expected, abs=1e-2)
            assert rows["sub-03"][f"chi_ppb_{name}"] == "n/a"
        assert rows["sub-02"]["state"] == "failed"
        assert "Units are not stated" in rows["sub-02"]["reason"]
        assert float(rows["sub-01"]["mask_ml"]) == pytest.approx(16 * 18 * 14 / 1000)
        assert 1 < float(rows["sub-01"]["noise_ppb"]) < 4
        assert 0 < float(rows["sub-01"]["field_residual"]) < 1

    def test_the_nuclei_of_a_head_that_is_stored_otherwise(self, study, run) -> None:
        """Labels and map lie on one grid, however its axes run."""
        import nibabel as nib

        labels = np.zeros(SHAPE, np.uint8)
        labels[8:10, 9:11, 7:9] = 1
        affine = np.array([[0, 0, -1.0, 9], [1, 0, 0, 3], [0, -1, 0, 2], [0, 0, 0, 1]])
        anat = study / "sub-01/anat"
        for path in anat.glob("*.nii.gz"):
            volume = np.asarray(nib.load(path).dataobj)
            path.write_bytes(nifti_bytes(volume, affine))
        (anat / "sub-01_dseg.nii.gz").write_bytes(nifti_bytes(labels, affine))
        (anat / "sub-01_dseg.tsv").write_text(NUCLEI)
        assert run("--bids", study, "--method", "tkd", "--participant-label", "01")[0] == 0
        chi = nib.load(study / OURS / "sub-01/anat/sub-01_Chimap.nii.gz").get_fdata()
        rows = table_of(study / OURS / "group_Chimap.tsv")
        expected = 1000 * chi[labels == 1].mean()
        assert float(rows["sub-01"]["chi_ppb_Left-Pallidum"]) == pytest.approx(expected, abs=1e-2)

    def test_labels_that_are_called_alike_are_one_nucleus(self, study, run) -> None:
        import nibabel as nib

        labels, other = np.zeros((2, *SHAPE), np.uint8)
        labels[8:10, 9:11, 7:9], labels[3:5, 3:5, 3:5], other[12, 10, 8] = 1, 2, 1
        anat = study / "sub-01/anat"
        for desc, volume in (("aseg", labels), ("manual", other)):
            path = anat / f"sub-01_desc-{desc}_dseg.nii.gz"
            path.write_bytes(nifti_bytes(volume, np.eye(4)))
        names = "index\tname\themisphere\n1\tCaudate\tL\n2\tCaudate\tR\n"
        (study / "dseg.tsv").write_text(names)
        words = ("--bids", study, "--method", "tkd", "--participant-label", "01")
        code, _, err = run(*words)
        assert code == 0
        assert "sub-01_desc-manual_dseg.nii.gz has Caudate, too, and is not used" in err
        chi = nib.load(study / OURS / "sub-01/anat/sub-01_Chimap.nii.gz").get_fdata()
        row = table_of(study / OURS / "group_Chimap.tsv")["sub-01"]
        expected = 1000 * chi[labels > 0].mean()
        assert float(row["chi_ppb_Caudate"]) == pytest.approx(expected, abs=1e-2)

    @pytest.mark.parametrize("turned", [(1, 1, -1), (-1, 1, 1)])
    def test_a_segmentation_that_is_stored_otherwise_than_the_field(
        self, study, run, turned
    ) -> None:
        import nibabel as nib

        labels = np.zeros(SHAPE, np.uint8)
        labels[8:10, 9:11, 2:4] = 1
        stored = nib.Nifti1Image(labels, np.eye(4)).as_reoriented(
            np.array([[0, turned[0]], [1, turned[1]], [2, turned[2]]])
        )
        anat = study / "sub-01/anat"
        nib.save(stored, anat / "sub-01_dseg.nii.gz")
        permuted = nib.Nifti1Image(labels, np.eye(4)).as_reoriented(
            np.array([[1, 1], [2, -1], [0, 1]])
        )
        nib.save(permuted, study / "sub-03/anat/sub-03_dseg.nii.gz")
        (study / "dseg.tsv").write_text(NUCLEI)
        assert run("--bids", study, "--method", "tkd", "--participant-label", "01", "03")[0] == 0
        rows = table_of(study / OURS / "group_Chimap.tsv")
        for name in ("sub-01", "sub-03"):
            chi = nib.load(study / OURS / f"{name}/anat/{name}_Chimap.nii.gz").get_fdata()
            expected = 1000 * chi[labels == 1].mean()
            assert float(rows[name]["chi_ppb_Left-Pallidum"]) == pytest.approx(expected, abs=1e-2)

    @pytest.mark.parametrize(
        ("table", "says"),
        [
            ("index\tname\n1\tPallidum\n\tPutamen\n", "cannot be read as a table"),
            ("index\tname\n1\tPallidum\nx\n", "cannot be read as a table"),
            ("", "no column index"),
        ],
    )
    def test_a_table_of_names_that_is_none_costs_no_map(self, study, run, table, says) -> None:
        anat = study / "sub-01/anat"
        (anat / "sub-01_dseg.nii.gz").write_bytes(nifti_bytes(np.ones(SHAPE), np.eye(4)))
        (anat / "sub-01_dseg.tsv").write_text(table)
        code, _, err = run("--bids", study, "--method", "tkd", "--participant-label", "01")
        assert code == 0
        assert f"note: sub-01: no means of its nuclei: {anat}/sub-01_dseg.tsv: {says}" in err

    def test_a_segmentation_that_cannot_be_read_costs_no_map(self, study, run) -> None:
        (study / "sub-01/anat/sub-01_dseg.nii.gz").symlink_to("../../.git/annex/objects/x")
        (study / "sub-01/anat/sub-01_dseg.tsv").write_text(NUCLEI)
        (study / "sub-03/anat/sub-03_dseg.nii.gz").write_bytes(nifti_bytes(np.ones(SHAPE), None))
        (study / "dseg.tsv").write_text("number,label\n")
        code, out, err = run("--bids", study, "--method", "tkd", "--participant-label", "01", "03")
        assert (code, len(out.splitlines())) == (0, 2)
        assert "note: sub-01: no means of its nuclei: " in err
        assert "sub-01_dseg.nii.gz: " in err
        assert "not downloaded" in err
        assert "note: sub-03: no means of its nuclei: " in err
        assert "no column index, separated by tabs" in err

    def test_one_of_a_shard_is_made_when_asked_for(self, study, run, tmp_path) -> None:
        for number in (1, 2, 3):
            run("--bids", study, "--method", "tkd", "--shard", f"{number}/3")
        assert not (study / OURS / "group_Chimap.tsv").exists()
        code, _, _ = run("--bids", study, "--status", "--table", tmp_path / "all.tsv")
        rows = table_of(tmp_path / "all.tsv")
        assert code == 3
        assert {name: row["state"] for name, row in rows.items()} == {
            "sub-01": "done", "sub-02": "failed", "sub-03": "done",
        }  # fmt: skip

    def test_what_is_no_table_is_not_written_over(self, study, run, tmp_path) -> None:
        other = study / "participants.tsv"
        other.write_text("participant_id\tage\nsub-01\t40\n")
        for words in (("--status",), ("--method", "tkd")):
            code, _, err = run("--bids", study, *words, "--table", other)
            assert (code, "is no table of qsm-run" in err) == (2, True)
            assert run("--bids", study, *words, "--table", tmp_path / "no" / "x.tsv")[0] == 3
        assert other.read_text().startswith("participant_id\tage")
        assert not (study / "derivatives").exists()

    def test_rows_are_of_what_there_is(self, study, run) -> None:
        words = ("--bids", study, "--method", "tkd")
        assert run(*words)[0] == 3
        table = study / OURS / "group_Chimap.tsv"
        before = table_of(table)["sub-01"]
        (study / "sub-02/anat/sub-02_localfield.json").write_text('{"Units": "ppm"}')
        shutil.rmtree(study / "sub-03")
        code, _, _ = run(*words, "--resume", "--cluster", "local:2")
        rows = table_of(table)
        assert (code, [*rows]) == (0, ["sub-01", "sub-02"])
        assert rows["sub-01"] == before

    def test_a_map_from_elsewhere_is_no_failure(self, study, run, tmp_path) -> None:
        words = ("--bids", study, "--method", "tkd")
        assert run(*words)[0] == 3
        (study / "sub-02/anat/sub-02_localfield.json").write_text('{"Units": "ppm"}')
        assert run(*words, "--resume", "--outcomes", tmp_path / "told")[0] == 0
        assert run("--bids", study, "--status", "--table", tmp_path / "t.tsv")[0] == 0
        assert {row["state"] for row in table_of(tmp_path / "t.tsv").values()} == {"done"}

    def test_all_done_needs_no_right_to_write(self, study, run, monkeypatch) -> None:
        (study / "sub-02/anat/sub-02_localfield.json").write_text('{"Units": "ppm"}')
        assert run("--bids", study, "--method", "tkd")[0] == 0
        monkeypatch.setattr(atomic, "check_writable", None)
        monkeypatch.setattr(outcomes.OutcomeFile, "begin", None)
        assert run("--bids", study, "--method", "tkd", "--resume")[:2] == (0, "")


class TestOutcomes:
    def test_the_last_one_counts_whichever_file_it_is_in(self, tmp_path) -> None:
        first = Outcome("sub-01", "failed", exit_code=3, reason="gone", finished_s=1.0)
        later = Outcome("sub-01", "done", findings={"mask_ml": 2.5}, finished_s=2.0)
        OutcomeFile(tmp_path, Shard(2, 3)).append(later)
        OutcomeFile(tmp_path, None).append(first)
        assert told_outcomes(tmp_path).last == {"sub-01": later}

    @pytest.mark.parametrize(
        "findings",
        [
            *('{"noise_ppb": "7"}', '{"noise_ppb": {}}', '{"mask_ml": 1e999}', '{"chi_ppb": 1}'),
            *('{"chi_ppb": {"a": "b"}}', '{"voxel_size_mm": ["x"]}', '{"voxel_size_mm": 1}'),
        ],
    )
    def test_numbers_that_are_none_are_passed_over(self, study, run, tmp_path, findings) -> None:
        told = tmp_path / "told"
        told.mkdir()
        line = f'{{"recording": "sub-01", "state": "failed", "findings": {findings}}}\n'
        (told / "x.jsonl").write_text(line)
        flags = ("--outcomes", told, "--table", tmp_path / "t.tsv")
        assert run("--bids", study, "--status", *flags)[1].startswith("3 recordings: 0 done, 0 fai")
        assert {row["state"] for row in table_of(tmp_path / "t.tsv").values()} == {"missing"}

    @pytest.mark.parametrize(
        "line", ["{", "[]", "null", '"x"', '{"recording": 1}', "{}", "\xff", LISTED]
    )
    def test_what_is_half_written_is_passed_over(self, tmp_path, line) -> None:
        file = OutcomeFile(tmp_path, None)
        file.append(Outcome("sub-01", "done"))
        with next(tmp_path.glob("*.jsonl")).open("a", encoding="latin-1") as half:
            half.write(f"{line}\n")
        file.append(Outcome("sub-02", "done"))
        assert {"sub-01", "sub-02"} <= told_outcomes(tmp_path).last.keys()

    def test_what_a_link_leads_to_stays_and_still_counts(self, tmp_path) -> None:
        file = OutcomeFile(tmp_path, None)
        file.append(Outcome("sub-01", "done"))
        [path] = tmp_path.glob("*.jsonl")
        kept = path.rename(tmp_path / "kept")
        before = kept.read_bytes()
        path.symlink_to(kept)
        with pytest.raises(DataError, match="cannot write"):
            file.append(Outcome("sub-02", "done"))
        file.begin()
        file.append(Outcome("sub-02", "done"))
        assert kept.read_bytes() == before
        assert not path.is_symlink()
        assert told_outcomes(tmp_path).last.keys() == {"sub-01", "sub-02"}

    def test_that_a_map_was_there_again_says_less_than_how_it_was_made(self, tmp_path) -> None:
        made = Outcome("sub-01", "done", findings={"mask_ml": 2.5}, finished_s=1.0)
        again = Outcome("sub-01", "done", again=True, finished_s=2.0)
        OutcomeFile(tmp_path, Shard(1, 2)).append(again)  # is read first
        OutcomeFile(tmp_path, None).append(made)
        told = told_outcomes(tmp_path)
        assert (told.last, told.made) == ({"sub-01": again}, {"sub-01": made})

    def test_a_line_that_was_cut_takes_no_other_with_it(self, tmp_path) -> None:
        file = OutcomeFile(tmp_path, None)
        file.append(Outcome("sub-01", "done"))
        [path] = tmp_path.glob("*.jsonl")
        path.write_bytes(path.read_bytes()[:-40])
        for name in ("sub-02", "sub-03"):
            file.append(Outcome(name, "done"))
        assert told_outcomes(tmp_path).last.keys() == {"sub-02", "sub-03"}

    def test_what_cannot_be_read_is_named(self, study, run) -> None:
        words = ("--bids", study, "--method", "tkd")
        folder = study / OURS / "outcomes"
        assert run(*words)[0] == 3
        (folder / "shard-001-of-002.jsonl").symlink_to("gone")
        code, out, err = run("--bids", study, "--status")
        assert (code, out) == (3, "")
        assert "shard-001-of-002.jsonl: " in err
        code, out, err = run(*words, "--resume")
        assert (code, out) == (3, "")
        assert "note: group_Chimap.tsv: " in err
        (folder / "shard-001-of-002.jsonl").unlink()
        os.mkfifo(folder / "shard-001-of-002.jsonl")
        assert run("--bids", study, "--status")[0] == 3

    def test_a_folder_of_their_own(self, study, run, tmp_path) -> None:
        words = ("--bids", study, "--method", "tkd", "--outcomes", tmp_path / "told" / "here")
        assert run(*words)[0] == 3
        assert not (study / OURS / "outcomes").exists()
        assert len(told_outcomes(tmp_path / "told" / "here").last) == 3
        assert run("--bids", study, "--status")[1].startswith(
            "3 recordings: 2 done, 0 failed, 1 missing"
        )
        _, out, _ = run("--bids", study, "--status", "--outcomes", tmp_path / "told" / "here")
        assert out.startswith("3 recordings: 2 done, 1 failed, 0 missing")


class TestFilesOfEach:
    def test_pictures_and_reports(self, study, run, tmp_path) -> None:
        figure, report = tmp_path / "f/{recording}.png", tmp_path / "r/run-{recording}.json"
        words = ("--bids", study, "--method", "tkd", "--figure", figure, "--report", report)
        assert run(*words)[0] == 3
        assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["sub-01.png", "sub-03.png"]
        content = json.loads((tmp_path / "r/run-sub-03.json").read_text())
        assert content["field_residual"] > 0
        code, _, err = run(*words, "-o", tmp_path / "other")
        assert code == 2
        assert f"{tmp_path}/f/sub-01.png exists; pass --force" in err
        assert not (tmp_path / "other").exists()

    @pytest.mark.parametrize("flags", ["--figure f.png", "--figure {recording}.pdf"])
    def test_names_that_are_one_for_all(self, study, run, flags) -> None:
        code, _, err = run("--bids", study, *flags.split())
        assert code == 2
        assert "write {recording} for its name and end in .png" in err
