"""What belongs to a living process: files and folders it holds locked, until it ends somehow."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

SCRATCH = "qsm-deploy-scratch-"


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[int | None]:
    """Create a file that is this process's until the body ends, and then gone.

    The system frees it however the process ends; no process number is kept, which in a container
    or on another computer means nothing.

    Parameters
    ----------
    path
        The file.
    wait
        Whether to wait while another process holds it.

    Yields
    ------
    int or None
        Its descriptor; ``None`` if another process holds it. On file systems that know no locks
        nobody else does.

    Raises
    ------
    OSError
        If it cannot be created.
    """
    while True:
        descriptor = _created(path)
        try:
            ours = _lock(descriptor, wait=wait)
            if ours and not _is_at(descriptor, path):  # whose it was has removed it meanwhile
                continue
            try:
                yield descriptor if ours else None
            finally:
                if ours:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create a folder for the body, and remove those that killed processes of this user left.

    Raises
    ------
    OSError
        If there is no place for one.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError), opened(left, os.O_DIRECTORY) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(opened(folder, os.O_DIRECTORY))
            except FileNotFoundError:  # another process took it for left
                continue
            _lock(descriptor, wait=True)
            if not _is_at(descriptor, folder):
                continue
            stack.callback(shutil.rmtree, folder, ignore_errors=True)  # while it is held
            yield folder
            return


@contextmanager
def opened(path: Path, how: int = 0) -> Iterator[int]:
    """Open a file of this user's for reading and writing, or a folder, and no link to either.

    Raises
    ------
    OSError
        If it is somebody else's or cannot be opened.
    """
    access = os.O_RDONLY if how & os.O_DIRECTORY else os.O_RDWR
    descriptor = os.open(path, access | how | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(f"{path} is another user's")
        yield descriptor
    finally:
        os.close(descriptor)


def _created(path: Path) -> int:
    try:
        return os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # another user's, which can be locked all the same
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
