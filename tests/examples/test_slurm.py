"""The array job of ``examples/slurm``, given to a real SLURM."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.cohort.sharding import Shard
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from tests.slurm import Slurm

SCRIPT = Path(__file__).parents[2] / "examples/slurm/array.sh"
LABELS = ("01", "02", "03", "04", "05", "06")
SPOILED = "04"
SHARDS = 4


def chi(study: Path, label: str) -> Path:
    return study / f"derivatives/qsm-deploy/sub-{label}/anat/sub-{label}_Chimap.nii.gz"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return a dataset of local fields, of which one says no unit."""
    root = tmp_path / "study"
    root.mkdir()
    said = {"Name": "Boxes", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(said))
    rng = np.random.default_rng(5)
    for label in LABELS:
        field = np.zeros((16, 15, 14), np.float32)
        field[3:-3, 3:-3, 3:-3] = 0.02 * rng.standard_normal((10, 9, 8), np.float32)
        anat = root / f"sub-{label}" / "anat"
        anat.mkdir(parents=True)
        (anat / f"sub-{label}_localfield.nii.gz").write_bytes(nifti_bytes(field, np.eye(4)))
        units = {} if label == SPOILED else {"Units": "ppm"}
        (anat / f"sub-{label}_localfield.json").write_text(json.dumps(units))
    return root


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Return a function that submits the script for four shards and waits for their ends."""
    text = SCRIPT.read_text()
    assert text.count("100") == 2  # of the array, and of the shard
    script = tmp_path / "array.sh"
    script.write_text(text.replace("100", str(SHARDS)))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def submit(*words: str | Path) -> dict[str, tuple[str, str]]:
        array = f"--array=1-{SHARDS}%2"
        job = slurm.run("sbatch", "--parsable", array, script, *words, cwd=tmp_path)
        return slurm.ended(job.strip())

    return submit


@pytest.mark.slow
def test_every_task_makes_its_shard_and_slurm_knows_how_it_ended(
    submit, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--bids", study, "--method", "tkd"]
    of = {label: n for n in range(1, SHARDS + 1) for label in LABELS if Shard(n, SHARDS).has(label)}
    assert len({*of.values()}) > 1
    good, spoiled = ("COMPLETED", "0:0"), ("FAILED", "3:0")
    expected = {str(n): good for n in range(1, SHARDS + 1)}
    assert submit(*command) == expected | {str(of[SPOILED]): spoiled}
    status = ["--bids", str(study), "--status"]
    assert main(status) == 3
    said = capsys.readouterr().out
    assert "6 recordings: 5 done, 1 failed, 0 missing\n" in said
    assert f"failed: sub-{SPOILED}" in said
    made = {label: chi(study, label) for label in LABELS if label != SPOILED}
    times = {label: path.stat().st_mtime_ns for label, path in made.items()}

    sidecar = study / f"sub-{SPOILED}/anat/sub-{SPOILED}_localfield.json"
    sidecar.write_text(json.dumps({"Units": "ppm"}))
    assert submit(*command) == expected
    assert main(status) == 0
    assert times == {label: path.stat().st_mtime_ns for label, path in made.items()}
    for label in LABELS:
        field = nib.load(study / f"sub-{label}/anat/sub-{label}_localfield.nii.gz")
        alone = nib.load(chi(study, label))
        assert alone.shape == field.shape
        assert np.count_nonzero(alone.get_fdata()) == 10 * 9 * 8


@pytest.mark.slow
def test_slurm_knows_a_command_line_that_is_wrong(submit, study: Path) -> None:
    assert {*submit("--bids", study, "--method", "none").values()} == {("FAILED", "2:0")}
    assert not (study / "derivatives").exists()
