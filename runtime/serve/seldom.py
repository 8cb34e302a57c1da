"""A log that whoever reaches the port cannot fill."""

import time
from collections.abc import Callable
from contextlib import suppress

QUIET_SECONDS = 60.0


class Seldom:
    """Logs a line of each kind once in a while, with the number of those left out since.

    Parameters
    ----------
    log
        Takes the line; a full disk is no reason to stop.
    """

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log = log
        self._said: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def __call__(self, kind: str, line: str) -> None:
        """Log a line, unless there was one of its kind lately."""
        now = time.monotonic()
        if now - self._said.get(kind, -QUIET_SECONDS) < QUIET_SECONDS:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._said[kind] = now
        more = self._left_out.pop(kind, 0)
        with suppress(OSError):
            self._log(f"{line} ({more} more like it before)" if more else line)
