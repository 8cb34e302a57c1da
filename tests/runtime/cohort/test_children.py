"""``--cluster local:N``: processes that die, that are interrupted, that meet what is there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.cohort.worker import Worker

NAMES = [f"sub-{n:02}" for n in range(1, 13)]
PROGRAM = "import sys; from qsm_deploy.runtime.cli import main; sys.exit(main(sys.argv[1:]))"
OURS = "derivatives/qsm-deploy"


def maps_of(root: Path) -> dict[str, np.ndarray]:
    paths = root.rglob("*_Chimap.nii.gz")
    return {path.name.partition("_")[0]: nib.load(path).get_fdata() for path in paths}


def outcomes_of(root: Path) -> dict[str, dict]:
    files = (root / OURS / "outcomes").glob("*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {line["recording"]: line for line in lines}


def test_maps_are_those_of_one_process(new_dataset, run, tmp_path) -> None:
    root = new_dataset(*NAMES[:3])
    words = ("--bids", root, "--method", "tkd", "--json")
    code, out, err = run(*words, "--cluster", "local:2")
    assert code == 0
    assert err.endswith("s per recording\n")
    assert "3/3 done" in err
    reports = [json.loads(line) for line in out.splitlines()]
    assert sorted(report["recording"] for report in reports) == NAMES[:3]
    assert all(report["field_residual"] > 0 for report in reports)
    assert run(*words, "-o", tmp_path / "one")[0] == 0
    one, two = maps_of(tmp_path / "one"), maps_of(root / OURS)
    assert one.keys() == two.keys() == {*NAMES[:3]}
    for name, chi in one.items():
        np.testing.assert_array_equal(chi, two[name])
    pids = {outcome["pid"] for outcome in outcomes_of(root).values()}
    assert os.getpid() not in pids


@pytest.mark.slow
def test_what_kills_its_process_takes_no_other_map_with_it(new_dataset, run, killing) -> None:
    root = new_dataset(*NAMES)
    killing(r"sub-0[369]_localfield\.nii")
    code, out, err = run("--bids", root, "--method", "tkd", "--cluster", "local:2")
    assert code == 6
    assert len(out.splitlines()) == 9
    assert maps_of(root).keys() == {*NAMES} - {"sub-03", "sub-06", "sub-09"}
    errors = [line for line in err.splitlines() if line.startswith("qsm-run: error")]
    assert len(errors) == 3
    for line in errors:
        assert "signal 9 (SIGKILL), and so did a second one with half the memory" in line
    assert "9/12 done, 3 failed" in err
    assert outcomes_of(root)["sub-03"]["attempt"] == 2
    assert not list(root.rglob(".qsm-deploy-*"))
    code, out, _ = run("--bids", root, "--status", "--json")
    status = json.loads(out)
    assert (code, status["done"], status["failed"], status["missing"]) == (3, 9, 3, 0)
    assert [(one["exit_code"], one["count"]) for one in status["reasons"]] == [(6, 3)]


def test_one_that_dies_once_is_made_by_a_second_process(new_dataset, run, killing) -> None:
    root = new_dataset(*NAMES[:2])
    (root / "sub-01/anat/sub-01_localfield.nii.gz.once").touch()
    killing(r"sub-01_localfield\.nii\.gz$", once=True)
    code, out, _ = run("--bids", root, "--method", "tkd", "--cluster", "local:1")
    assert (code, len(out.splitlines())) == (0, 2)
    assert outcomes_of(root)["sub-01"]["attempt"] == 2
    assert outcomes_of(root)["sub-02"]["attempt"] == 1


def test_one_that_crashes_is_no_lack_of_memory(new_dataset, run, killing) -> None:
    root = new_dataset(*NAMES[:2])
    killing(r"sub-01_localfield\.nii\.gz$", "SIGSEGV")
    code, out, err = run("--bids", root, "--method", "tkd", "--cluster", "local:1")
    assert (code, len(out.splitlines())) == (4, 1)
    assert "signal 11 (SIGSEGV)" in err
    assert "memory runs out" not in err


def test_a_model_that_cannot_be_opened_is_said_once_and_nothing_written(
    new_dataset, run, tmp_path
) -> None:
    root = new_dataset(*NAMES[:2])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    code, out, err = run(broken, "--bids", root, "--cluster", "local:2")
    assert (code, out) == (4, "")
    assert len(err.splitlines()) == 1
    assert not (root / "derivatives").exists()


def test_what_is_there_is_treated_as_in_one_process(new_dataset, run) -> None:
    root = new_dataset(*NAMES[:2])
    words = ("--bids", root, "--cluster", "local:2")
    assert run(*words, "--method", "tkd")[0] == 0
    code, _, err = run(*words, "--method", "tkd")
    assert (code, "2 of 2 maps exist" in err) == (2, True)
    code, _, err = run(*words, "--resume", "--method", "tikhonov")
    assert (code, "method tkd, this run has tikhonov" in err) == (2, True)
    assert run(*words, "--resume", "--method", "tkd")[:2] == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_lets_what_runs_end_and_a_second_one_does_not(new_dataset, times) -> None:
    root = new_dataset(*NAMES)
    words = [sys.executable, "-c", PROGRAM, "--bids", root, "--iterations", "400"]
    process = subprocess.Popen(
        [*map(str, words), "--cluster", "local:2"], stderr=subprocess.PIPE, text=True
    )
    while not list(root.rglob("*_Chimap.nii.gz")):
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: what runs has 60 s to end" in err
    assert not list(root.rglob(".qsm-deploy-*"))
    made = maps_of(root)
    assert 0 < len(made) < len(NAMES)
    told = {n: one for n, one in outcomes_of(root).items() if one["state"] == "done"}
    if times == 1:
        assert told.keys() == made.keys()
        assert f"{len(made)}/12 done" in err
    resumed = subprocess.run([*map(str, words), "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert maps_of(root).keys() == {*NAMES}
    assert not list(root.rglob(".qsm-deploy-*"))


@pytest.mark.slow
def test_children_end_when_the_driver_is_killed(new_dataset) -> None:
    root = new_dataset(*NAMES)
    words = [sys.executable, "-c", PROGRAM, "--bids", root, "--cluster", "local:2"]
    process = subprocess.Popen([*map(str, words)], stderr=subprocess.DEVNULL)
    while len(outcomes_of(root)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    children = {outcome["pid"] for outcome in outcomes_of(root).values()}
    assert process.pid not in children
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < end
        time.sleep(0.1)
    resumed = subprocess.run([*map(str, words), "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert maps_of(root).keys() == {*NAMES}
    # those that were made when nobody was left to be told, too
    table = (root / OURS / "group_Chimap.tsv").read_text().splitlines()
    assert [line for line in table if "\tdone\tn/a" in line] == []


def test_one_that_cannot_do_with_half_says_what_became_of_the_first(
    new_dataset, run, killing
) -> None:
    root = new_dataset(*NAMES[:2])
    killing(r"sub-01_localfield\.nii\.gz$")
    words = ("--bids", root, "--method", "tkd", "--cluster", "local:1", "--memory-limit", "150M")
    code, out, err = run(*words)
    assert (code, len(out.splitlines())) == (6, 1)
    assert "error: sub-01: its process died of signal 9 (SIGKILL); the system does that" in err
    assert outcomes_of(root)["sub-01"]["attempt"] == 2
    assert not list(root.rglob(".qsm-deploy-*"))


def test_what_lies_in_the_current_folder_or_prints_disturbs_nobody(
    new_dataset, run, tmp_path, monkeypatch
) -> None:
    root = new_dataset(*NAMES[:2])
    for folder, name in (("here", "gzip.py"), ("site", "sitecustomize.py")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("print('who asked?')\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    code, out, _ = run("--bids", root, "--method", "tkd", "--cluster", "local:2")
    assert (code, len(out.splitlines())) == (0, 2)


def test_one_process_that_cannot_open_is_an_error_before_anything_is_made(
    new_dataset, run, monkeypatch
) -> None:
    root = new_dataset(*NAMES[:4])
    opened = []

    def second_fails(worker):
        opened.append(worker)
        if len(opened) == 2:
            raise EngineError("the GPU is full")
        return before(worker)

    before = Worker.open
    monkeypatch.setattr(Worker, "open", second_fails)
    code, out, err = run("--bids", root, "--method", "tkd", "--cluster", "local:2")
    assert (code, out) == (4, "")
    assert "the GPU is full" in err
    assert not (root / "derivatives").exists()


def test_the_exit_code_is_that_of_the_first_by_name(new_dataset, run, killing) -> None:
    root = new_dataset(*NAMES[:2])
    killing(r"sub-01_localfield\.nii\.gz$")
    (root / "sub-02/anat/sub-02_localfield.json").write_text("{}")
    code, _, err = run("--bids", root, "--method", "tkd", "--cluster", "local:2")
    errors = [line.split(": ")[2] for line in err.splitlines() if "qsm-run: error" in line]
    assert (code, errors) == (6, ["sub-01", "sub-02"])


@pytest.mark.parametrize("cluster", ["local", "local:", "local:0", "local:-1", "local:two"])
def test_what_is_no_cluster(new_dataset, run, cluster) -> None:
    code, _, err = run("--bids", new_dataset("sub-01"), "--cluster", cluster)
    assert code == 2
    assert "expected local:N" in err


def test_resuming_with_what_is_no_plain_json(new_dataset, run, card, write_model) -> None:
    words = (write_model(card), "--bids", new_dataset(*NAMES[:2]), "--cluster", "local:1")
    consistent = ("--data-consistency", "0.1")
    assert run(*words, *consistent, "--participant-label", "01")[0] == 0
    code, out, err = run(*words, *consistent, "--resume")
    assert (code, len(out.splitlines())) == (0, 1), err
