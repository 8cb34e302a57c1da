"""A pool of the workers of a Dask scheduler.

No more is handed to the scheduler than there are workers: when one dies, every task that waits for
it is suspected of having killed it.
"""

import json
import queue
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

from distributed import Client, Future, KilledWorker

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.dask.workplace import UnfitError, Workplace, alike, answer
from qsm_deploy.runtime.cohort.outcomes import Outcome, outcome_from
from qsm_deploy.runtime.cohort.pool import FINISHING
from qsm_deploy.runtime.cohort.reconstructing import Facts
from qsm_deploy.runtime.cohort.worker import ERRORS
from qsm_deploy.runtime.console.provenance import NAME, version
from qsm_deploy.runtime.console.terminal import TerminalLog

LOOK_S = 1.0  # how often the workers are counted
ASK_S = 10.0  # how often it is asked whether a first one will come
GPU = {"GPU": 1.0}  # what a worker with one is started with
GONE = "the scheduler is gone; what is done stays, go on with --resume when it is back"


class Source(Protocol):
    """Where workers come from.

    Attributes
    ----------
    most
        How many there will be, where they come and go with the work; else 0.
    """

    most: int

    def connect(self) -> Client:
        """Return a client of their scheduler.

        Raises
        ------
        EngineError
            If there is none.
        """

    def require_coming(self) -> None:
        """Refuse to wait any longer for a first worker where none will come.

        Raises
        ------
        EngineError
            If that is so.
        """

    def close(self) -> None:
        """End what was started."""


