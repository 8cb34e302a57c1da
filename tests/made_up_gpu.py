"""A GPU made of host memory: what is enqueued runs late, and in any order that is allowed.

Its kernels are the CUDA library's own sources compiled for the host. Work waits in queues until
someone waits for it; then a random stream that may go on does one thing, again and again. What
relies on an order that nothing enforces comes out wrong, and memory is full of NaN before it is
written.
"""

import ctypes
import random
from collections import deque
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import numpy as np

from qsm_deploy.kernels.cuda_library import CudaLibrary
from qsm_deploy.kernels.errors import EngineError, MemoryLimitError, UnservedShapeError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.gpu.arrays import DEFAULT_STREAM
from qsm_deploy.runtime.gpu.dlpack import CUDA, capsule_of
from qsm_deploy.runtime.gpu.engines.inference import DeviceBackend

GUARD = 4096
LATE = 99  # more than what a reconstruction enqueues
NOTHING = 0xFF  # four of them are a NaN
ENQUEUED = (
    *("dipole_apply", "patch_gather", "patch_accumulate", "patch_finish"),
    *("combine", "dot", "count_beyond", "tv_split", "tv_solve"),
)


class FakeDevice:
    """Queues instead of streams, host memory instead of the GPU's."""

    number, name = 0, "a made-up GPU"

    def __init__(self, capacity: int = 1 << 30, seed: int = 0) -> None:
        self.capacity, self.random = capacity, random.Random(seed)
        self.memory: dict[int, np.ndarray] = {}
        self.streams: dict[int, deque[Any]] = {DEFAULT_STREAM: deque()}
        self.events: dict[int, bool] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.next, self.clock = 1, 0
        self.peak_bytes, self.launched, self.waits, self.most_waiting = 0, 0, 0, 0

    def held(self) -> dict[str, int]:
        names = ("memory", "streams", "events", "graphs")
        counts = {name: len(getattr(self, name)) for name in names}
        return counts | {"streams": len(self.streams) - 1}  # the default one is always there

    def used_bytes(self) -> int:
        return sum(array.nbytes - 2 * GUARD for array in self.memory.values())

    def enqueue(self, stream: int, task: Callable[[], None]) -> None:
        if self.recording is not None:
            self.recording.append(task)
        else:
            self.streams[stream].append(task)
            self.most_waiting = max(self.most_waiting, sum(map(len, self.streams.values())))

    def free_bytes(self) -> int:
        return self.capacity - self.used_bytes()

    def allocate(self, size: int) -> int:
        if size > self.free_bytes():
            raise MemoryLimitError(f"cannot allocate {size} bytes: out of memory")
        store = np.full(size + 2 * GUARD, NOTHING, np.uint8)
        pointer = (store.ctypes.data + GUARD + 255) // 256 * 256
        self.memory[pointer] = store
        self.peak_bytes = max(self.peak_bytes, self.used_bytes())
        return pointer

    def release(self, pointer: int) -> None:
        store = self.memory.pop(pointer)
        first = pointer - store.ctypes.data
        assert (store[:first] == NOTHING).all(), "written before the beginning"
        assert (store[first + store.size - 2 * GUARD :] == NOTHING).all(), "written past the end"

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.full(shape, NOTHING if np.dtype(dtype) == np.uint8 else np.nan, dtype)

    def open_stream(self) -> int:
        handle = self._handle()
        self.streams[handle] = deque()
        return handle

    def close_stream(self, stream: int) -> None:
        assert not self.streams.pop(stream), "closed with work to do"

    def copy_in(self, pointer: int, source: np.ndarray, stream: int) -> None:
        size = source.nbytes
        self.enqueue(stream, lambda: ctypes.memmove(pointer, source.ctypes.data, size) and None)

    def copy_out(self, target: np.ndarray, pointer: int, stream: int) -> None:
        size = target.nbytes
        self.enqueue(stream, lambda: ctypes.memmove(target.ctypes.data, pointer, size) and None)

    def zero(self, pointer: int, size: int, stream: int) -> None:
        self.enqueue(stream, lambda: ctypes.memset(pointer, 0, size) and None)

    def record(self, stream: int) -> int:
        handle = self._handle()
        self.events[handle] = False
        self.enqueue(stream, lambda: self.events.update({handle: True}))
        return handle

    def wait(self, stream: int, event: int) -> None:
        self.streams[stream].append(event)

    def finish(self, event: int) -> None:
        self.waits += 1
        while not self.events[event]:
            self._step()

    def seconds_between(self, first: int, second: int) -> float:
        assert self.events[first]
        assert self.events[second]
        return float(second - first)

    def release_event(self, event: int) -> None:
        del self.events[event]

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        self.recording = []
        try:
            enqueue()
            handle = self._handle()
            self.graphs[handle] = self.recording
        finally:
            self.recording = None
        return handle

    def launch(self, graph: int, stream: int) -> None:
        self.launched += 1
        self.streams[stream].extend(self.graphs[graph])

    def release_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def synchronize(self) -> None:
        while any(self.streams.values()):
            self._step()

    def _step(self) -> None:
        able = [q for q in self.streams.values() if q and (callable(q[0]) or self.events[q[0]])]
        assert able, "streams wait for each other"
        task = self.random.choice(able).popleft()
        if callable(task):
            task()

    def _handle(self) -> int:
        self.next += 1
        return self.next


