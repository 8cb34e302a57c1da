"""What became of every recording, a line of JSON each, and what can be read of it afterwards.

The files are all the state there is. Each is written by one shard or one computer: lines that
several computers append to one file of a network share get mixed.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.bids.output import make_folder
from qsm_deploy.runtime.cohort.sharding import Shard

FOLDER = "outcomes"  # in the derivative dataset
State = Literal["done", "failed", "planned", "taken"]
ONLY_HERE = ("report",)  # not written


@dataclass(frozen=True)
class Outcome:
    """What became of a recording.

    Attributes
    ----------
    recording
        Its name, or that of the subject or folder that gives none.
    state
        ``done`` with a map, ``failed`` without; ``planned`` where nothing was to be computed,
        ``taken`` while another process is at it.
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

    def line(self) -> str:
        """Return what is written of it."""
        written = {k: v for k, v in asdict(self).items() if k not in ONLY_HERE}
        return json.dumps(written, allow_nan=False) + "\n"


def outcome_from(content: Mapping[str, Any]) -> Outcome:
    """Return an outcome that was written as JSON; what later versions may add is dropped."""
    return Outcome(**{f.name: content[f.name] for f in fields(Outcome) if f.name in content})


class OutcomeFile:
    """The file that this process appends to."""

    def __init__(self, folder: Path, shard: Shard | None) -> None:
        self._path = folder / f"{platform.node() if shard is None else shard.stem}.jsonl"

    def begin(self) -> None:
        """Make its folder.

        Raises
        ------
        DataError
            If that cannot be done.
        """
        make_folder(self._path.parent, "--outcomes")

    def append(self, outcome: Outcome) -> None:
        """Write what became of a recording, in one piece.

        Raises
        ------
        DataError
            If it cannot be written.
        """
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, outcome.line().encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(
                f"cannot write {self._path}: {error.strerror}; choose another --outcomes"
            ) from error


def last_outcomes(folder: Path) -> dict[str, Outcome]:
    """Return the last outcome of every recording in a folder's files, by its name.

    What killed processes left half written is passed over.
    """
    found: dict[str, Outcome] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            try:
                outcome = outcome_from(json.loads(line))
                known = found.setdefault(outcome.recording, outcome)
                if outcome.finished_s > known.finished_s:
                    found[outcome.recording] = outcome
            except (ValueError, TypeError, AttributeError):
                continue
    return found
