"""What the pipeline asks of a GPU: memory, streams, events and graphs, as integers.

One implementation speaks to CUDA; the tests have one that keeps work in queues and runs it late.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qsm_deploy.kernels.errors import EngineError

Array = NDArray[Any]
ALIGNMENT = 256  # bytes, of every buffer


@dataclass(frozen=True)
class DeviceProperties:
    """What a GPU is: its number, its maker's name for the model, its compute capability.

    ``driver`` is the newest CUDA that its driver serves, as CUDA counts.
    """

    number: int
    name: str
    capability: tuple[int, int]
    driver: int = 0

    @property
    def architecture(self) -> str:
        """Its compute capability as compilers write it, ``sm_90``."""
        return "sm_{}{}".format(*self.capability)

    def __str__(self) -> str:
        """Return architecture and model."""
        return f"{self.architecture} {self.name}"


class Device(Protocol):
    """A GPU.

    Attributes
    ----------
    number, name
        Which one, and what it calls itself.
    """

    number: int
    name: str

    def free_bytes(self) -> int:
        """Return the memory that is free now."""

    def allocate(self, size: int) -> int:
        """Return a pointer to ``size`` bytes, aligned to 256.

        Raises
        ------
        MemoryLimitError
            If that much is not free.
        """

    def release(self, pointer: int) -> None:
        """Free what was allocated."""

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return an array in page-locked host memory, which it frees with itself."""

    def open_stream(self) -> int:
        """Return a stream."""

    def close_stream(self, stream: int) -> None:
        """Close it, once its work is done."""

    def copy_in(self, pointer: int, source: Array, stream: int) -> None:
        """Enqueue a copy to the GPU; ``source`` must stay as it is until that is done."""

    def copy_out(self, target: Array, pointer: int, stream: int) -> None:
        """Enqueue a copy from the GPU."""

    def zero(self, pointer: int, size: int, stream: int) -> None:
        """Enqueue zero bytes."""

    def record(self, stream: int) -> int:
        """Return an event that happens when the stream's work so far is done."""

    def wait(self, stream: int, event: int) -> None:
        """Let what is enqueued from now on wait for an event; the host does not wait."""

    def finish(self, event: int) -> None:
        """Wait on the host until an event has happened."""

    def seconds_between(self, first: int, second: int) -> float:
        """Return the time between two events that have happened."""

    def release_event(self, event: int) -> None:
        """Free an event."""

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Return a graph of what ``enqueue`` puts on a stream; nothing runs."""

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a graph."""

    def release_graph(self, graph: int) -> None:
        """Free a graph."""

    def synchronize(self) -> None:
        """Wait on the host until all work is done."""


def send(device: Device, pointer: int, array: Array, stream: int) -> Array:
    """Enqueue a copy to the GPU; return what to keep until that is done."""
    staged = device.pinned(array.shape, array.dtype)
    np.copyto(staged, array)
    device.copy_in(pointer, staged, stream)
    return staged


class Holdings:
    """What one reconstruction holds of a GPU; all of it is given back together."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stack = ExitStack()

    def buffer(self, size: int) -> int:
        """Return a pointer to ``size`` bytes."""
        return self._held(self._device.allocate(size), self._device.release)

    def stream(self) -> int:
        """Return a stream."""
        return self._held(self._device.open_stream(), self._device.close_stream)

    def event(self, stream: int) -> int:
        """Return an event that happens when the stream's work so far is done."""
        return self._held(self._device.record(stream), self._device.release_event)

    def graph(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Return a graph of what ``enqueue`` puts on a stream."""
        return self._held(self._device.capture(stream, enqueue), self._device.release_graph)

    def give_back(self) -> None:
        """Wait for the GPU, then free everything."""
        try:
            self._device.synchronize()
        except BaseException:
            with suppress(EngineError):  # a GPU that failed refuses all that follows too
                self._stack.close()
            raise
        self._stack.close()

    def _held(self, handle: int, release: Callable[[int], None]) -> int:
        self._stack.callback(release, handle)
        return handle


@contextmanager
def holding(device: Device) -> Iterator[Holdings]:
    """Hold things of a GPU for the body of a ``with`` statement, whatever happens in it."""
    holdings = Holdings(device)
    try:
        yield holdings
    except BaseException:
        with suppress(EngineError):  # what went wrong first is what must be told
            holdings.give_back()
        raise
    holdings.give_back()
