"""Where images and maps of patients lie until they are done with: one private folder.

Every round of a study has a folder in it: ``images``, then ``map`` in their place once it is whole,
and ``tried``, a byte for each time that it was begun. All names are made here.
"""

import os
import re
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType

from qsm_deploy.kernels.errors import DataError, MemoryLimitError, UsageError
from qsm_deploy.runtime.console.held import held

LOCK, WORK = ".lock", ".work"
OURS = re.compile(r"study-([0-9a-f]+)-[0-9a-f]+")
PRIVATE, PRIVATE_FILE = 0o700, 0o600


@dataclass(frozen=True, eq=False)
class Round:
    """What comes of one study until it is quiet.

    Attributes
    ----------
    folder
        Its own.
    study
        What stands for the study in names.
    number
        What the log calls it.
    """

    folder: Path
    study: str
    number: int

    @property
    def images(self) -> Path:
        """Where what came lies."""
        return self.folder / "images"

    @property
    def map(self) -> Path:
        """Where the map lies, whole or not at all."""
        return self.folder / "map"

    @property
    def series(self) -> Counter[int]:
        """How many images there are of each series number."""
        return Counter(int(path.name.partition("-")[0]) for path in self.images.iterdir())

    def begin(self) -> int:
        """Note on disk that it is begun, and return how many times it was."""
        with (self.folder / "tried").open("ab") as file:
            file.write(b".")
            return file.tell()


class Spool:
    """The folder, which is one server's while the context lasts.

    Parameters
    ----------
    folder
        Made if it is not there; one that holds anything else is refused.
    quota
        Most bytes in it.

    Attributes
    ----------
    work
        A folder for what is unfinished, empty at the start.

    Raises
    ------
    UsageError
        When entered, if the folder is another's or holds anything else.
    DataError
        When entered, if it cannot be made.
    """

    def __init__(self, folder: Path, quota: int) -> None:
        self.folder, self.work, self._quota = folder.absolute(), folder.absolute() / WORK, quota
        self._numbers, self._lock, self._held = count(1), threading.Lock(), 0
        self._stack = ExitStack()

    def __enter__(self) -> "Spool":
        with ExitStack() as stack:
            try:
                self.folder.mkdir(PRIVATE, parents=True, exist_ok=True)
                self._require_ours()
                self.folder.chmod(PRIVATE)
                if stack.enter_context(held(self.folder / LOCK)) is None:
                    raise UsageError(f"--spool {self.folder} is a running server's; name another")
                if self.work.exists():
                    shutil.rmtree(self.work)
                self.work.mkdir(PRIVATE)
            except OSError as error:
                raise DataError(f"--spool {self.folder}: {error.strerror}; name another") from error
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self._stack.close()

    def _require_ours(self) -> None:
        if self.folder.stat().st_uid != os.geteuid():
            raise UsageError(f"--spool {self.folder} is another user's; name one of your own")
        names = {path.name for path in self.folder.iterdir()} - {LOCK, WORK}
        if not all(map(OURS.fullmatch, names)):
            raise UsageError(f"--spool {self.folder} holds other files; name a folder for it alone")

    def new_round(self, study: str) -> Round:
        """Return a place for a study's images."""
        name = f"study-{study}-{secrets.token_hex(4)}"
        made = Round(self.folder / name, study, next(self._numbers))
        made.folder.mkdir(PRIVATE)
        made.images.mkdir(PRIVATE)
        return made

    def leftovers(self) -> Iterator[Round]:
        """Return what a server before left, the oldest first; what holds nothing is removed."""
        folders = [path for path in self.folder.iterdir() if OURS.fullmatch(path.name)]
        for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
            found = OURS.fullmatch(folder.name)
            left = Round(folder, found[1] if found else "", next(self._numbers))
            if left.map.exists():
                self.remove(left.images)
                yield left
            elif left.images.exists() and any(left.images.iterdir()):
                yield left
            else:
                self.remove(folder)
        self._recount()

    def write(self, path: Path, *pieces: bytes | memoryview) -> None:
        """Write a file, whole or not at all, and on disk when this returns.

        Raises
        ------
        MemoryLimitError
            If there would be more than the quota.
        OSError
            If it cannot be written.
        """
        size = sum(map(len, pieces))
        with self._lock:
            if self._held + size > self._quota:
                raise MemoryLimitError(
                    f"the spool would hold more than {self._quota} bytes; raise --quota, or see "
                    "why maps are not taken"
                )
            self._held += size
        part = self.work / secrets.token_hex(8)
        try:
            with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE), "wb") as f:
                f.writelines(pieces)
                f.flush()
                os.fsync(f.fileno())
            before = _size(path)  # an image that is sent again takes the place of the first
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            self._recount()
            raise
        with self._lock:
            self._held -= before

    def keep_map(self, made: Path, study: Round) -> None:
        """Let a finished map take the place of the images that it was made of.

        Raises
        ------
        OSError
            If it cannot be brought to the disk; the images stay.
        """
        for path in (*made.iterdir(), made):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        made.rename(study.map)
        self.remove(study.images)

    def remove(self, folder: Path) -> None:
        """Remove a folder and all in it from the disk.

        Raises
        ------
        OSError
            If something of it stays.
        """
        if folder.exists():
            shutil.rmtree(folder)
        self._recount()

    def _recount(self) -> None:
        with self._lock:
            self._held = sum(map(_size, self.folder.rglob("*")))


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size if path.is_file() else 0
    return 0