class FakeLibrary:
    """The kernels, enqueued on the made-up GPU."""

    def __init__(self, twin: CudaLibrary, device: FakeDevice) -> None:
        self.twin, self.device = twin, device

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.twin, name)
        if name not in ENQUEUED:
            return function

        def enqueue(*arguments: Any, **keywords: Any) -> None:
            call = signature(function).bind(*arguments, **keywords)
            stream = call.arguments.pop("stream", 0) or DEFAULT_STREAM
            self.device.enqueue(stream, lambda: function(*call.args, **call.kwargs))

        return enqueue


class FakeSession:
    """An engine: any function of patches, run where the queue comes to it."""

    backend: DeviceBackend = "tensorrt"
    version, device, weights_bytes = "0", 0, 1 << 20
    SCRATCH = 4096

    def __init__(
        self,
        card: ModelCard,
        device: FakeDevice,
        network: Callable[[Mapping[str, np.ndarray]], np.ndarray],
        *,
        capturable: bool = True,
    ) -> None:
        self.card, self._device, self._network = card, device, network
        self.capturable = capturable
        self.fails_at: int | None = None
        self.own: int | None = 0
        self.largest = 10**9  # edge of a patch that it was built for
        self.enqueued = 0

    def output_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        sizes = shapes[self.card.inputs[0].name][2:]
        if max(sizes) > self.largest:
            raise UnservedShapeError(f"{sizes} is not served, up to {self.largest} is")
        return (1, 1, *sizes)

    def scratch_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        assert shapes.keys() == {tensor.name for tensor in self.card.inputs}
        return self.SCRATCH

    def own_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return self.own

    def open_inference(self, shapes: Mapping[str, tuple[int, ...]], scratch: int) -> Any:
        assert scratch % 256 == 0
        return FakeInference(self, shapes, scratch)

    def close(self) -> None:
        self.weights_bytes = 0


class FakeInference:
    def __init__(
        self, session: FakeSession, shapes: Mapping[str, tuple[int, ...]], scratch: int
    ) -> None:
        self.session, self.shapes, self.scratch = session, shapes, scratch

    def enqueue(self, inputs: Mapping[str, int], output: int, stream: int) -> None:
        session = self.session
        session.enqueued += 1
        if session.enqueued == session.fails_at:
            raise EngineError("the engine refuses")
        assert inputs.keys() == self.shapes.keys()
        pointers = dict(inputs)

        def run() -> None:
            ctypes.memset(self.scratch, NOTHING, session.SCRATCH)  # as activations would
            tensors = {name: at(pointers[name], self.shapes[name]) for name in pointers}
            at(output, session.output_shape(self.shapes))[...] = session._network(tensors)

        session._device.enqueue(stream, run)


def at(pointer: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    return np.frombuffer((ctypes.c_float * size).from_address(pointer), np.float32).reshape(shape)


class Array:
    """An array on the made-up GPU, written late: only once its stream's work is done."""

    def __init__(self, device, values, stream=DEFAULT_STREAM):
        self.device, self.values, self.stream = device, np.ascontiguousarray(values), stream
        self.pointer = device.allocate(self.values.nbytes)
        for _ in range(LATE):
            device.enqueue(stream, lambda: None)
        device.copy_in(self.pointer, self.values, stream)

    def free(self):
        self.device.release(self.pointer)


class CupyLike(Array):
    """Version 3 of the interface, with the stream of its work."""

    @property
    def __cuda_array_interface__(self):
        facts = {"shape": self.values.shape, "typestr": self.values.dtype.str, "version": 3}
        return facts | {"data": (self.pointer, False), "strides": None, "stream": self.stream}


class OldLike(Array):
    """Version 2 alone, strides written out, nothing of streams: the default one is meant."""

    @property
    def __cuda_array_interface__(self):
        facts = {"shape": self.values.shape, "typestr": self.values.dtype.str, "version": 2}
        return facts | {"data": (self.pointer, False), "strides": self.values.strides}


class PycudaLike(Array):
    """A GPUArray: version 3, strides written out; no stream, although it works on the default one.

    It takes memory of others as ``GPUArray(shape, dtype, gpudata=address, base=owner)``.
    """

    @property
    def __cuda_array_interface__(self):
        facts = {"shape": self.values.shape, "typestr": self.values.dtype.str, "version": 3}
        strides = self.values.strides
        return facts | {"data": (self.pointer, False), "strides": strides, "stream": None}


class JaxLike(Array):
    """DLPack; work is ordered before the stream that the consumer names."""

    number = 0

    def __dlpack_device__(self):
        return CUDA, self.number

    def __dlpack__(self, *, stream):
        assert stream == DEFAULT_STREAM
        event = self.device.record(self.stream)
        self.device.wait(stream, event)
        self.event = event
        return capsule_of(self, self.pointer, self.values.shape, 0)


class TorchLike(OldLike, JaxLike):
    """Both: the interface, which says nothing of the stream that is written on, and DLPack."""


def read(device, volume):
    """Return a volume as a consumer of the interface sees it."""
    facts = volume.__cuda_array_interface__
    assert facts["typestr"] == "<f4"
    assert facts["strides"] is None
    assert facts["stream"] is None
    values = np.empty(facts["shape"], np.float32)
    ctypes.memmove(values.ctypes.data, facts["data"][0], values.nbytes)
    return values
