"""Where the recordings of a cohort are reconstructed; the simplest place is this process."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.outcomes import Outcome
from qsm_deploy.runtime.cohort.reconstructing import CohortReconstructor, Facts
from qsm_deploy.runtime.console.terminal import TerminalLog

FINISHING = "interrupted: what runs has {:.0f} s to end; once more ends it at once"


class Pool(Protocol):
    """One process or many, here or elsewhere."""

    @property
    def workers(self) -> int:
        """How many recordings are reconstructed at once."""

    def open(self, cohort: Cohort, log: TerminalLog) -> Facts:
        """Open what makes the maps, and return what they have alike.

        Raises
        ------
        QsmDeployError
            As :class:`CohortReconstructor`, or if there is no place to work in.
        """

    def outcomes(self, recordings: Sequence[Recording], *, wait: bool) -> Iterator[Outcome]:
        """Reconstruct recordings and yield what became of each, in the order in which they end.

        Without ``wait`` one that another process is at is left to it, and yielded as ``taken``.
        """

    def finish(self, seconds: float) -> Iterator[Outcome]:
        """Begin nothing more, and yield what still ends within so many seconds."""

    def close(self) -> None:
        """End all that was opened."""


class ThisProcess:
    """A pool of this process alone."""

    workers = 1

    def open(self, cohort: Cohort, log: TerminalLog) -> Facts:
        """As :meth:`Pool.open`."""
        self._reconstructor = CohortReconstructor(cohort, log)
        return self._reconstructor.facts

    def outcomes(self, recordings: Sequence[Recording], *, wait: bool) -> Iterator[Outcome]:
        """As :meth:`Pool.outcomes`."""
        for recording in recordings:
            yield self._reconstructor.outcome(recording, wait=wait)

    def finish(self, seconds: float) -> Iterator[Outcome]:
        """As :meth:`Pool.finish`: what was interrupted here is gone."""
        yield from ()

    def close(self) -> None:
        """As :meth:`Pool.close`."""
