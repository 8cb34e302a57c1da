"""A bar while an engine is built, and an end to the build when the user asks for one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from qsm_deploy.runtime.gpu.engines.tensorrt_library import Library

if TYPE_CHECKING:
    import tensorrt


@contextmanager
def watched_build(
    library: Library, config: "tensorrt.IBuilderConfig", *, visible: bool
) -> Iterator[None]:
    """Show the phases of a build; Ctrl-C ends it at its next step.

    Libraries that report no progress are left alone.

    Parameters
    ----------
    library, config
        Those that build.
    visible
        Whether to draw the bar.

    Raises
    ------
    KeyboardInterrupt
        After the build, if the user asked for an end.
    """
    if not hasattr(library, "IProgressMonitor") or not hasattr(config, "progress_monitor"):
        yield
        return
    stop = threading.Event()
    with tqdm(unit="step", leave=False, disable=not visible) as bar, _noted_interrupt(stop):
        monitor = build_monitor(library, bar, stop)
        config.progress_monitor = monitor
        try:
            yield
        finally:
            if stop.is_set():
                raise KeyboardInterrupt


def build_monitor(library: Library, bar: "tqdm[Any]", stop: threading.Event) -> Any:
    """Return what the library tells its progress; it may do so from several threads."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.root: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.root = phase_name
                bar.reset(total=num_steps)
                bar.set_description(phase_name)
            else:
                bar.set_postfix_str(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.root:
                bar.update()
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self.root:
                bar.refresh()

    return Monitor()


@contextmanager
def _noted_interrupt(stop: threading.Event) -> Iterator[None]:
    """Note Ctrl-C instead of raising: an exception would be lost in the library's callbacks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
