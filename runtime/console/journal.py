"""What undoes a write of several files that was cut off between two of their names."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from qsm_deploy.runtime.console.held import held, opened

PREFIX = ".qsm-deploy-tmp-"  # of everything hidden beside outputs
UNDO, DONE = b"undo", b"done"
LARGEST = 1 << 20  # of a journal [bytes]


@dataclass(frozen=True)
class Entry:
    """A file that is to be named.

    Attributes
    ----------
    path
        Where, from the journal's folder, which may have another name by then.
    inode
        Of its content, by which it is known from what others put there.
    """

    path: str
    inode: int


class Journal:
    """The hidden file beside the outputs of one write, held by the process that writes them."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file, self._descriptor = file, descriptor

    def hidden(self, path: Path, number: int, kind: str) -> Path:
        """Return a hidden name beside an output."""
        return _hidden(self._file, path, number, kind)

    def begin(self, inodes: Mapping[Path, int]) -> None:
        """Write down what is about to be named, to be taken back should the process end here."""
        above = self._file.parent.resolve()
        entries = [
            Entry(os.path.relpath(path.parent.resolve() / path.name, above), inode)
            for path, inode in inodes.items()
        ]
        os.pwrite(self._descriptor, UNDO + json.dumps([asdict(e) for e in entries]).encode(), 0)

    def commit(self) -> None:
        """Let the new files stay."""
        os.pwrite(self._descriptor, DONE, 0)

    def undo(self) -> None:
        """Take back what has a name, and give back what it replaced."""
        _undo(self._file, _read(self._descriptor))


def hidden_in(folder: Path) -> Path:
    """Return a hidden name that is nobody else's."""
    return folder / f"{PREFIX}{secrets.token_hex(6)}"


@contextmanager
def journal_in(folder: Path) -> Iterator[Journal]:
    """Begin a journal, and remove it and all hidden files at the end.

    Raises
    ------
    OSError
        If it cannot be created.
    """
    file = hidden_in(folder)
    with held(file, wait=True) as descriptor:
        assert descriptor is not None, "a random name is nobody else's"
        try:
            yield Journal(file, descriptor)
        finally:
            _clear(file, _read(descriptor))


def clear_leftovers(folder: Path) -> None:
    """Undo what killed processes of this user were naming in a folder, and remove hidden files.

    What a living process holds stays. Content is known by its inode: nothing that others put
    there meanwhile is touched.
    """
    try:
        names = [name for name in os.listdir(folder) if name.startswith(PREFIX)]
    except OSError:  # which whoever writes there will meet
        return
    for file in (folder / name for name in sorted(names) if not Path(name).suffix):
        with suppress(OSError), opened(file) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = _read(descriptor)
            _undo(file, content)
            _clear(file, content)
            file.unlink()


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, LARGEST, 0)


def _entries(file: Path, content: bytes) -> list[tuple[Path, int]]:
    try:
        entries = [Entry(**entry) for entry in json.loads(content[len(UNDO) :])]
        return [(file.parent / entry.path, entry.inode) for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError):  # of a claim, or none of ours
        return []


def _undo(file: Path, content: bytes) -> None:
    if not content.startswith(UNDO):
        return
    entries = _entries(file, content)
    for path, inode in reversed(entries):
        with suppress(OSError):
            if path.lstat().st_ino == inode:
                path.unlink()
    for number, (path, _) in enumerate(entries):
        with suppress(OSError):  # nothing was replaced; the first error is the one to tell
            if not os.path.lexists(path):
                os.rename(_hidden(file, path, number, "old"), path)


def _clear(file: Path, content: bytes) -> None:
    """Remove the hidden files of a journal, beside it and beside the files that it names."""
    folders = {file.parent} | {path.parent for path, _ in _entries(file, content)}
    for folder in folders:
        with suppress(OSError):
            for name in os.listdir(folder):
                if name.startswith(f"{file.name}."):
                    folder.joinpath(name).unlink(missing_ok=True)


def _hidden(file: Path, path: Path, number: int, kind: str) -> Path:
    return path.with_name(f"{file.name}.{number}-{kind}")