class DaskPool:
    """Dask workers, each with a child process that reconstructs one recording at a time.

    Parameters
    ----------
    source
        Where they come from.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._client: Client | None = None
        self._place = f"{NAME}-{uuid.uuid4().hex}"
        self._facts: dict[str, Any] | None = None
        self._unfit: UnfitError | None = None  # the last that was sent away
        self._waiting: deque[Recording] = deque()
        self._running: dict[Future[str], Recording | None] = {}
        self._ended: queue.SimpleQueue[Future[str]] = queue.SimpleQueue()
        self._wait = self._stopping = False
        self._live, self._looked_at = 0, 0.0
        self._resources: dict[str, float] | None = None

    @property
    def workers(self) -> int:
        """As :attr:`Pool.workers`; those that are there, or that will come when there is work."""
        now = time.monotonic()
        if self._client is not None and now - self._looked_at > LOOK_S:
            before = self._live
            self._live, self._looked_at = self._count(), now
            if before and not self._live:
                self._log.tell("no worker is left; waiting for another")
        return self._source.most or max(1, self._live)

    def _count(self) -> int:
        """Return how many workers there are that may take a task."""
        assert self._client is not None
        try:
            if self._resources is None:
                return len(self._client.nthreads())
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        except (OSError, TimeoutError) as error:
            raise EngineError(GONE) from error
        return sum(worker["resources"].get("GPU", 0) >= 1 for worker in workers)

    def open(self, cohort: Cohort, log: TerminalLog) -> Facts:
        """As :meth:`Pool.open`; the first worker that fits says what all maps have alike."""
        self._log = log
        same = alike(cohort)
        self._resources = GPU if cohort.host.device.startswith("cuda") else None
        self._client = self._source.connect()
        self._send_away_other_versions()
        self._require_some()
        self._client.register_plugin(Workplace(self._place, cohort, same, quiet=log.quiet))
        if not self._count():
            log.tell(f"waiting for a worker{' with --resources GPU=1' if self._resources else ''}")
        while self._facts is None:
            self._begin(None)
            try:
                self._facts = self._answer(self._first())
            except UnfitError:
                self._require_some()
            except KilledWorker as killed:
                raise EngineError(f"{_died(killed)} as it opened the model") from killed
        return Facts(**self._facts)

    def _first(self) -> Future[str]:
        """Return what ends first, as long as it may take."""
        while True:
            try:
                return self._ended.get(timeout=ASK_S)
            except queue.Empty:
                self._source.require_coming()

    def _require_some(self) -> None:
        """Refuse to wait for others where no worker fits."""
        if self._unfit is not None and not self._count():
            kind = ERRORS.get(self._unfit.exit_code, EngineError)
            raise kind(f"no worker fits; {self._unfit.host}: {self._unfit.reason}")

    def outcomes(self, recordings: Sequence[Recording], *, wait: bool) -> Iterator[Outcome]:
        """As :meth:`Pool.outcomes`."""
        self._waiting.extend(recordings)
        self._wait = wait
        yield from self._until(None)

    def _until(self, end: float | None) -> Iterator[Outcome]:
        """Yield what ends, until nothing is left or the time is over."""
        while self._running or self._waiting:
            while self._waiting and len(self._running) < self.workers:
                self._begin(self._waiting.popleft())
            left = LOOK_S if end is None else min(LOOK_S, end - time.monotonic())
            if left < 0:
                return
            with suppress(queue.Empty):
                outcome = self._outcome(self._ended.get(timeout=left))
                if outcome is not None:
                    yield outcome

    def _begin(self, recording: Recording | None) -> None:
        assert self._client is not None
        task = (self._place, recording, self._facts, self._wait)
        future = self._client.submit(answer, *task, pure=False, resources=self._resources)
        self._running[future] = recording
        future.add_done_callback(self._ended.put)

    def _outcome(self, future: Future[str]) -> Outcome | None:
        """Return what became of a recording, unless it is to be begun anew or was given up."""
        if (recording := self._running.get(future)) is None:
            return None
        try:
            answered = self._answer(future)
        except UnfitError:
            answered = None
        except KilledWorker as killed:
            reason = f"{_died(killed)} while it had {recording.name}"
            code = EngineError.exit_code
            return Outcome(
                recording.name, "failed", exit_code=code, reason=reason, version=version()
            )
        if answered is None:
            if not self._stopping:
                self._waiting.appendleft(recording)
            return None
        return outcome_from(answered)

    def _answer(self, future: Future[str]) -> dict[str, Any] | None:
        """Return the answer of a task, ``None`` if its worker had no such program.

        Raises
        ------
        UnfitError, KilledWorker
            If that became of it; the former has been sent away.
        EngineError
            If the scheduler is gone.
        """
        del self._running[future]
        if future.status == "finished":
            found: dict[str, Any] = json.loads(future.result())
            return found
        if future.status != "error":
            raise EngineError(GONE)
        error = future.exception()
        if isinstance(error, UnfitError):
            self._send_away(error)
        elif not isinstance(error, KilledWorker) and self._send_away_other_versions():
            return None
        raise error

    def _send_away_other_versions(self) -> bool:
        """Send away workers that lack this program, and say whether there were any."""
        assert self._client is not None
        answers: Any = self._client.get_versions(packages=[NAME])
        others = {
            address: theirs
            for address, said in answers["workers"].items()
            if (theirs := said["packages"].get(NAME) or "not installed") != version()
        }
        for address, theirs in others.items():
            reason = f"{NAME} is {theirs}, here it is {version()}"
            host = urlsplit(address).hostname or ""
            self._send_away(UnfitError(reason, EngineError.exit_code, address, host))
        return bool(others)

    def _send_away(self, unfit: UnfitError) -> None:
        assert self._client is not None
        self._unfit = unfit
        self._log.warn(f"worker {unfit.address} on {unfit.host} takes no part: {unfit.reason}")
        self._client.retire_workers([unfit.address])
        self._looked_at = 0.0

    def finish(self, seconds: float) -> Iterator[Outcome]:
        """As :meth:`Pool.finish`."""
        assert self._client is not None
        self._stopping = True
        self._waiting.clear()
        self._log.tell(FINISHING.format(seconds))
        at = {key for keys in self._client.processing().values() for key in keys}
        for future in [future for future in self._running if future.key not in at]:
            del self._running[future]
        yield from self._until(time.monotonic() + seconds)

    def close(self) -> None:
        """As :meth:`Pool.close`; what still runs is killed, and the workers stay."""
        if self._client is not None:
            self._running.clear()
            with suppress(OSError, TimeoutError, ValueError):  # it is gone, or never came
                self._client.unregister_worker_plugin(self._place)
            self._client.close()
        self._source.close()


def _died(killed: KilledWorker) -> str:
    return f"the worker died {killed.allowed_failures + 1} times"
