"""What a user sees on stderr while a run goes on."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class TerminalLog:
    """Progress and notes on stderr, unless it is to be quiet.

    Stages and bars are for a terminal that can erase a line.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        erases = os.environ.get("TERM", "dumb") != "dumb"
        self._live = erases and sys.stderr.isatty() and not quiet
        self._about = ""

    def about(self, name: str) -> None:
        """Name the one of several acquisitions that the following lines are about."""
        self._about = f"{name}: " if name else ""

    def warn(self, text: str) -> None:
        """Print a line that the user must see, even where it is to be quiet."""
        self.stage("")
        print(f"note: {self._about}{text}", file=sys.stderr)

    def tell(self, text: str) -> None:
        """Print a line on how far the work is."""
        self._print(f"{self._about}{text}")

    def stage(self, name: str) -> None:
        """Show the running stage in place of the one before."""
        if self._live:
            about = self._about if name else ""
            sys.stderr.write(f"\r\033[K{about}{name}{' ...' * bool(name)}")
            sys.stderr.flush()

    @contextmanager
    def progress(self, total: int) -> Iterator["tqdm[Any]"]:
        """Show a bar over the patches, if there are several."""
        with tqdm(
            total=total, unit="patch", leave=False, disable=not self._live or total == 1
        ) as bar:
            yield bar

    def _print(self, line: str) -> None:
        self.stage("")
        if not self._quiet:
            print(line, file=sys.stderr)
