"""Files that appear whole or not at all."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.console.held import held
from qsm_deploy.runtime.console.journal import Journal, clear_leftovers, hidden_in, journal_in

SPARE = 128  # files that a process may have open besides those it writes


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse an output that exists or cannot be created, before any work is done for it.

    What killed processes left in its folder is undone and removed first.

    Raises
    ------
    UsageError
        If ``path`` exists and ``force`` is false.
    DataError
        If its folder is missing or not writable, or ``path`` is a folder or a device.
    """
    try:
        _check_writable(path, force=force)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise DataError(f"cannot write {path}: {error.strerror}; choose another output") from error


def _check_writable(path: Path, *, force: bool) -> None:
    folder = path.parent
    clear_leftovers(folder)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file; choose another output")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path} exists; pass --force to overwrite it or choose another name")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; create it or choose another output")
    if not os.access(folder, os.W_OK):
        raise DataError(f"{folder} is not writable; choose another output folder")


def write_atomically(path: Path, data: bytes, *, force: bool) -> None:
    """Write ``data`` to ``path`` so that a reader sees the whole file or none.

    Raises
    ------
    UsageError, DataError
        As :func:`write_together`.
    """
    write_together({path: data}, force=force)


def write_together(files: Mapping[Path, bytes], *, force: bool) -> None:
    """Write several files so that all of them appear, each whole, or none.

    On Linux the bytes go to nameless files first, which vanish with the process however it ends.
    When all are complete and on disk, what they replace but the first is put aside, the last
    first, and they get their names in the order given, the first in one step: at no moment does
    an old file lie beside a new one. If one cannot get its name, everything is as it was.

    Should the process be killed between two names, the files before are there without those
    after, and a journal under a hidden name. The next that writes to the folder, or looks whether
    it could, undoes them and gives back what they replaced. A symbolic link is replaced itself,
    and what it points to stays.

    Raises
    ------
    UsageError
        If one exists and ``force`` is false.
    DataError
        If one cannot be written; the message names it.
    """
    for path in files:
        check_writable(path, force=force)
    _allow_open(len(files) + SPARE)
    with ExitStack() as written:
        complete: dict[Path, Callable[[Path], None]] = {}
        inodes: dict[Path, int] = {}
        for path, data in files.items():
            with _about(path):
                complete[path], inodes[path] = written.enter_context(_complete_file(path, data))
        for first in list(files)[:1]:
            with _about(first):
                journal = written.enter_context(journal_in(first.parent))
                journal.begin(inodes)
            _name_all(complete, journal, force=force)


def _allow_open(count: int) -> None:
    """Raise what a process may have open, which many systems set at 256 or 1024, where it can."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != now < count:
        wanted = count if most == resource.RLIM_INFINITY else min(count, most)
        with suppress(OSError, ValueError):  # then what cannot be opened is named
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _name_all(
    complete: Mapping[Path, Callable[[Path], None]], journal: Journal, *, force: bool
) -> None:
    """Give files their names; if one cannot get it, everything is as before."""
    paths = list(complete)
    try:
        replaced = [n for n, path in enumerate(paths) if force and os.path.lexists(path)]
        for number in reversed(replaced):
            path, old = paths[number], journal.hidden(paths[number], number, "old")
            with _about(path):
                (os.rename if number else _copy)(path, old)
        for number, (path, give_name) in enumerate(complete.items()):
            with _about(path):
                if number == 0 and replaced[:1] == [0]:
                    new = journal.hidden(path, number, "new")
                    give_name(new)
                    os.replace(new, path)
                else:
                    give_name(path)
    except BaseException:
        journal.undo()
        raise
    journal.commit()


@contextmanager
def _about(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(f"{path} appeared meanwhile; pass --force to overwrite it") from None
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _complete_file(path: Path, data: bytes) -> Iterator[tuple[Callable[[Path], None], int]]:
    """Write a file in the folder of ``path``, give what names it, over no other, and its inode."""
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):  # no nameless files on this system or file system
        part = hidden_in(path.parent)
        with held(part, wait=True) as shared:
            assert shared is not None, "it waited"
            with os.fdopen(os.dup(shared), "wb") as file:
                _write_through(file, data)
            yield partial(_name_part, part), os.fstat(shared).st_ino
        return
    with os.fdopen(descriptor, "wb") as file:
        _write_through(file, data)
        yield partial(_name_nameless, file), os.fstat(descriptor).st_ino


def _copy(path: Path, copy: Path) -> None:
    """Give a file, or a symbolic link, a second name, or a twin where there are no hard links."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except (OSError, AttributeError, NotImplementedError):
        try:
            shutil.copy2(path, copy, follow_symlinks=False)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise


def _name_nameless(file: BinaryIO, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # linkat follows the symbolic link by which /proc names the open file
        os.link(f"/proc/self/fd/{file.fileno()}", path.name, dst_dir_fd=folder)
    finally:
        os.close(folder)


def _name_part(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # which, unlike a rename, never replaces a file
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # no hard links
        os.replace(part, path)


def _write_through(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
