"""A pool of child processes on this computer: ``--cluster local:N``."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.threads import workers as cores
from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.outcomes import Outcome
from qsm_deploy.runtime.cohort.pool import FINISHING
from qsm_deploy.runtime.cohort.reconstructing import Facts
from qsm_deploy.runtime.cohort.worker import Worker
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.reconstruction.memory import available_bytes


class Children:
    """So many processes at once, with an equal share of cores and free memory each.

    Parameters
    ----------
    count
        How many.
    """

    def __init__(self, count: int) -> None:
        self.workers = count
        self._stopping = threading.Event()
        self._running = 0
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        self._ended: queue.Queue[Outcome | BaseException | None] = queue.Queue()

    def open(self, cohort: Cohort, log: TerminalLog) -> Facts:
        """As :meth:`Pool.open`."""
        if cohort.on_gpu and self.workers > 1 and cohort.wants.memory_limit is None:
            raise UsageError(
                f"--cluster local:{self.workers}: each process would plan with all of the GPU's "
                "memory; pass the --memory-limit of one, or local:1"
            )
        threads, memory = max(1, cores() // self.workers), int(available_bytes()) // self.workers
        cohort = cohort.sharing(threads, memory)
        self._log = log
        self._workers = [Worker(cohort, quiet=log.quiet) for _ in range(self.workers)]
        for worker in self._workers:
            worker.start()
        facts, *_ = [worker.open() for worker in self._workers]
        return facts

    def outcomes(self, recordings: Sequence[Recording], *, wait: bool) -> Iterator[Outcome]:
        """As :meth:`Pool.outcomes`."""
        waiting: queue.SimpleQueue[Recording] = queue.SimpleQueue()
        for recording in recordings:
            waiting.put(recording)
        self._running = min(self.workers, len(recordings))
        self._threads = [
            threading.Thread(target=self._work, args=(worker, waiting, wait), daemon=True)
            for worker in self._workers[: self._running]
        ]
        for thread in self._threads:
            thread.start()
        yield from self._until(None)

    def _work(self, worker: Worker, waiting: "queue.SimpleQueue[Recording]", wait: bool) -> None:
        """Take recordings until there are no more."""
        try:
            while not self._stopping.is_set():
                self._ended.put(worker.outcome(waiting.get_nowait(), wait=wait))
        except queue.Empty:
            pass
        except BaseException as fault:  # ours, and raised where it is seen
            self._ended.put(fault)
        finally:
            self._ended.put(None)

    def _until(self, end: float | None) -> Iterator[Outcome]:
        """Yield what ends, until nothing runs any more or the time is over."""
        while self._running:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                ended = self._ended.get(timeout=left)
            except queue.Empty:
                return
            if ended is None:
                self._running -= 1
            elif isinstance(ended, BaseException):
                raise ended
            else:
                yield ended

    def finish(self, seconds: float) -> Iterator[Outcome]:
        """As :meth:`Pool.finish`."""
        self._stopping.set()
        if self._running:
            self._log.tell(FINISHING.format(seconds))
        yield from self._until(time.monotonic() + seconds)

    def close(self) -> None:
        """As :meth:`Pool.close`; what still runs is killed."""
        self._stopping.set()
        for worker in self._workers:
            if self._running:
                worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()
