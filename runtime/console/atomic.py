"""Files that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from qsm_deploy.kernels.errors import DataError, UsageError


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse an output that exists or cannot be created, before any work is done for it.

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

    On Linux the bytes go to nameless files first, which vanish with the process however it
    ends; they get their names, in the order given, when all are complete and on disk. If one
    cannot, those named before are taken back, and files that they replaced are there again. To
    replace a file a new one passes through a hidden name beside it, for the instant between two
    system calls. A process that is killed between two names leaves the files before; what they
    replaced, and on file systems without nameless files what was being written, may remain under
    a hidden name.

    Raises
    ------
    UsageError
        If one exists and ``force`` is false.
    DataError
        If one cannot be written; the message names it.
    """
    for path in files:
        check_writable(path, force=force)
    with ExitStack() as unnamed, ExitStack() as named:
        complete: dict[Path, Callable[[Path], None]] = {}
        for path, data in files.items():
            with _about(path):
                complete[path] = unnamed.enter_context(_complete_file(path, data))
        for path, give_name in complete.items():
            with _about(path):
                named.enter_context(_named(path, give_name, force=force))


@contextmanager
def _about(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(f"{path} appeared meanwhile; pass --force to overwrite it") from None
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _complete_file(path: Path, data: bytes) -> Iterator[Callable[[Path], None]]:
    """Write a file in the folder of ``path`` and give what names it, never over another file."""
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):  # no nameless files on this system or file system
        part = _hidden(path, ".part")
        try:
            with part.open("xb") as file:
                _write_through(file, data)
            yield partial(_name_part, part)
        finally:
            part.unlink(missing_ok=True)
        return
    with os.fdopen(descriptor, "wb") as file:
        _write_through(file, data)
        yield partial(_name_nameless, file)


@contextmanager
def _named(path: Path, give_name: Callable[[Path], None], *, force: bool) -> Iterator[None]:
    """Give a file its name; if the body fails, what was at that place before is there again."""
    new, old = _hidden(path), _hidden(path, ".old")
    if replaces := force and os.path.lexists(path):
        _copy(path, old)
    try:
        give_name(new if replaces else path)
        if replaces:
            os.replace(new, path)
    except BaseException:
        for name in (new, old):
            name.unlink(missing_ok=True)
        raise
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            if replaces:
                os.replace(old, path)
            else:
                path.unlink()
        raise
    with suppress(OSError):
        old.unlink()


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


def _hidden(path: Path, suffix: str = "") -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")


def _write_through(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
