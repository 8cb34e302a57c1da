"""How long work tells how far it is, and what a user sees of it on stderr."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from qsm_deploy.runtime.console.command import escaped

Item = TypeVar("Item")


class Progress(Protocol):
    """Goes through items and shows it."""

    def __call__(self, items: Sequence[Item], what: str) -> Iterable[Item]:
        """Yield the items; ``what`` says in a few words what is done with them."""


def no_progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Yield the items and show nothing."""
    return items


def bar_on_terminal(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Show a bar on stderr, if that is a terminal."""
    bar: Iterable[Item] = tqdm(items, desc=what, leave=False, disable=None)
    return bar


class TerminalLog:
    """Progress and notes on stderr, unless it is to be quiet.

    Stages and bars are for a terminal that can erase a line, and for one process that draws there.
    """

    def __init__(self, *, quiet: bool, draws: bool = True) -> None:
        self.quiet = quiet
        can_erase = os.environ.get("TERM", "dumb") != "dumb"
        self._erases = can_erase and sys.stderr.isatty() and not quiet
        self.live = self._erases and draws
        self._about = ""

    def about(self, name: str) -> None:
        """Name the one of several acquisitions that the following lines are about."""
        self._about = f"{name}: " if name else ""

    def warn(self, text: str) -> None:
        """Print a line that the user must see, even where it is to be quiet."""
        self.stage("")
        print(escaped(f"note: {self._about}{text}"), file=sys.stderr)

    def tell(self, *lines: str) -> None:
        """Print a line on how far the work is, or several."""
        for line in lines:
            self._print(f"{self._about}{line}")

    def stage(self, name: str) -> None:
        """Show the running stage in place of the one before."""
        if self.live if name else self._erases:
            shown = escaped(f"{self._about}{name} ...") if name else ""
            sys.stderr.write(f"\r\033[K{shown}")
            sys.stderr.flush()

    @contextmanager
    def progress(self, total: int) -> Iterator["tqdm[Any]"]:
        """Show a bar over the patches or iterations, if there are several."""
        with tqdm(
            total=total, unit="step", leave=False, disable=not self.live or total == 1
        ) as bar:
            yield bar

    def _print(self, line: str) -> None:
        self.stage("")
        if not self.quiet:
            print(escaped(line), file=sys.stderr)
