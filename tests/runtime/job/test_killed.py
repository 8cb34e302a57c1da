"""A run that is killed at any moment leaves whole files or none, and the next removes the rest."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy import export
from qsm_deploy.runtime.card.card import parse_card
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.console.atomic import check_writable
from qsm_deploy.runtime.console.held import SCRATCH, scratch_folder
from qsm_deploy.runtime.sessions.open import open_session

RUN = "from qsm_deploy.runtime.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
STUDY = "sub-0{}/anat/sub-0{}_localfield"
SMALL = (24, 24, 20)
EXPORT = "from qsm_deploy.export.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
KILLS = 30  # of each command
WRITES_S = 0.02  # what writing takes at least on a busy machine


@pytest.fixture
def command(write_volume, tmp_path):
    field = np.random.default_rng(1).normal(0, 0.01, (96, 96, 64)).astype(np.float32)
    volume = write_volume(field, "field.nii.gz")
    outputs = ["-o", tmp_path / "out" / "chi.nii.gz", "--report", tmp_path / "out" / "run.json"]
    (tmp_path / "out").mkdir()
    return [sys.executable, "-c", RUN, volume, *outputs]


def whole_files(folder, shape=(96, 96, 64)):
    """Return the names of the files, each read to its end."""
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert nib.load(path).get_fdata().shape == shape
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "kills", [slice(1), pytest.param(slice(1, 5), marks=pytest.mark.slow)], ids=["once", "often"]
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_no_partial_file_at_any_moment(command, tmp_path, note_counts, how, kills):
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
    note_counts("qsm-run, or interrupted", kills=len(moments))


class Process:
    """A command that may be killed, and what it says."""

    def __init__(self, words, **environment):
        how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([*map(str, words)], env=os.environ | environment, **how)
        self.pid = self._process.pid

    def wait(self):
        said = self._process.communicate(timeout=120)[1]
        assert "Traceback" not in said, said
        return self._process.returncode


FORKS = """
import os, sys, time
from pathlib import Path
import onnxruntime, openvino
from qsm_deploy.export import by_name, cli, write_network
from qsm_deploy.export.graph import onnx_export
from qsm_deploy.runtime.card.card import MemoryUse, Verification
from tests.kept_traces import keep_traces
onnx_export.trace = keep_traces(Path(sys.argv[1]))
# what takes many seconds and writes nothing
verified = Verification("PyTorch", 0.0, ((48, 48, 48),)), [], None
write_network._verify = lambda *_: time.sleep(1) or verified
write_network.measure_memory = lambda *_: MemoryUse(1, 2)
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        os.dup2(2, 1)
        os._exit(cli.main(line.split()))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """A process of which every fork exports once: what it imports takes longer than an export."""

    def __init__(self, traces, log, **environment):
        command, here = [sys.executable, "-c", FORKS, str(traces)], Path(__file__).parents[3]
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": here}
        with log.open("w") as said:
            environment = os.environ | environment
            self._process = subprocess.Popen(command, env=environment, stderr=said, **how)
        self._log = log

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate()

    def start(self, words):
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._process.stdout.readline())
        return self

    def wait(self):
        code = int(self._process.stdout.readline())
        assert "Traceback" not in self._log.read_text()
        return code


def is_writing(pid, folder):
    """Return whether a process has a file without a name in a folder, as while it writes.

    Raises
    ------
    OSError
        If it has ended.
    """
    links = [*Path(f"/proc/{pid}/fd").iterdir()]
    if not links:
        raise ProcessLookupError(pid)
    for link in links:
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(link).startswith(str(folder)) and "/#" in os.readlink(link):
                return True
    return False


def killed(start, folder, dice, kills=KILLS):
    """Start and kill a command many times, every second time as it writes.

    Yields after each whether it was seen to write.
    """
    began = time.monotonic()
    assert start().wait() == 0
    lasts = time.monotonic() - began
    for kill in range(kills):
        process, writing = start(), False
        time.sleep(lasts * dice.uniform(0, 1 if kill % 2 else 0.5))
        how = dice.choice([signal.SIGKILL, signal.SIGTERM])
        with suppress(OSError):  # it has ended
            while not (kill % 2 or writing):
                writing = is_writing(process.pid, folder)
            time.sleep(dice.uniform(0, WRITES_S) if writing else 0)
            os.kill(process.pid, how)
        assert process.wait() in (0, -how)
        yield writing


def inodes(folder):
    """Return the files that have a name there, by what tells an old one from a new one."""
    return {p.name: p.stat().st_ino for p in folder.iterdir() if not p.name.startswith(".")}


def left(folder):
    return [path.name for path in folder.rglob("*") if path.name.startswith(".qsm-deploy")]


