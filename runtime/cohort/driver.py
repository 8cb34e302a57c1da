"""A cohort from its dataset to its maps, whatever pool makes them: ``qsm-run --bids``."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsm_deploy.kernels.errors import DataError, QsmDeployError, UsageError
from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.bids.output import Derivative, clear_claim
from qsm_deploy.runtime.bids.resume import maps_that_stay
from qsm_deploy.runtime.cohort.cohort import Cohort, file_of
from qsm_deploy.runtime.cohort.group_table import names_in, require_table, write_table
from qsm_deploy.runtime.cohort.outcomes import Outcome, OutcomeFile, told_outcomes
from qsm_deploy.runtime.cohort.pool import Pool
from qsm_deploy.runtime.cohort.progress import Progress
from qsm_deploy.runtime.console.provenance import version
from qsm_deploy.runtime.console.terminal import TerminalLog

if TYPE_CHECKING:
    from qsm_deploy.runtime.cohort.pages import Pages

GRACE_S = 60.0  # for what still runs when a user interrupts
INDEX_SHARE = 0.1  # of the time, at most, goes into the index of pages


@dataclass
class Result:
    """What a run over a cohort has to say.

    Attributes
    ----------
    lines
        One for every map that was made.
    reports
        Of these, if they were asked for.
    failures
        Those without one.
    """

    lines: list[str] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Outcome] = field(default_factory=list)


def run_cohort(
    cohort: Cohort, pool: Pool, log: TerminalLog, result: Result | None = None
) -> Result:
    """Reconstruct the recordings of a dataset.

    A recording that fails does not keep the others from their maps.

    Parameters
    ----------
    cohort
        What is asked for.
    pool
        Where it is done.
    log
        Takes notes and progress.
    result
        Takes what there is to say, also where an interrupt ends it.

    Raises
    ------
    UsageError
        If maps exist and nothing says what becomes of them, or the network takes no local field.
    DataError
        If it is no BIDS dataset, or holds nothing to reconstruct.
    EngineError
        If the model cannot be loaded.
    KeyboardInterrupt
        If the user ends it; what was running has had time to end.
    """
    if cohort.resume and cohort.force:
        raise UsageError("--resume keeps the maps that --force would overwrite; drop one")
    result = Result() if result is None else result
    cohort.derivative.require_ours()
    if cohort.table is not None:
        require_table(cohort.table)
    found = cohort.find()
    recordings, failures = found.recordings, found.failures
    for note in found.notes():
        log.warn(note)
    if cohort.shard is not None:
        log.tell(f"{cohort.shard}: {len(recordings)} recordings")
    with _interrupted() as at_work, closing(pool):
        facts = pool.open(cohort, log)
        derivative = replace(cohort.derivative, gives=facts.gives)
        how = {"force": cohort.force, "resume": cohort.resume}
        made = maps_that_stay(derivative, recordings, facts.wanted, **how)
        kept = {recording.name for recording in made}
        missing = [recording for recording in recordings if recording.name not in kept]
        at_work += [derivative.chi(recording) for recording in missing]
        _require_free(cohort, missing)
        progress = Progress(len(recordings) + len(failures), log, lambda: pool.workers)
        names = {*(recording.name for recording in recordings), *failures}
        run = _Run(cohort, derivative, log, result, progress, names)
        if missing or failures or cohort.table or cohort.html:  # or nothing is written
            run.begin()
        try:
            for recording in made:
                run.note(Outcome(recording.name, "done", again=True, is_written=True))
            for name, reason in failures.items():
                code = DataError.exit_code
                run.note(Outcome(name, "failed", exit_code=code, reason=reason, version=version()))
            run.all(pool, missing)
        finally:
            run.end()
    return result


@contextmanager
def _interrupted() -> Iterator[list[Path]]:
    """Remove what processes left beside maps that are named, should the body be interrupted."""
    at_work: list[Path] = []
    try:
        yield at_work
    except KeyboardInterrupt:
        for chi in at_work:
            clear_claim(chi)
        raise


def _require_free(cohort: Cohort, recordings: Sequence[Recording]) -> None:
    """Refuse to write over pictures and reports of recordings before anything is computed."""
    if cohort.force or cohort.resume:
        return
    for flag, pattern in (("figure", cohort.figure), ("report", cohort.report)):
        for path in (file_of(pattern, r.name) for r in recordings if pattern is not None):
            if os.path.lexists(path):
                raise UsageError(f"--{flag}: {path} exists; pass --force or choose another name")


@dataclass
class _Run:
    """What came of the recordings of a run, and where it is written down."""

    cohort: Cohort
    derivative: Derivative
    log: TerminalLog
    result: Result
    progress: Progress
    names: set[str]
    pages: "Pages | None" = None
    file: OutcomeFile | None = None
    _kept: dict[str, Outcome] = field(default_factory=dict)
    _indexed_at: float = 0.0
    _index_takes: float = 0.0

    def begin(self) -> None:
        """Make the folders of what is written."""
        if self.cohort.dry_run:
            return
        if self.cohort.html is not None:
            from qsm_deploy.runtime.cohort.pages import Pages

            self.pages = Pages(self.cohort.html, self.cohort.dataset)
            self.pages.begin(self.names)
        self.derivative.describe()
        self.file = OutcomeFile(self.cohort.outcomes_folder, self.cohort.shard)
        self.file.begin()

    def all(self, pool: Pool, recordings: Sequence[Recording]) -> None:
        """Reconstruct recordings, last those that another process is at."""
        theirs = self._taken(pool, recordings, wait=False)
        self._taken(pool, theirs, wait=True)

    def _taken(self, pool: Pool, recordings: Sequence[Recording], *, wait: bool) -> list[Recording]:
        """Reconstruct recordings; return those that another process is at."""
        taken, by_name = set(), {recording.name: recording for recording in recordings}
        try:
            for outcome in pool.outcomes(recordings, wait=wait):
                if outcome.state == "taken":
                    taken.add(outcome.recording)
                else:
                    self.note(outcome)
                if outcome.state == "failed" and not self.cohort.dry_run:
                    clear_claim(self.derivative.chi(by_name[outcome.recording]))
        except KeyboardInterrupt:
            for outcome in pool.finish(GRACE_S):
                if outcome.state != "taken":
                    self.note(outcome)
            raise
        return [recording for recording in recordings if recording.name in taken]

    def note(self, outcome: Outcome) -> None:
        """Take down what became of a recording."""
        name, chi = outcome.recording, outcome.map
        if outcome.report is not None:
            self.result.reports.append({"recording": name, "map": chi, **outcome.report})
        if outcome.state == "planned":
            self.result.lines.append(f"{name}: {outcome.reason} -> {chi}")
            return
        if self.file is not None and not outcome.is_written:
            with self._warning(name):
                self.file.append(outcome)
        self.progress.ended(outcome)  # before it is told: an interrupt may follow at once
        if outcome.state == "failed":
            self.result.failures.append(outcome)
            self.log.tell(f"{name}: failed: {outcome.reason}")
        elif outcome.again:
            self._kept[name] = outcome
            self.log.tell(f"{name}: has a map already")
        else:
            self.result.lines.append(chi)
            self.log.tell(f"{name}: {outcome.seconds:.1f} s")
        if self.pages is not None:
            with self._warning(name):
                self._look(self.pages, outcome)

    def _look(self, pages: "Pages", outcome: Outcome) -> None:
        """Bring pages and index up to date, the latter not all the time in a large cohort."""
        if outcome.state == "failed":
            pages.failed(outcome.recording, outcome.reason)
        elif outcome.again:
            pages.kept(outcome.recording)
        if INDEX_SHARE * (time.monotonic() - self._indexed_at) > self._index_takes:
            self._index(pages)

    def _index(self, pages: "Pages") -> None:
        began = time.monotonic()
        pages.index()
        self._indexed_at = time.monotonic()
        self._index_takes = self._indexed_at - began

    def end(self) -> None:
        """Write what is made of all."""
        self.progress.end()
        if self.cohort.dry_run:
            return
        if self.pages is not None:
            with self._warning("index"):
                self._index(self.pages)
        path = self.cohort.table
        if path is None and self.cohort.shard is None:
            path = self.derivative.table
        if path is not None:
            with self._warning(path.name):
                write_table(path, self._rows(path))

    def _rows(self, path: Path) -> list[Outcome]:
        """Return what is known of all recordings, those of an earlier table among them."""
        told = told_outcomes(self.cohort.outcomes_folder)
        others = self.cohort.participant_labels is not None or self.cohort.shard is not None
        names = self.names | (names_in(path) if others else set())
        last = {name: one for name, one in told.last.items() if name in names} | self._kept
        return [told.made.get(name, one) if one.again else one for name, one in last.items()]

    @contextmanager
    def _warning(self, about: str) -> Iterator[None]:
        """Say what went wrong with what no map depends on."""
        try:
            yield
        except QsmDeployError as error:
            self.log.warn(f"{about}: {error}")
