"""How long work tells how far it is."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

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
    from tqdm import tqdm

    bar: Iterable[Item] = tqdm(items, desc=what, leave=False, disable=None)
    return bar
