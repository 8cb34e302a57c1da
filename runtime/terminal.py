"""What a user sees on stderr while a run goes on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class TerminalLog:
    """Progress and warnings on stderr; stages and bars only on a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._live = sys.stderr.isatty() and not quiet

    def warn(self, text: str) -> None:
        """Print a line that the user must see."""
        self.stage("")
        print(f"note: {text}", file=sys.stderr)

    def stage(self, name: str) -> None:
        """Show the running stage in place of the one before."""
        if self._live:
            sys.stderr.write(f"\r\033[K{name}{' ...' * bool(name)}")
            sys.stderr.flush()

    @contextmanager
    def progress(self, total: int) -> Iterator["tqdm[Any]"]:
        """Show a bar over the patches, if there are several."""
        with tqdm(
            total=total, unit="patch", leave=False, disable=not self._live or total == 1
        ) as bar:
            yield bar
