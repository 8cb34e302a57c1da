"""Files that appear whole or not at all."""

import os
import secrets
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

    On Linux the bytes go to a nameless file first, which vanishes with the process however it
    ends; it gets its name when it is complete and on disk. To replace a file it passes through
    a hidden name beside it, for the instant between two system calls. File systems without
    nameless files keep a hidden ``.part`` file of a process that is killed while writing.

    Raises
    ------
    UsageError
        If ``path`` exists and ``force`` is false.
    DataError
        If the file cannot be written.
    """
    check_writable(path, force=force)
    try:
        if force and os.path.lexists(path):
            complete = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            _create(complete, data)
            os.replace(complete, path)
        else:
            _create(path, data)
    except FileExistsError:
        raise UsageError(f"{path} appeared meanwhile; pass --force to overwrite it") from None
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _create(path: Path, data: bytes) -> None:
    """Create ``path``, which must not exist, with its whole content."""
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):  # no nameless files on this system or file system
        _create_from_part(path, data)
        return
    with os.fdopen(descriptor, "wb") as file:
        _write_through(file, data)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # linkat follows the symbolic link by which /proc names the open file
            os.link(f"/proc/self/fd/{file.fileno()}", path.name, dst_dir_fd=folder)
        finally:
            os.close(folder)


def _create_from_part(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            _write_through(file, data)
        try:
            os.link(part, path)  # which, unlike a rename, never replaces a file
        except FileExistsError:
            raise
        except (OSError, AttributeError):  # no hard links either
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_through(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
