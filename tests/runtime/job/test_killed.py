"""A run that is killed at any moment leaves whole files or none."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy import export
from qsm_deploy.runtime.console.atomic import check_writable
from qsm_deploy.runtime.console.held import scratch_folder


@pytest.fixture
def command(write_volume, tmp_path):
    field = np.random.default_rng(1).normal(0, 0.01, (96, 96, 64)).astype(np.float32)
    volume = write_volume(field, "field.nii.gz")
    outputs = ["-o", tmp_path / "out" / "chi.nii.gz", "--report", tmp_path / "out" / "run.json"]
    (tmp_path / "out").mkdir()
    program = "from qsm_deploy.runtime.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", program, volume, *outputs]


def whole_files(folder):
    """Return the names of the files, each read to its end."""
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert nib.load(path).get_fdata().shape == (96, 96, 64)
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "kills", [slice(1), pytest.param(slice(1, 5), marks=pytest.mark.slow)], ids=["once", "often"]
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_no_partial_file_at_any_moment(command, tmp_path, how, kills):
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    lasts = time.monotonic() - began
    everything = whole_files(tmp_path / "out")
    assert everything == {"chi.nii.gz", "chi.json", "run.json"}
    rng = random.Random(5)
    moments = [lasts * rng.uniform(0.2, 1.0) for _ in range(5)][kills]
    for moment in moments:
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(moment)
        process.send_signal(how)
        process.communicate()
        assert whole_files(tmp_path / "out") <= everything


STUDY = "sub-0{}/anat/sub-0{}_localfield"
RUN = "import sys; from qsm_deploy.runtime.cli import main; sys.exit(main(sys.argv[1:]))"
EXPORT = """
import sys
from qsm_deploy.export.cli import main
sys.exit(main(sys.argv[1:]))
"""


def killed_at_random(command, kills, rng, between):
    """Kill runs of a command at moments of which half lie where the last one wrote."""
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    lasts = time.monotonic() - began
    for kill in range(kills):
        between()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(lasts * (rng.uniform(0.2, 1.0) if kill % 2 else rng.uniform(0.8, 1.1)))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait()
        yield


def left(folder):
    return [path.name for path in folder.rglob("*") if path.name.startswith(".qsm-deploy")]


@pytest.mark.slow
def test_a_killed_run_with_force_leaves_old_or_new(command, tmp_path):
    forced, out = [*command, "--force"], tmp_path / "out"
    rng = random.Random(1)
    for _ in killed_at_random(forced, 14, rng, lambda: None):
        for path in out.iterdir():
            check_writable(path, force=True)  # as the next run does
        assert whole_files(out) == {"chi.nii.gz", "chi.json", "run.json"}
    subprocess.run(forced, check=True, capture_output=True)
    assert whole_files(out) == {"chi.nii.gz", "chi.json", "run.json"}


@pytest.mark.slow
def test_a_killed_cohort_is_completed_by_resume(write_volume, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    described = {"Name": "x", "BIDSVersion": "1.10.0"}
    (study / "dataset_description.json").write_text(json.dumps(described))
    field = np.random.default_rng(1).normal(0, 0.01, (48, 48, 48)).astype(np.float32)
    volume = write_volume(field, "field.nii.gz").read_bytes()
    for subject in range(4):
        stem = study / STUDY.format(subject, subject)
        stem.parent.mkdir(parents=True)
        stem.with_name(f"{stem.name}.nii.gz").write_bytes(volume)
        stem.with_name(f"{stem.name}.json").write_text(json.dumps({"Units": "ppm"}))
    maps = study / "derivatives" / "qsm-deploy"
    words = [sys.executable, "-c", RUN, "--bids", str(study)]
    resume = [*words, "--resume"]

    def unmake():
        for path in list(maps.rglob("*Chimap.nii.gz"))[:2]:
            path.unlink()

    for _ in killed_at_random(resume, 14, random.Random(2), unmake):
        for path in maps.rglob("sub-*_Chimap.nii.gz"):
            assert nib.load(path).get_fdata().shape == (48, 48, 48)
            assert json.loads(path.with_name(f"{path.name[:-7]}.json").read_text())["units"]
    subprocess.run(resume, check=True, capture_output=True)
    assert len(list(maps.rglob("sub-*_Chimap.nii.gz"))) == 4
    assert left(study) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_export_leaves_nothing_that_the_next_does_not_remove(tmp_path, monkeypatch, how):
    weights = Path(next(iter(export.__path__))) / "weights" / "tv-unet.safetensors"
    scratch, out = tmp_path / "tmp", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    words = [sys.executable, "-c", EXPORT, "--model", "tv-unet", "--weights", str(weights)]
    process = subprocess.Popen(
        [*words, "-o", str(out / "net.onnx")],
        env=os.environ | {"TMPDIR": str(scratch)},
        stderr=subprocess.DEVNULL,
    )
    while not list(scratch.glob("qsm-deploy-*/draft.onnx")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait() == -how
    assert list(out.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with scratch_folder() as folder:  # as the next does
        assert list(scratch.glob("qsm-deploy-*")) == [folder]
