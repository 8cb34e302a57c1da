"""A limit to how long a model is opened, and to how long it runs once.

Neither library looks at the clock. Both end a run that they are told to end once the operator that
is being computed is done; of opening they end nothing.
"""

from collections.abc import Callable
from threading import Event, Thread
from typing import TypeVar

from qsm_deploy.kernels.errors import EngineError

LONGEST_S = 3600.0
MOST_S = 1e9  # that may be said
GRACE_S = 5.0  # for what was told to end

T = TypeVar("T")

_left: list[Event] = []  # that something has ended which was left behind


class TimeLimit:
    """How long each thing may take that is done with one model [s]."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ended = Event()
        self._ended.set()

    def within(
        self, what: str, work: Callable[[], T], stop: Callable[[], object] | None = None
    ) -> T:
        """Return what work gives, if it does so in time; an interrupt stops it, too.

        Parameters
        ----------
        what
            What is done, for the message.
        work
            Does it, in a thread of its own: one that does not end is left behind.
        stop
            Tells it to end, if that can be told.

        Raises
        ------
        EngineError
            If it takes longer, or what took longer before still goes on.
        """
        if not self._ended.wait(self._seconds):
            raise EngineError(f"{what}: what did not end in time still goes on; start again")
        ended = Event()
        given: list[T] = []
        raised: list[BaseException] = []

        def run() -> None:
            try:
                given.append(work())
            except BaseException as error:
                raised.append(error)
            ended.set()

        Thread(target=run, name=what, daemon=True).start()
        self._ended, late = ended, True
        try:
            late = not ended.wait(self._seconds)
        finally:
            if late:
                _left.append(ended)
            if late and stop:
                stop()
                ended.wait(GRACE_S)
        if late:
            raise EngineError(
                f"{what} takes longer than {self._seconds:g} s, the limit; pass a larger "
                "--time-limit if it may take longer"
            )
        if raised:
            raise raised.pop()  # or it would hold itself, with all that the work had
        return given[0]


def is_left_behind() -> bool:
    """Tell whether something still goes on that did not end in time.

    An interpreter that ends in the orderly way would abort the process when it does end.
    """
    _left[:] = [ended for ended in _left if not ended.is_set()]
    return bool(_left)