def what_is_there(folder, old, names):
    """Return what a kill left, once the next run has looked: the old outputs or all new ones."""
    seen, undone = inodes(folder), left(folder)
    assert seen.items() <= old.items() or not seen.items() & old.items(), "old beside new"
    for name in names:
        check_writable(folder / name, force=True)  # as the next run does
    assert left(folder) == []
    if (now := inodes(folder)) == old:
        return "undone" if undone else "old"
    assert now.keys() == names
    assert not now.items() & old.items()
    return "new"


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaced"])
def test_a_killed_run_leaves_all_outputs_or_what_was_there(
    write_volume, tmp_path, note_counts, replaces
):
    out, names, seen = tmp_path / "out", {"chi.nii.gz", "chi.json", "run.json"}, Counter()
    out.mkdir()
    field = np.random.default_rng(1).normal(0, 0.01, SMALL).astype(np.float32)
    outputs = ["-o", out / "chi.nii.gz", "--report", out / "run.json", "--force"]
    volume = write_volume(field, "field.nii.gz")
    words = [sys.executable, "-c", RUN, volume, "--method", "tkd", *outputs]
    old = {}

    def start():
        nonlocal old
        if not replaces:
            for name in inodes(out):
                (out / name).unlink()
        old = inodes(out)
        return Process(words)

    for writing in killed(start, out, random.Random(1), KILLS // 2):
        seen["writing"] += writing
        seen[what_is_there(out, old, names)] += 1
        assert whole_files(out, SMALL) in (set(), names)
    assert start().wait() == 0
    assert whole_files(out, SMALL) == names
    assert min(seen["old"], seen["writing"]) > KILLS / 10, seen
    note_counts("qsm-run", kills=KILLS // 2, **seen)


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "kills"), [((), KILLS), (("--cluster", "local:2"), 10)])
def test_a_killed_cohort_is_completed_by_resume(write_volume, tmp_path, note_counts, pool, kills):
    study, dice, seen = tmp_path / "study", random.Random(2), Counter()
    study.mkdir()
    described = {"Name": "x", "BIDSVersion": "1.10.0"}
    (study / "dataset_description.json").write_text(json.dumps(described))
    field = np.random.default_rng(1).normal(0, 0.01, SMALL).astype(np.float32)
    volume = write_volume(field, "field.nii.gz").read_bytes()
    for subject in range(4):
        stem = study / STUDY.format(subject, subject)
        stem.parent.mkdir(parents=True)
        stem.with_name(f"{stem.name}.nii.gz").write_bytes(volume)
        stem.with_name(f"{stem.name}.json").write_text(json.dumps({"Units": "ppm"}))
    maps, marked = study / "derivatives" / "qsm-deploy", {"QSM_DEPLOY_TEST": str(tmp_path)}
    words = [sys.executable, "-c", RUN, "--bids", study, "--method", "tkd", "--resume", *pool]

    def start():
        made = sorted(maps.rglob("*Chimap.nii.gz"))
        for path in dice.sample(made, min(2, len(made))):
            path.unlink()
            if dice.random() < 0.5:
                path.with_name(f"{path.name[:-7]}.json").unlink()
        return Process(words, **marked)

    for writing in killed(start, maps, dice, kills):
        seen["writing"] += writing
        until = time.monotonic() + 30
        while alive(marked):
            assert time.monotonic() < until, "an orphan stays"
            time.sleep(0.05)
        for path in maps.rglob("sub-*_Chimap.nii.gz"):
            assert nib.load(path).get_fdata().shape == SMALL
            assert json.loads(path.with_name(f"{path.name[:-7]}.json").read_text())["units"]
    assert start().wait() == 0
    assert len(list(maps.rglob("sub-*_Chimap.nii.gz"))) == 4
    assert left(study) == []
    assert pool or seen["writing"] > kills / 5
    note_counts("qsm-run --bids" + ", two processes" * bool(pool), kills=kills, **seen)


def alive(marked):
    """Return the processes that were started with a variable."""
    [mark] = [f"{name}={value}".encode() for name, value in marked.items()]
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
    return found


@pytest.mark.slow
def test_a_killed_export_leaves_all_outputs_or_the_old_ones(
    tmp_path, monkeypatch, request, note_counts
):
    scratch, out, seen = tmp_path / "tmp", tmp_path / "out", Counter()
    scratch.mkdir()
    out.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    places = {"TMPDIR": str(scratch), "XDG_CACHE_HOME": str(tmp_path)}
    words, old = ["--model", "tv-unet", "--force", "-o", out / "net.onnx"], {}

    def start():
        nonlocal old
        old = inodes(out)
        return forks.start(words)

    def require_whole():
        card = load_card(out / "net.onnx")
        assert parse_card((out / "net.json").read_text()) == card
        open_session(out / "net.onnx", "onnxruntime", threads=1)
        with scratch_folder() as folder:  # as the next does
            assert [path for path in scratch.iterdir() if SCRATCH in path.name] == [folder]

    with Forks(request.config.cache.mkdir("traces"), tmp_path / "log", **places) as forks:
        assert start().wait() == 0  # which traces
        for writing in killed(start, out, random.Random(3)):
            seen["writing"] += writing
            seen["in scratch"] += any(SCRATCH in path.name for path in scratch.iterdir())
            seen[what_is_there(out, old, {"net.json", "net.onnx"})] += 1
            require_whole()
        assert start().wait() == 0
        require_whole()
    assert min(seen["old"], seen["in scratch"], seen["writing"]) > KILLS / 10, seen
    note_counts("qsm-export", kills=KILLS, **seen)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_export_leaves_nothing_that_the_next_does_not_remove(
    tmp_path, monkeypatch, note_counts, how
):
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
    note_counts("qsm-export, as it verifies", kills=1)
