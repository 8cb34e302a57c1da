"""How far a cohort is, and how long it will take."""

import time
from collections.abc import Callable

from qsm_deploy.runtime.cohort.outcomes import Outcome
from qsm_deploy.runtime.console.terminal import TerminalLog

EVERY_S = 5.0  # at least between two lines, where they stay


class Progress:
    """Counts recordings, and says on stderr how many are done and when all will be.

    Parameters
    ----------
    total
        How many there are.
    log
        Where it is said.
    workers
        Tells how many are at once.
    """

    def __init__(self, total: int, log: TerminalLog, workers: Callable[[], int]) -> None:
        self._total, self._log, self._workers = total, log, workers
        self._done = self._failed = self._ended = self._made = 0
        self._seconds = 0.0
        self._began = self._said = time.monotonic()

    def ended(self, outcome: Outcome) -> None:
        """Count a recording, and say how far it is, if that was not said just now."""
        if outcome.state == "failed":
            self._failed += 1
        else:
            self._done += 1
        self._ended += not outcome.again
        if outcome.state == "done" and not outcome.again:
            self._made += 1
            self._seconds += outcome.seconds
        now = time.monotonic()
        if self._log.live:
            self._log.stage(self.text(now, self._workers()))
        elif now - self._said >= EVERY_S and self._done + self._failed < self._total:
            self._said = now
            self._log.tell(self.text(now, self._workers()))

    def end(self) -> None:
        """Say what it came to, if there were several."""
        if self._total > 1 and self._done + self._failed:
            self._log.tell(self.text(time.monotonic(), workers=1))

    def text(self, now: float, workers: int) -> str:
        """Return such as ``312/1000 done, 3 failed, 41 s per recording, about 2 h left``."""
        said = [f"{self._done}/{self._total} done"]
        if self._failed:
            said.append(f"{self._failed} failed")
        if workers > 1:
            said.append(f"{workers} workers")
        if self._made:
            said.append(f"{duration_text(self._seconds / self._made)} per recording")
            if left := self._total - self._done - self._failed:
                seconds = left * (now - self._began) / self._ended
                said.append(f"about {duration_text(seconds)} left")
        return ", ".join(said)


def duration_text(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
