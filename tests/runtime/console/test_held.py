"""What belongs to a living process, and what a killed one left."""

import fcntl
import os
import subprocess
import sys
import tempfile

import pytest

from qsm_deploy.runtime.console.held import held, scratch_folder

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
