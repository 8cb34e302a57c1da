"""A dataset of small local fields, and children that some of its recordings kill."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.scan.nifti import nifti_bytes

SHAPE = (20, 22, 18)
# a process that opens the field of one of these subjects is killed, as the system kills one that
# takes too much memory
KILLS = """\
import os, re, signal, sys

def hook(event, given):
    if event == "open" and re.search({pattern!r}, str(given[0])):
        {countdown}
        os.kill(os.getpid(), signal.{signal})

sys.addaudithook(hook)
"""
ONCE = """\
try:
            os.unlink(str(given[0]) + ".once")
        except FileNotFoundError:
            return"""


def add_recording(root: Path, name: str, seed: int = 0) -> None:
    """Add a local field and its mask to a dataset."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:-2, 2:-2, 2:-2] = 1
    field = rng.normal(0, 0.002, SHAPE).astype(np.float32)
    field[7:12, 8:13, 6:11] += 0.08
    subject = name.partition("_")[0]
    anat = root / subject / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    for kind, volume in (("localfield", field * mask), ("mask", mask)):
        (anat / f"{name}_{kind}.nii.gz").write_bytes(nifti_bytes(volume, np.eye(4)))
    (anat / f"{name}_localfield.json").write_text('{"Units": "ppm"}')


@pytest.fixture
def new_dataset(tmp_path) -> Callable[..., Path]:
    """Return a function that makes a dataset of recordings by their names."""

    def make(*names: str) -> Path:
        root = tmp_path / "study"
        root.mkdir()
        about = {"Name": "Boxes", "BIDSVersion": "1.10.0"}
        (root / "dataset_description.json").write_text(json.dumps(about))
        for seed, name in enumerate(names):
            add_recording(root, name, seed)
        return root

    return make


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs qsm-run and returns its exit code and what it says."""

    def run_on(*words: object) -> tuple[int, str, str]:
        try:
            code = main([*map(str, words)])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run_on


@pytest.fixture
def killing(tmp_path, monkeypatch) -> Callable[..., None]:
    """Return a function that lets processes die as they open what a pattern matches."""

    def kill(pattern: str, signal: str = "SIGKILL", *, once: bool = False) -> None:
        folder = tmp_path / "site"
        folder.mkdir()
        text = KILLS.format(pattern=pattern, signal=signal, countdown=ONCE if once else "pass")
        (folder / "sitecustomize.py").write_text(text)
        before = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), before])))

    return kill
