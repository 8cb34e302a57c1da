"""What became of every recording, a line of JSON each, and what can be read of it afterwards.

The files are all the state there is. Each is written by one shard or one computer: lines that
several computers append to one file of a network share get mixed.
"""

import errno
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.bids.output import make_folder
from qsm_deploy.runtime.cohort.findings import REGIONS
from qsm_deploy.runtime.cohort.sharding import Shard
from qsm_deploy.runtime.console.atomic import write_atomically
from qsm_deploy.runtime.console.inputs import require_files
from qsm_deploy.runtime.job.report import are_numbers
from qsm_deploy.runtime.scan.params import is_number

FOLDER = "outcomes"  # in the derivative dataset
State = Literal["done", "failed", "planned", "taken", "missing"]
HERE = ("report", "is_written")  # what is not written
TEXTS = ("recording", "state", "reason", "map", "host", "version")
NUMBERS = ("exit_code", "seconds", "peak_bytes", "pid", "attempt", "finished_s")


@dataclass(frozen=True)
class Outcome:
    """What became of a recording.

    Attributes
    ----------
    recording
        Its name, or that of the subject or folder that gives none.
    state
        ``done`` with a map, ``failed`` without; ``planned`` where nothing was to be computed,
        ``taken`` while another process is at it, ``missing`` if there is no map and nothing is
        known of a failure.
    again
        Whether its map was there already.
    exit_code, reason
        Why it failed, as one run of it alone would say; or what is planned.
    map
        Where that lies.
    seconds, peak_bytes
        What it took: wall time, memory above what the program took before.
    host, pid, attempt, finished_s
        Where it was made, by which attempt, and when [seconds since 1970].
    weights_sha256, version
        Of the model, if there is one, and of this program.
    findings
        Numbers of the map for a table of all.
    report
        All that is known of the run, if that was asked for.
    is_written
        Whether who made it has written down what became of it.
    """

    recording: str
    state: State
    again: bool = False
    exit_code: int = 0
    reason: str = ""
    map: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    attempt: int = 1
    finished_s: float = field(default_factory=time.time)
    weights_sha256: str | None = None
    version: str = ""
    findings: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None
    is_written: bool = False

    def line(self) -> str:
        """Return what is written of it."""
        written = {name: value for name, value in asdict(self).items() if name not in HERE}
        return json.dumps(written, allow_nan=False) + "\n"


def outcome_from(content: Mapping[str, Any]) -> Outcome:
    """Return an outcome that was written as JSON; what later versions may add is dropped.

    Raises
    ------
    TypeError
        If it is none.
    """
    said = Outcome(**{f.name: content[f.name] for f in fields(Outcome) if f.name in content})
    if not (
        all(isinstance(getattr(said, name), str) for name in TEXTS)
        and all(is_number(getattr(said, name)) for name in NUMBERS)
        and isinstance(said.findings, dict)
        and are_numbers(said.findings)
        and isinstance(regions := said.findings.get(REGIONS, {}), dict)
        and all(map(is_number, regions.values()))
    ):
        raise TypeError("no outcome")
    return said


class OutcomeFile:
    """The file that this process appends to."""

    def __init__(self, folder: Path, shard: Shard | None) -> None:
        self._path = folder / f"{platform.node() if shard is None else shard.stem}.jsonl"

    def begin(self) -> None:
        """Make its folder, and a file of its own of what is a link: what that leads to stays.

        Raises
        ------
        DataError
            If that cannot be done.
        """
        make_folder(self._path.parent, "--outcomes")
        if self._path.is_symlink():
            lines = "".join(outcome.line() for outcome in _outcomes_in([self._path]))
            write_atomically(self._path, lines.encode(), force=True)

    def append(self, outcome: Outcome) -> None:
        """Write what became of a recording, in one piece.

        Raises
        ------
        DataError
            If it cannot be written.
        """
        try:
            with open(self._path, "ab+", buffering=0, opener=_open_itself) as file:
                size = file.seek(0, os.SEEK_END)
                torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by who was killed
                line = b"\n" * bool(torn) + outcome.line().encode()
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise DataError(
                f"cannot write {self._path}: {error.strerror}; choose another --outcomes"
            ) from error


@dataclass(frozen=True)
class Told:
    """What a folder's files say of recordings, by their names.

    Attributes
    ----------
    last
        What became of each in the end.
    made
        How the last map of each was made.
    """

    last: dict[str, Outcome]
    made: dict[str, Outcome]


def told_outcomes(folder: Path) -> Told:
    """Return what was written down of every recording.

    What killed processes left half written is passed over.

    Raises
    ------
    DataError
        If a file, or the folder, cannot be read.
    """
    try:
        names = sorted(os.listdir(folder)) if os.path.lexists(folder) else []
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    found = _outcomes_in([folder / name for name in names if name.endswith(".jsonl")])
    found.sort(key=lambda outcome: outcome.finished_s)
    return Told(
        {outcome.recording: outcome for outcome in found},
        {one.recording: one for one in found if one.state == "done" and not one.again},
    )


def _outcomes_in(paths: Sequence[Path]) -> list[Outcome]:
    found: list[Outcome] = []
    require_files(paths)
    try:
        contents = [path.read_bytes() for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    for line in (line for content in contents for line in content.splitlines()):
        with suppress(ValueError, TypeError, RecursionError):
            found.append(outcome_from(json.loads(line)))
    return found


def _open_itself(path: str, flags: int) -> int:
    """Open a file, and nothing that a symbolic link leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
