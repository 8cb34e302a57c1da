"""The memory that all sessions share, counted as Python holds what came."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from qsm_deploy.kernels.errors import MemoryLimitError

Hold = Callable[[int], None]


class Budget:
    """Memory of all sessions together.

    Parameters
    ----------
    limit
        Most that they may hold [bytes].

    Attributes
    ----------
    held
        What they hold now [bytes].
    """

    def __init__(self, limit: int) -> None:
        self.held, self._limit, self._lock = 0, limit, threading.Lock()

    @contextmanager
    def share(self) -> Iterator[Hold]:
        """Give a function that says how much a session holds; at the end that is nothing.

        Raises
        ------
        MemoryLimitError
            By that function, if it is more than before and all hold too much.
        """
        mine = 0

        def hold(size: int) -> None:
            nonlocal mine
            with self._lock:
                if size > mine and self.held + size - mine > self._limit:
                    raise MemoryLimitError(
                        f"all sessions together would hold more than {self._limit} bytes; try "
                        "later, send less, or raise --max-all-sessions"
                    )
                self.held += size - mine
                mine = size

        try:
            yield hold
        finally:
            hold(0)


def held_bytes(value: object) -> int:
    """Return the memory of a text, or of lists, tuples and dicts of texts."""
    inside: Iterable[object] = value if isinstance(value, list | tuple) else ()
    if isinstance(value, dict):
        inside = chain.from_iterable(value.items())
    return sys.getsizeof(value) + sum(map(held_bytes, inside))
