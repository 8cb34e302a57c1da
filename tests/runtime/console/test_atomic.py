"""Files that appear whole or not at all, however the writer ends."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.console import atomic
from qsm_deploy.runtime.console.atomic import check_writable, write_atomically, write_together
from tests.runtime.console.killed_at import COUNTED


@pytest.fixture(params=["nameless files", "hard links", "renames"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with what Linux has, and with what is left on poorer file systems."""
    if request.param != "nameless files":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if request.param == "renames":

        def no_links(*_paths: Path, **_how: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    return str(request.param)


@pytest.mark.usefixtures("method")
def test_a_new_file_is_whole_and_alone(tmp_path):
    write_atomically(tmp_path / "map.nii.gz", b"whole", force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["map.nii.gz"]
    assert (tmp_path / "map.nii.gz").read_bytes() == b"whole"


@pytest.mark.usefixtures("method")
def test_an_existing_file_is_replaced_only_with_force(tmp_path):
    path = tmp_path / "map.nii.gz"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"map\.nii\.gz exists; pass --force"):
        write_atomically(path, b"new", force=False)
    assert path.read_bytes() == b"mine"
    write_atomically(path, b"new", force=True)
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["map.nii.gz"]


@pytest.mark.usefixtures("method")
def test_permissions_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_atomically(tmp_path / "map.nii", b"", force=False)
    finally:
        os.umask(previous)
    assert (tmp_path / "map.nii").stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("method")
def test_a_broken_link_counts_as_existing(tmp_path):
    link = tmp_path / "map.nii"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="exists"):
        write_atomically(link, b"new", force=False)
    write_atomically(link, b"new", force=True)
    assert not link.is_symlink()
    assert link.read_bytes() == b"new"
    assert not (tmp_path / "gone").exists()


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("method", ["nameless files", "hard links"], indirect=True)
def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "map.nii"
    monkeypatch.setattr(atomic, "check_writable", lambda *_, **__: path.write_bytes(b"theirs"))
    with pytest.raises(UsageError, match="appeared meanwhile"):
        write_atomically(path, b"mine", force=False)
    assert path.read_bytes() == b"theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["map.nii"]


@pytest.mark.usefixtures("method")
def test_what_a_killed_writer_left_is_not_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as every time in a container
    (tmp_path / "map.nii").write_bytes(b"old")
    with monkeypatch.context() as killed:
        killed.setattr(os, "unlink", lambda *_: None)
        killed.setattr(os, "replace", lambda *_: None)
        write_atomically(tmp_path / "map.nii", b"killed", force=True)
    assert len(list(tmp_path.iterdir())) > 1
    write_atomically(tmp_path / "map.nii", b"whole", force=True)
    assert (tmp_path / "map.nii").read_bytes() == b"whole"


@pytest.mark.usefixtures("method")
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_atomically(tmp_path / "map.nii", b"new", force=False)
    (tmp_path / "old.nii").write_bytes(b"old")
    with pytest.raises(DataError, match="No space left on device"):
        write_atomically(tmp_path / "old.nii", b"new", force=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"old.nii": b"old"}


def content(folder):
    """Return what every file of a folder holds, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("force", [False, True])
def test_several_files_appear_together(tmp_path, force):
    if force:
        (tmp_path / "map.json").write_bytes(b"old")
    new = {"map.json": b"facts", "map.nii": b"whole", "run.json": b"report"}
    write_together({tmp_path / name: data for name, data in new.items()}, force=force)
    assert content(tmp_path) == new


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_none_of_several(tmp_path, monkeypatch, force, fails_at):
    old = {"map.json": b"old facts", "run.json": b"old report"} if force else {}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    write, written = atomic._write_through, []

    def full(file, data):
        write(file, data)
        written.append(data)
        if len(written) > fails_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_write_through", full)
    names = ["map.json", "map.nii", "run.json"]
    says = rf"cannot write .*{names[fails_at]}: No space left on device"
    with pytest.raises(DataError, match=says):
        write_together({tmp_path / name: b"new" for name in names}, force=force)
    assert content(tmp_path) == old
    monkeypatch.undo()
    write_together({tmp_path / name: b"new" for name in names}, force=force)  # nothing in the way
    assert content(tmp_path) == dict.fromkeys(names, b"new")


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_name_that_cannot_be_given_takes_back_those_before(tmp_path, monkeypatch, error):
    old = {"map.json": b"old facts", "map.nii": b"old map", "link": b"old facts"}
    (tmp_path / "map.json").write_bytes(b"old facts")
    (tmp_path / "map.nii").write_bytes(b"old map")
    (tmp_path / "link").symlink_to("map.json")
    for name in ("_name_nameless", "_name_part"):
        give = getattr(atomic, name)

        def refuse(file, target, give=give):
            if target.name == "map.nii":
                raise error
            give(file, target)

        monkeypatch.setattr(atomic, name, refuse)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError
    names = ["map.json", "link", "new.json", "map.nii"]
    with pytest.raises(expected):
        write_together({tmp_path / name: b"new" for name in names}, force=True)
    assert content(tmp_path) == old
    assert (tmp_path / "link").is_symlink()


LIMITED = """
import os, resource, sys
from pathlib import Path
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.console.atomic import write_together
if sys.argv[2] == "parts":
    del os.O_TMPFILE
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    small, large = Path(sys.argv[1], "map.json"), Path(sys.argv[1], "map.nii")
    write_together({small: b"facts", large: bytes(1 << 20)}, force=True)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["nameless", "parts"])
@pytest.mark.parametrize("old", [{}, {"map.json": b"old facts", "map.nii": b"old map"}])
def test_a_file_that_the_system_cuts_off_leaves_all_as_it_was(tmp_path, old, how):
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", LIMITED, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write {tmp_path / 'map.nii'}: File too large\n"
    assert content(tmp_path) == old


