"""How many threads of the CPU the transforms and what surrounds them take."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_wanted: ContextVar[int] = ContextVar("threads", default=0)


def workers() -> int:
    """Return the number of threads: as asked for here, else all cores of the process."""
    return _wanted.get() or of_task() or _cores()


def of_task() -> int:
    """Return the cores of the task of SLURM that this is, which not every SLURM binds it to.

    0 is none.
    """
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(int(own), _cores()) if own.isdecimal() else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Take so many threads in the body of a ``with`` statement; 0 takes all cores."""
    before = _wanted.set(count)
    try:
        yield
    finally:
        _wanted.reset(before)
