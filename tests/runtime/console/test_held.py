"""What belongs to a living process, and what a killed one left."""

import fcntl
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from qsm_deploy.runtime.console.held import held, scratch_folder
from tests.runtime.console.killed_at import COUNTED

KILLED = """
import os, signal
from qsm_deploy.runtime.console.held import scratch_folder
with scratch_folder() as folder:
    (folder / "draft.onnx").write_bytes(b"draft")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_is_held_by_one_and_gone_afterwards(tmp_path):
    path = tmp_path / "claim"
    with held(path) as first, held(path) as second:
        assert (first is None, second is None) == (False, True)
        assert path.exists()
    assert not path.exists()
    with held(path) as again:
        assert again is not None


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def unknown(_descriptor, _how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with held(tmp_path / "claim") as ours:
        assert ours is not None


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "claim").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), held(tmp_path / "claim"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_folders_of_killed_processes_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "qsm-deploy-of-mine").mkdir()
    run = {"check": False, "capture_output": True, "text": True}
    with scratch_folder() as living:
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, **run)
        left = killed.stdout.strip()
        assert os.listdir(left) == ["draft.onnx"]
        with scratch_folder() as folder:
            assert not os.path.exists(left)
            assert living.is_dir()
        assert not folder.exists()
    assert os.listdir(tmp_path) == ["qsm-deploy-of-mine"]


KILLED_AT = f"""{COUNTED}
import fcntl, tempfile
from qsm_deploy.runtime.console.held import scratch_folder
tempfile.gettempdir()  # which tries whether a file can be written, once
for module, name in [(os, "mkdir"), (os, "open"), (os, "unlink"), (os, "rmdir"), (fcntl, "flock")]:
    setattr(module, name, counted(getattr(module, name)))
with scratch_folder() as folder:
    (folder / "draft.onnx").touch()
"""


def test_a_kill_at_any_call_leaves_nothing_that_the_next_does_not_remove(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment, left = os.environ | {"TMPDIR": str(tmp_path)}, Counter()
    for killed_at in range(1, 40):
        words = [sys.executable, "-c", KILLED_AT, str(killed_at)]
        ended = subprocess.run(words, check=False, env=environment).returncode
        left[len(os.listdir(tmp_path))] += 1
        with scratch_folder() as folder:
            assert os.listdir(tmp_path) == [folder.name], killed_at
        if ended == 0:
            break
    assert ended == 0
    assert left[1] > 3


def test_none_is_taken_for_left_while_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def make(_number):
        with scratch_folder() as folder:
            (folder / "draft.onnx").touch()
            return os.listdir(folder)

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(make, range(400)))
    assert made == [["draft.onnx"]] * 400
    assert os.listdir(tmp_path) == []
