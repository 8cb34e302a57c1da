"""A run that is killed at any moment leaves whole files or none."""

import json
import random
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest


@pytest.fixture
def command(write_volume, tmp_path):
    field = np.random.default_rng(1).normal(0, 0.01, (96, 96, 64)).astype(np.float32)
    volume = write_volume(field, "field.nii.gz")
    outputs = ["-o", tmp_path / "out" / "chi.nii.gz", "--report", tmp_path / "out" / "run.json"]
    (tmp_path / "out").mkdir()
    program = "from qsm_deploy.runtime.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", program, volume, *outputs, "--backend", "onnxruntime"]


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
