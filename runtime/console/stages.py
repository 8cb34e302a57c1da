"""Wall time and peak memory of the named stages of one run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qsm_deploy.runtime.console.peak_memory import (
    peak_rss_bytes,
    reset_peak,
    return_freed_memory,
    rss_bytes,
)


@dataclass
class Stages:
    """What each stage took.

    Attributes
    ----------
    seconds
        Wall time of every stage, in order.
    peak_bytes
        Peak resident memory during every stage, above that at the creation of this object.
    announce
        Called with a stage's name as it begins.
    """

    announce: Callable[[str], None] = lambda name: None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    baseline_bytes: int = field(default_factory=rss_bytes)

    def add(self, name: str, seconds: float) -> None:
        """Count time that something else measured."""
        self.seconds[name] = self.seconds.get(name, 0) + seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the body of a ``with`` statement as the stage ``name``, or as more of it."""
        self.announce(name)
        return_freed_memory()  # or what one stage freed would count as the next one's
        reset_peak()
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)
        rise = peak_rss_bytes() - self.baseline_bytes
        self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), rise)