KILLED_AT = f"""{COUNTED}
from pathlib import Path
from qsm_deploy.runtime.console import atomic
for name in ("link", "rename", "replace", "unlink", "pwrite", "fsync"):
    setattr(os, name, counted(getattr(os, name)))
if sys.argv[2] == "parts":
    del os.O_TMPFILE
atomic.write_together({{Path(p): b"new" for p in sys.argv[3:]}}, force=True)
"""


@pytest.mark.parametrize("how", ["nameless", "parts"])
@pytest.mark.parametrize("existing", [3, 0], ids=["replaced", "new"])
def test_a_kill_at_any_call_leaves_old_or_new(tmp_path, how, existing):
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "map.json", tmp_path / "map.nii", tmp_path / "other" / "run.json"]
    before, after = [b"old"] * existing or [None] * 3, [b"new"] * 3
    outcomes = set()
    for killed_at in range(1, 40):
        for path in paths:
            path.unlink(missing_ok=True)
        for path in paths[:existing]:
            path.write_bytes(b"old")
        words = [sys.executable, "-c", KILLED_AT, str(killed_at), how, *map(str, paths)]
        ended = subprocess.run(words, check=False).returncode
        assert len({path.read_bytes() for path in paths if path.exists()}) <= 1  # never mixed
        for path in paths:
            check_writable(path, force=True)  # as the next run does
        seen = [path.read_bytes() if path.exists() else None for path in paths]
        assert seen in (before, after), killed_at
        outcomes.add(seen == after)
        assert {p.name for p in tmp_path.rglob("*")} - {"other"} <= {path.name for path in paths}
        if ended == 0:
            break
    assert (ended, outcomes) == (0, {False, True})


def test_what_a_living_process_is_writing_stays(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")  # or there is nothing to see
    write, seen = atomic._write_through, []

    def meanwhile(file, data):
        write(file, data)
        check_writable(tmp_path / "another.nii", force=False)
        seen.extend(tmp_path.iterdir())

    monkeypatch.setattr(atomic, "_write_through", meanwhile)
    write_atomically(tmp_path / "map.nii", b"whole", force=False)
    assert len(seen) == 1
    assert content(tmp_path) == {"map.nii": b"whole"}


def test_nothing_that_others_put_there_is_taken_for_left(tmp_path):
    """A journal may come with somebody's data; it must not decide over files."""
    (tmp_path / "mine").write_bytes(b"mine")
    listed = [{"path": "mine", "inode": 1}, {"path": "../x", "inode": 2}, {"path": 3}]
    (tmp_path / ".qsm-deploy-tmp-0").write_bytes(b"undo" + json.dumps(listed[:2]).encode())
    (tmp_path / ".qsm-deploy-tmp-1").write_bytes(b"undo" + json.dumps(listed).encode())
    (tmp_path / ".qsm-deploy-tmp-2").write_bytes(b"undo" + b"[" * 10**5)
    (tmp_path / ".qsm-deploy-tmp-3").symlink_to("mine")
    os.mkfifo(tmp_path / ".qsm-deploy-tmp-4")
    check_writable(tmp_path / "map.nii", force=False)
    assert (tmp_path / "mine").read_bytes() == b"mine"
    for name in (".qsm-deploy-tmp-3", ".qsm-deploy-tmp-4"):
        (tmp_path / name).unlink()
    assert content(tmp_path) == {"mine": b"mine"}


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "map.nii").symlink_to("theirs")
    write_atomically(tmp_path / "map.nii", b"new", force=True)
    assert not (tmp_path / "map.nii").is_symlink()
    assert content(tmp_path) == {"map.nii": b"new", "theirs": b"theirs"}


def test_places_that_take_no_file_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in [
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "file" / "map.nii", "is not a folder"),
        (tmp_path / "gone" / "map.nii", "is not a folder"),
        (tmp_path / "loop" / "map.nii", "is not a folder"),
        (tmp_path / ("long" * 100), "File name too long"),
        (Path(os.devnull), "is not a regular file"),
    ]:
        for attempt in (check_writable, lambda p, force: write_atomically(p, b"", force=force)):
            with pytest.raises(DataError, match=message):
                attempt(path, force=True)


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)  # root may everything
    with pytest.raises(DataError, match="not writable"):
        check_writable(tmp_path / "map.nii", force=False)


def test_a_folder_that_takes_no_file_after_all_is_an_error_of_data(tmp_path):
    # not even root, whom os.access lets everywhere, creates files there
    with pytest.raises(DataError, match=r"cannot write /proc/map\.nii|/proc is not"):
        write_atomically(Path("/proc/map.nii"), b"", force=False)


WRITER = """
import sys
from pathlib import Path
from qsm_deploy.runtime.console.atomic import write_atomically
data = bytes([7]) * (32 << 20)
print("ready", flush=True)
while True:
    write_atomically(Path(sys.argv[1]), data, force=True)
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="no nameless files on this system")
@pytest.mark.parametrize("before", [None, b"old"], ids=["new", "existing"])
def test_a_killed_writer_leaves_the_whole_file_or_none(tmp_path, before):
    path = tmp_path / "map.nii"
    rng = np.random.default_rng(0)
    whole = bytes([7]) * (32 << 20)
    for _ in range(5):
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
        seen = path.read_bytes() if path.exists() else None
        assert seen in (before, whole)
        check_writable(path, force=True)
        assert {p.name for p in tmp_path.iterdir()} <= {"map.nii"}


def test_more_files_than_a_process_may_have_open(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        write_together({tmp_path / f"{n}": b"whole" for n in range(150)}, force=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"whole"}
    assert len([*tmp_path.iterdir()]) == 150
