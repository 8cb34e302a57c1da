"""qsm-run --bids as a user types it: a derivative dataset that the validator accepts."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.runtime.bids import output as bids_output
from qsm_deploy.runtime.bids.output import claim
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.cohort import reconstructing
from qsm_deploy.runtime.job import memory_limit
from qsm_deploy.runtime.scan.nifti import nifti_bytes

BESIDE = "derivatives/qsm-deploy"
ODD = np.diag([-1.0, 1.05, 0.95, 1.0]) + np.eye(4, k=3) * 7  # a corner away from the origin


@pytest.fixture
def model(card, write_model):
    return write_model(card)


@pytest.fixture
def dataset(tmp_path, field):
    """Return a dataset with the local fields of two subjects, the second in Hz at 3 T."""
    root = tmp_path / "study"
    description = {"Name": "Two boxes", "BIDSVersion": "1.10.0"}
    write_json(root / "dataset_description.json", description | {"DatasetType": "raw"})
    (root / "README.md").write_text("Two boxes in a field.\n" * 10)
    prep = root / "derivatives" / "prep"
    made = {"DatasetType": "derivative", "GeneratedBy": [{"Name": "tests"}]}
    write_json(prep / "dataset_description.json", description | made)
    (prep / ".bidsignore").write_text("*_localfield.*\n")
    for name, scale, unit in (("01", 1, "ppm"), ("02", 127.731, "Hz")):
        anat = prep / f"sub-{name}" / "ses-a" / "anat"
        stem = f"sub-{name}_ses-a"
        write_image(anat / f"{stem}_localfield.nii.gz", field * np.float32(scale))
        write_json(anat / f"{stem}_localfield.json", {"Units": unit, "MagneticFieldStrength": 3})
        write_image(anat / f"{stem}_desc-brain_mask.nii.gz", (field != 0).astype(np.uint8))
        write_json(anat / f"{stem}_desc-brain_mask.json", {"Type": "Brain"})
    return root


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_image(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(nifti_bytes(data, ODD))


@pytest.fixture
def run(model, dataset, capsys):
    """Return a function that runs qsm-run on the dataset with more flags."""

    def run_on(line=""):
        words = [word.replace("@", f"{dataset}/") for word in line.split()]
        try:
            code = main([str(model), "--bids", str(dataset), *words])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        out, err = capsys.readouterr()
        return code, out, err

    return run_on


@pytest.fixture
def chi(dataset):
    """Return a function that names the map of a subject."""
    return lambda name: dataset / BESIDE / f"sub-{name}/ses-a/anat/sub-{name}_ses-a_Chimap.nii.gz"


class TestResult:
    def test_maps_lie_on_their_fields_grids(self, run, chi, field):
        code, out, err = run()
        assert (code, out.splitlines()) == (0, [str(chi("01")), str(chi("02"))])
        assert "error" not in err
        for name in ("01", "02"):
            image = nib.load(chi(name))
            np.testing.assert_array_equal(image.affine, ODD.astype(np.float32))
            expected = 2 * field * (field != 0)
            np.testing.assert_allclose(image.get_fdata(), expected, atol=1e-6)

    def test_the_validator_accepts_raw_data_and_derivatives(self, run, dataset, validate, chi):
        assert run()[0] == 0
        assert validate(dataset) == []
        assert validate(dataset / "derivatives/prep") == []
        assert validate(dataset / BESIDE) == []
        sidecar = chi("01").with_name("sub-01_ses-a_Chimap.json")
        content = json.loads(sidecar.read_text())
        del content["SkullStripped"]
        sidecar.write_text(json.dumps(content))
        [(code, _)] = validate(dataset / BESIDE)  # it does look into the files
        assert code == "SIDECAR_KEY_REQUIRED"

    def test_the_sidecar_says_what_the_map_is_made_of(self, run, dataset, chi):
        assert run("--out-units ppb")[0] == 0
        content = json.loads(chi("02").with_name("sub-02_ses-a_Chimap.json").read_text())
        assert content["Units"] == "ppb"
        assert content["GeneratedBy"][0]["Name"] == "qsm-deploy"
        assert content["MagneticFieldStrength"] == 3
        assert content["model"]["network"] == "twice"
        assert content["input"]["units"] == "hz"
        links = json.loads((dataset / BESIDE / "dataset_description.json").read_text())
        root = dataset / BESIDE / links["DatasetLinks"]["source"]
        for uri in content["Sources"]:
            assert (root / uri.removeprefix("bids:source:")).resolve().is_file()

    def test_another_folder_and_some_participants(self, run, dataset, tmp_path):
        elsewhere = tmp_path / "out" / "chi"
        code, out, _ = run(f"-o {elsewhere} --participant-label sub-02")
        assert code == 0
        assert out.strip() == str(elsewhere / "sub-02/ses-a/anat/sub-02_ses-a_Chimap.nii.gz")
        assert not (elsewhere / "sub-01").exists()
        assert not (dataset / BESIDE).exists()

    def test_dry_run_says_and_writes_nothing(self, run, dataset, chi):
        code, out, _ = run("--dry-run")
        assert code == 0
        assert out.startswith("sub-01_ses-a: sub-01_ses-a_localfield.nii.gz in ppm, 21x18x15, ")
        assert out.count(f"-> {chi('02')}") == 1
        assert not (dataset / BESIDE).exists()

    def test_json_is_a_line_for_every_map(self, run, chi):
        lines = [json.loads(line) for line in run("--json")[1].splitlines()]
        assert [line["recording"] for line in lines] == ["sub-01_ses-a", "sub-02_ses-a"]
        assert lines[1]["map"] == str(chi("02"))
        assert lines[0]["field_residual"] > 0

    def test_patches_and_data_consistency_are_the_same_as_for_one_file(
        self, run, chi, model, dataset
    ):
        flags = "--patch 12 --overlap 4 --data-consistency 0.1"
        assert run(flags)[0] == 0
        source = dataset / "derivatives/prep/sub-01/ses-a/anat"
        one = dataset / "one.nii.gz"
        words = [model, source / "sub-01_ses-a_localfield.nii.gz", "-o", one, *flags.split()]
        words += ["-m", source / "sub-01_ses-a_desc-brain_mask.nii.gz"]
        assert main([str(word) for word in words]) == 0
        np.testing.assert_array_equal(nib.load(chi("01")).get_fdata(), nib.load(one).get_fdata())


class TestSeveralRuns:
    def test_existing_maps_need_a_word(self, run, chi):
        assert run("--participant-label 01")[0] == 0
        before = chi("01").read_bytes()
        code, _, err = run()
        assert code == 2
        assert "1 of 2 maps exist" in err
        assert "pass --resume to keep them or --force" in err
        assert not chi("02").exists()
        assert run("--force --out-units ppb")[0] == 0
        assert chi("01").read_bytes() != before

    def test_resume_makes_what_is_missing(self, run, chi):
        assert run()[0] == 0
        kept = os.stat(chi("01")).st_mtime_ns
        chi("02").unlink()  # its sidecar stays, as an interrupted run leaves it
        code, out, err = run("--resume")
        assert (code, out.split()) == (0, [str(chi("02"))])
        assert "sub-01_ses-a: has a map already" in err
        assert os.stat(chi("01")).st_mtime_ns == kept
        assert run("--resume")[:2] == (0, "")

    def test_resume_does_not_mix_networks(self, run, dataset, card, write_model, capsys):
        assert run()[0] == 0
        other = write_model(replace(card, weights_sha256="1" * 64), "other.onnx", factor=3.0)
        assert main([str(other), "--bids", str(dataset), "--resume"]) == 2
        assert f"weights {'0' * 64}, this run has {'1' * 64}" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            ("--out-units ppb", "units ppm, this run has ppb"),
            ("--out-dtype int16", "dtype float32, this run has int16"),
            ("--data-consistency 0.1", "data consistency none, this run has [0.1, None]"),
        ],
    )
    def test_resume_does_not_mix_settings(self, run, flags, says):
        assert run()[0] == 0
        code, _, err = run(f"--resume {flags}")
        assert code == 2
        assert says in err

    def test_resume_after_the_same_settings(self, run, chi):
        flags = "--data-consistency auto --out-units ppb --out-dtype int16"
        assert run(flags)[0] == 0
        chi("02").unlink()
        assert run(f"{flags} --resume")[0] == 0

    def test_resume_knows_sidecars_from_before_there_were_types(self, run, chi):
        assert run()[0] == 0
        sidecar = chi("01").with_name("sub-01_ses-a_Chimap.json")
        content = json.loads(sidecar.read_text())
        del content["dtype"]
        sidecar.write_text(json.dumps(content))
        assert run("--resume")[0] == 0
        assert run("--resume --out-dtype int16")[0] == 2

    def test_resume_does_not_mix_methods(self, run, dataset, capsys):
        words = ["--bids", str(dataset), "--resume"]
        assert main(words) == 0
        assert main([*words, "--method", "tv"]) == 0  # the default by its name
        for said, says in (
            (["--method", "tkd"], "method tv, this run has tkd"),
            (["--alpha", "1e-4"], "said to it {}, this run has {'alpha': 0.0001}"),
            (["--method", "tv-unet"], "method tv, this run has none"),
        ):
            assert main([*words, *said]) == 2
            assert says in capsys.readouterr().err
        assert run("--resume")[0] == 2
        assert main([*words[:2], "--force", "--alpha", "1e-4", "--iterations", "3"]) == 0
        assert main([*words, "--alpha", "1e-4", "--iterations", "3"]) == 0

    def test_another_process_may_describe_the_dataset_first(self, run, dataset, monkeypatch):
        described = bids_output.write_atomically

        def too_late(path, data, *, force):
            described(path, data, force=force)
            described(path, data, force=force)

        monkeypatch.setattr(bids_output, "write_atomically", too_late)
        assert run()[0] == 0

    def test_maps_that_are_not_downloaded_are_not_made_again(self, run, chi):
        assert run()[0] == 0
        chi("01").unlink()
        chi("01").symlink_to("../../.git/annex/objects/x")
        code, out, err = run("--resume")
        assert (code, out) == (0, "")
        assert "sub-01_ses-a: has a map already" in err

    @pytest.mark.parametrize("content", ['{"model": null}', '{"data_consistency": [1]}', "{}"])
    def test_resume_needs_a_whole_sidecar(self, run, chi, content):
        assert run()[0] == 0
        chi("01").with_name("sub-01_ses-a_Chimap.json").write_text(content)
        code, _, err = run("--resume")
        assert code == 2
        assert "network none, this run has twice" in err

    @pytest.mark.parametrize("makers", [None, "qsm-deploy", [None, "qsm-deploy"], [[]]])
    def test_a_dataset_that_nobody_says_to_have_made(self, run, dataset, makers):
        write_json(dataset / BESIDE / "dataset_description.json", {"GeneratedBy": makers})
        code, _, err = run()
        assert code == 2
        assert "holds a dataset that qsm-deploy did not make" in err

    def test_resume_needs_the_sidecar(self, run, chi):
        assert run()[0] == 0
        chi("01").with_name("sub-01_ses-a_Chimap.json").unlink()
        code, _, err = run("--resume")
        assert code == 2
        assert "network none, this run has twice" in err


PROGRAM = "import sys; from qsm_deploy.runtime.cli import main; sys.exit(main(sys.argv[1:]))"


class TestAtOnce:
    def test_two_processes_share_the_work(self, dataset, model, field):
        prep = dataset / "derivatives" / "prep"
        for name in ("03", "04", "05", "06"):
            anat = prep / f"sub-{name}" / "anat"
            write_image(anat / f"sub-{name}_localfield.nii.gz", field)
            write_json(anat / f"sub-{name}_localfield.json", {"Units": "ppm"})
        words = [sys.executable, "-c", PROGRAM, str(model), "--bids", str(dataset), "--resume"]
        both = [
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        made = sorted(line for out, _ in said for line in out.splitlines())
        assert made == sorted(map(str, dataset.glob(f"{BESIDE}/**/*_Chimap.nii.gz")))
        assert len(made) == 6
        assert not list(dataset.rglob(".qsm-deploy-*"))

    def test_a_map_that_another_process_finished_meanwhile_is_made(self, run, chi, monkeypatch):
        at_once, finished = reconstructing.run_scan, []

        def meanwhile(*given):
            if not finished:
                finished.append(None)
                finished.append(run("--resume --participant-label 02")[0])
            return at_once(*given)

        monkeypatch.setattr(reconstructing, "run_scan", meanwhile)
        code, out, err = run("--resume")
        assert finished == [None, 0]
        assert (code, out.split()) == (0, [str(chi("01"))])
        assert "sub-02_ses-a: has a map already" in err
        assert chi("02").exists()

    def test_one_that_another_process_is_at_comes_last(self, run, chi):
        with ThreadPoolExecutor(1) as pool:
            with claim(chi("01"), wait=False) as ours:
                assert ours
                running = pool.submit(run, "--resume")
                while not (chi("02").exists() or running.done()):
                    time.sleep(0.02)
                assert not running.done()
            code, out, _ = running.result()
        assert (code, out.split()) == (0, [str(chi("02")), str(chi("01"))])

    def test_what_a_killed_process_claimed_is_free(self, run, chi):
        chi("01").parent.mkdir(parents=True)
        left = chi("01").with_name(".qsm-deploy-tmp-sub-01_ses-a_Chimap")
        left.touch()
        code, out, _ = run("--resume")
        assert (code, len(out.split())) == (0, 2)
        assert not left.exists()


class TestFailures:
    def test_one_failure_does_not_stop_the_others(self, run, chi, dataset):
        path = dataset / "derivatives/prep/sub-01/ses-a/anat/sub-01_ses-a_localfield.nii.gz"
        path.write_bytes(path.read_bytes()[:-40])
        code, out, err = run()
        assert (code, out.split()) == (3, [str(chi("02"))])
        last = err.splitlines()[-1]
        assert last.startswith("qsm-run: error: sub-01_ses-a: ")
        assert "truncated or damaged" in last
        assert not chi("01").parents[2].exists()

    @pytest.mark.parametrize("what", [ZeroDivisionError("a fault"), OverflowError("too big")])
    def test_nor_does_a_fault_of_ours(self, run, chi, monkeypatch, what):
        measured = reconstructing.read_scan

        def faulty(request, reconstructor):
            if "sub-01" in request.files.fields[0].name:
                raise what
            return measured(request, reconstructor)

        monkeypatch.setattr(reconstructing, "read_scan", faulty)
        code, out, err = run()
        assert (code, out.split()) == (1, [str(chi("02"))])
        assert f"error: sub-01_ses-a: {type(what).__name__}: {what}" in err.splitlines()[-1]

    def test_an_interrupt_stops_all(self, run, chi, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(reconstructing, "read_scan", interrupted)
        assert run()[0] == 130
        assert not chi("02").exists()

    @pytest.mark.parametrize("flags", ["", "--resume", "--force"])
    def test_a_map_never_has_another_patients_name(self, run, chi, dataset, flags):
        for name in ("localfield.nii.gz", "localfield.json"):
            source = dataset / f"derivatives/prep/sub-02/ses-a/anat/sub-02_ses-a_{name}"
            source.rename(source.with_name(f"sub-01_ses-a_{name}"))
        code, out, err = run(flags)
        assert (code, out.split()) == (3, [str(chi("01"))])
        assert "sub-01_ses-a_localfield.nii.gz is named sub-01_ses-a and lies in the" in err
        assert not chi("02").exists()

    @pytest.mark.parametrize("flags", ["", "--resume", "--force"])
    def test_two_that_would_become_one_map_are_refused_first(self, run, chi, dataset, flags):
        assert run("--participant-label 01")[0] == 0
        made = os.stat(chi("01")).st_mtime_ns
        twin = dataset / "derivatives/prep/sub-01/ses-a/anat/sub-01_ses-a_localfield.nii"
        twin.symlink_to(twin.with_name("sub-01_ses-a_localfield.nii.gz"))
        code, out, err = run(flags)
        assert (code, out.split()) == (3, [str(chi("02"))])
        assert "2 images fit as local field: " in err
        assert os.stat(chi("01")).st_mtime_ns == made

    @pytest.mark.parametrize(
        "name", ["localfield.nii.gz", "localfield.json", "desc-brain_mask.nii.gz"]
    )
    @pytest.mark.parametrize("kind", ["link", "annex", "lfs"])
    def test_what_was_not_downloaded(self, run, chi, dataset, name, kind):
        path = dataset / f"derivatives/prep/sub-01/ses-a/anat/sub-01_ses-a_{name}"
        path.unlink()
        if kind == "link":
            path.symlink_to("../.git/annex/objects/x")
        else:
            pointers = {
                "annex": "/annex/objects/MD5E-s9--00\n",
                "lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            }
            path.write_text(pointers[kind])
        code, out, err = run()
        assert (code, out.split()) == (3, [str(chi("02"))])
        assert f"{path}: " in err
        assert "not downloaded" in err

    def test_the_first_failure_decides_the_exit_code(self, run, dataset, field, monkeypatch):
        monkeypatch.setattr(memory_limit, "rss_bytes", lambda: 0)  # of a program that took none
        monkeypatch.setattr(memory_limit, "LIBRARIES_BYTES", 0)
        anat = dataset / "derivatives/prep/sub-00/anat"
        write_image(anat / "sub-00_localfield.nii.gz", field)
        write_json(anat / "sub-00_localfield.json", {"Units": "ppm"})
        write_json(dataset / "derivatives/prep/sub-02/ses-a/anat/sub-02_ses-a_localfield.json", {})
        code, _, err = run("--memory-limit 1M")
        errors = [line for line in err.splitlines() if line.startswith("qsm-run: error")]
        assert [line.split(": ")[2] for line in errors] == [
            "sub-00", "sub-01_ses-a", "sub-02_ses-a",
        ]  # fmt: skip
        assert code == 6
        assert "Units are not stated" in errors[2]

    def test_a_participant_without_data_is_a_failure_when_asked_for(self, run, dataset):
        (dataset / "sub-07/anat").mkdir(parents=True)
        assert run("--dry-run")[0] == 0
        code, _, err = run("--participant-label 01 07")
        assert code == 3
        assert err.splitlines()[-1].startswith("qsm-run: error: sub-07: neither a local field nor")

    def test_a_stated_field_strength_must_agree(self, run):
        code, _, err = run("--field-strength 7")
        assert code == 3
        assert "MagneticFieldStrength is 3, --field-strength 7" in err

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("-m mask.nii.gz", "--mask is for one recording"),
            ("--echo-time 0.02", "--echo-time is for one recording"),
            ("--b0-direction 0 0 1", "--b0-direction is for one recording"),
            (
                "--report run.json",
                "run.json: with --bids it is made of every recording",
            ),
            ("--resume --force", "--resume keeps the maps that --force would overwrite"),
            ("field.nii.gz", "field.nii.gz is no model"),
            ("-o @derivatives/prep", "holds a dataset that qsm-deploy did not make"),
            ("-o @README.md/x", "cannot create .*README.md/x: Not a directory"),
        ],
    )
    def test_flags(self, run, line, says):
        code, out, err = run(line)
        assert out == ""
        assert code in (2, 3)
        [message] = err.splitlines()
        assert re.search(says, message), message

    @pytest.mark.parametrize("flag", ["--resume", "--participant-label 01", "--bids-input megre"])
    def test_flags_of_a_dataset_need_one(self, flag, capsys):
        with pytest.raises(SystemExit):
            main(["field.nii.gz", *flag.split()])
        assert f"{flag.split()[0]} needs --bids DATASET" in capsys.readouterr().err

    def test_a_network_for_several_orientations(self, card, write_model, dataset, capsys):
        tensor = replace(card.inputs[0], shape=("n", 2, "x", "y", "z"))
        two = write_model(replace(card, inputs=(tensor,)), "two.onnx")
        assert main([str(two), "--bids", str(dataset)]) == 2
        assert "takes 2 fields, 1 were given" in capsys.readouterr().err
