"""A GPU through CUDA's runtime, in NVIDIA's own bindings."""

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from qsm_deploy.kernels.errors import EngineError, MemoryLimitError, MissingDependencyError
from qsm_deploy.runtime.gpu.device import Array, DeviceProperties

try:
    from cuda.bindings import runtime as cudart
except ImportError as error:
    raise MissingDependencyError("cuda-bindings", "cuda", "a GPU") from error

TIMING, NO_FLAGS = 0, 0


def device_properties(number: int) -> DeviceProperties:
    """Return what a GPU is.

    Raises
    ------
    EngineError
        If there is no driver, no GPU, or none of that number.
    """
    (count,) = _checked(cudart.cudaGetDeviceCount(), f"GPU {number}")
    if not 0 <= number < count:
        there = f"GPU 0 to {count - 1}" if count else "none"
        raise EngineError(f"there is no GPU {number}; this machine has {there}")
    (seen,) = _checked(cudart.cudaGetDeviceProperties(number), f"cannot ask GPU {number}")
    name = bytes(seen.name).split(b"\0")[0].decode(errors="replace")
    (driver,) = _checked(cudart.cudaDriverGetVersion(), "cannot ask the driver")
    return DeviceProperties(number, name, (int(seen.major), int(seen.minor)), int(driver))


class CudaDevice:
    """One GPU; see :class:`qsm_deploy.runtime.gpu.device.Device`.

    It becomes the calling thread's current GPU, and all calls must come from that thread.

    Raises
    ------
    EngineError
        As :func:`device_properties`.
    """

    def __init__(self, number: int = 0) -> None:
        self.properties = device_properties(number)
        _checked(cudart.cudaSetDevice(number), f"cannot use GPU {number}")
        self.number, self.name = number, self.properties.name

    def free_bytes(self) -> int:
        """Return the memory that is free now."""
        free, _ = _checked(cudart.cudaMemGetInfo(), "cannot ask for the free memory")
        return int(free)

    def allocate(self, size: int) -> int:
        """Return a pointer to ``size`` bytes, aligned to 256."""
        (pointer,) = _checked(cudart.cudaMalloc(max(size, 1)), f"cannot allocate {size} bytes")
        return int(pointer)

    def release(self, pointer: int) -> None:
        """Free what was allocated."""
        _checked(cudart.cudaFree(pointer), "cannot free memory")

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return an array in page-locked host memory, which it frees with itself."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        (pointer,) = _checked(
            cudart.cudaHostAlloc(max(size, 1), NO_FLAGS), f"cannot lock {size} bytes of memory"
        )
        address = int(pointer)
        memory = (ctypes.c_byte * size).from_address(address)
        weakref.finalize(memory, cudart.cudaFreeHost, address)
        array: Array = np.ndarray(shape, dtype, buffer=memoryview(memory))
        return array

    def open_stream(self) -> int:
        """Return a stream."""
        flags = cudart.cudaStreamNonBlocking
        (stream,) = _checked(cudart.cudaStreamCreateWithFlags(flags), "cannot open a stream")
        return int(stream)

    def close_stream(self, stream: int) -> None:
        """Close it, once its work is done."""
        _checked(cudart.cudaStreamDestroy(stream), "cannot close a stream")

    def copy_in(self, pointer: int, source: Array, stream: int) -> None:
        """Enqueue a copy to the GPU."""
        _require_contiguous(source)
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(pointer, source.ctypes.data, source.nbytes, kind, stream)

    def copy_out(self, target: Array, pointer: int, stream: int) -> None:
        """Enqueue a copy from the GPU."""
        _require_contiguous(target)
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(target.ctypes.data, pointer, target.nbytes, kind, stream)

    @staticmethod
    def _copy(to: int, source: int, size: int, kind: Any, stream: int) -> None:
        _checked(cudart.cudaMemcpyAsync(to, source, size, kind, stream), "cannot copy")

    def zero(self, pointer: int, size: int, stream: int) -> None:
        """Enqueue zero bytes."""
        _checked(cudart.cudaMemsetAsync(pointer, 0, size, stream), "cannot clear memory")

    def record(self, stream: int) -> int:
        """Return an event that happens when the stream's work so far is done."""
        (event,) = _checked(cudart.cudaEventCreateWithFlags(TIMING), "cannot make an event")
        _checked(cudart.cudaEventRecord(event, stream), "cannot record an event")
        return int(event)

    def wait(self, stream: int, event: int) -> None:
        """Let what is enqueued from now on wait for an event."""
        _checked(cudart.cudaStreamWaitEvent(stream, event, NO_FLAGS), "cannot wait for an event")

    def order(self, first: int, then: int) -> None:
        """Let what is enqueued from now on in ``then`` wait for what is in ``first``."""
        event = self.record(first)
        self.wait(then, event)
        self.release_event(event)  # those who wait do not need it any more

    def finish(self, event: int) -> None:
        """Wait on the host until an event has happened."""
        _checked(cudart.cudaEventSynchronize(event), "the GPU failed")

    def seconds_between(self, first: int, second: int) -> float:
        """Return the time between two events that have happened."""
        (milliseconds,) = _checked(cudart.cudaEventElapsedTime(first, second), "no time")
        return float(milliseconds) / 1000

    def release_event(self, event: int) -> None:
        """Free an event."""
        _checked(cudart.cudaEventDestroy(event), "cannot free an event")

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Return a graph of what ``enqueue`` puts on a stream; nothing runs."""
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked(cudart.cudaStreamBeginCapture(stream, mode), "cannot capture a graph")
        try:
            with _nothing_collected():
                enqueue()
        except BaseException:  # the stream could not be used any more if this did not end
            _, graph = cudart.cudaStreamEndCapture(stream)
            if graph is not None:
                cudart.cudaGraphDestroy(graph)
            raise
        (graph,) = _checked(cudart.cudaStreamEndCapture(stream), "cannot capture a graph")
        made = cudart.cudaGraphInstantiate(graph, NO_FLAGS)
        _checked(cudart.cudaGraphDestroy(graph), "cannot free a graph")
        (executable,) = _checked(made, "cannot make a graph")
        return int(executable)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a graph."""
        _checked(cudart.cudaGraphLaunch(graph, stream), "cannot launch a graph")

    def release_graph(self, graph: int) -> None:
        """Free a graph."""
        _checked(cudart.cudaGraphExecDestroy(graph), "cannot free a graph")

    def synchronize(self) -> None:
        """Wait on the host until all work is done."""
        _checked(cudart.cudaDeviceSynchronize(), "the GPU failed")


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Keep Python from freeing what only cycles hold: to free the GPU's memory ends a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _checked(result: tuple[Any, ...], failure: str) -> tuple[Any, ...]:
    """Return what a call returned beside its status, if that is good."""
    status, *values = result
    if status == cudart.cudaError_t.cudaSuccess:
        return tuple(values)
    _, text = cudart.cudaGetErrorString(status)
    reason = f"{failure}: {text.decode()} (CUDA error {int(status)})"
    if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
        raise MemoryLimitError(f"{reason}; use smaller patches or free the GPU's memory")
    if status == cudart.cudaError_t.cudaErrorInsufficientDriver:
        reason = (
            f"{failure}: this machine has no NVIDIA driver, or one too old "
            f"(CUDA error {int(status)}); install it, or run where there is a GPU"
        )
    raise EngineError(reason)


def _require_contiguous(array: Array) -> None:
    assert array.flags.c_contiguous, "copies to and from the GPU need contiguous arrays"
