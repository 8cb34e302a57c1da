"""NVIDIA's bindings as they are where there is no GPU, and with a runtime that stands in for one.

The stand-in keeps handles and refuses those that it did not give; it takes as many arguments as
the real functions do, which their own docstrings say.
"""

import ctypes
import gc
import re

import numpy as np
import pytest

from qsm_deploy.kernels.errors import EngineError, MemoryLimitError
from qsm_deploy.runtime.gpu.device import DeviceProperties, holding

cudart = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
OK = cudart.cudaError_t.cudaSuccess
BAD_HANDLE = cudart.cudaError_t.cudaErrorInvalidResourceHandle
NO_MEMORY = cudart.cudaError_t.cudaErrorMemoryAllocation
CAPACITY = 1 << 20
STATED = {
    name: str(getattr(cudart, name).__doc__).splitlines()[0]
    for name in dir(cudart)
    if callable(getattr(cudart, name)) and getattr(cudart, name).__doc__
}


class Properties:
    name, major, minor = b"Stand-in\0\0", 9, 0


class StandIn:
    """CUDA's runtime over host memory; everything is done at once."""

    def __init__(self):
        self.memory, self.pinned, self.handles, self.next = {}, {}, {}, 100
        self.capturing, self.failing = None, {}

    def call(self, name, *arguments):
        stated = STATED[name]
        inside = re.search(r"\((.*)\)", stated)[1]
        expected = len([a for a in inside.split(",") if a.strip()])
        assert len(arguments) == expected, f"{stated}: got {len(arguments)} arguments"
        if error := self.failing.get(name):
            return (error, None)
        return getattr(self, name)(*arguments)

    def handle(self, kind):
        self.next += 1
        self.handles[self.next] = kind
        return OK, self.next

    def drop(self, handle, kind):
        return (OK,) if self.handles.pop(handle, None) == kind else (BAD_HANDLE,)

    def known(self, *pairs):
        return all(self.handles.get(handle) == kind for handle, kind in pairs)

    count = 1

    def cudaGetDeviceCount(self):
        return OK, self.count

    def cudaSetDevice(self, number):
        return (OK,)

    def cudaGetDeviceProperties(self, number):
        return OK, Properties

    def cudaMemGetInfo(self):
        return OK, CAPACITY - sum(len(m) for m in self.memory.values()), CAPACITY

    def _new(self, where, size):
        store = ctypes.create_string_buffer(size)
        where[ctypes.addressof(store)] = store
        return OK, ctypes.addressof(store)

    def cudaMalloc(self, size):
        if size > self.cudaMemGetInfo()[1]:
            return NO_MEMORY, None
        return self._new(self.memory, size)

    def cudaFree(self, pointer):
        return (OK,) if self.memory.pop(pointer, None) is not None else (BAD_HANDLE,)

    def cudaHostAlloc(self, size, flags):
        return self._new(self.pinned, size)

    def cudaFreeHost(self, pointer):
        del self.pinned[pointer]
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == cudart.cudaStreamNonBlocking
        return self.handle("stream")

    def cudaStreamDestroy(self, stream):
        return self.drop(stream, "stream")

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        kinds = cudart.cudaMemcpyKind
        device, host = (to, source) if kind == kinds.cudaMemcpyHostToDevice else (source, to)
        assert device in self.memory
        assert host in self.pinned
        ctypes.memmove(to, source, size)
        return (OK if self.known((stream, "stream")) else BAD_HANDLE,)

    def cudaMemsetAsync(self, pointer, value, size, stream):
        assert self.known((stream, "stream"))
        ctypes.memset(pointer, value, size)
        return (OK,)

    def cudaEventCreateWithFlags(self, flags):
        assert flags == 0, "an event without time"
        return self.handle("event")

    def cudaEventRecord(self, event, stream):
        return (OK if self.known((event, "event"), (stream, "stream")) else BAD_HANDLE,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        return (OK if self.known((event, "event"), (stream, "stream")) else BAD_HANDLE,)

    def cudaEventSynchronize(self, event):
        return (OK if self.known((event, "event")) else BAD_HANDLE,)

    def cudaEventElapsedTime(self, first, second):
        known = self.known((first, "event"), (second, "event"))
        return (OK, 1500.0) if known else (BAD_HANDLE, None)

    def cudaEventDestroy(self, event):
        return self.drop(event, "event")

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing = stream
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        assert self.capturing == stream
        self.capturing = None
        return self.handle("graph")

    def cudaGraphInstantiate(self, graph, flags):
        return self.handle("executable") if self.known((graph, "graph")) else (BAD_HANDLE, None)

    def cudaGraphDestroy(self, graph):
        return self.drop(graph, "graph")

    def cudaGraphLaunch(self, graph, stream):
        return (OK if self.known((graph, "executable"), (stream, "stream")) else BAD_HANDLE,)

    def cudaGraphExecDestroy(self, graph):
        return self.drop(graph, "executable")

    def cudaDeviceSynchronize(self):
        return (OK,)


@pytest.fixture
def runtime(monkeypatch):
    """Let the stand-in answer for NVIDIA's runtime; its enumerations stay."""
    stand_in = StandIn()
    for name in [n for n in dir(StandIn) if n.startswith("cuda")]:
        monkeypatch.setattr(cudart, name, lambda *a, _n=name: stand_in.call(_n, *a))
    return stand_in


@pytest.fixture
def device(runtime):
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice

    return CudaDevice(0)


def test_without_a_driver_there_is_no_gpu():
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice

    if cudart.cudaGetDeviceCount()[0] == OK:
        pytest.skip("no GPU is what this is about, and there is one")
    with pytest.raises(EngineError, match=r"GPU 0: this machine has no NVIDIA driver") as caught:
        CudaDevice(0)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_it_says_what_it_is(device):
    assert device.properties == DeviceProperties(0, "Stand-in", (9, 0))
    assert (str(device.properties), device.name) == ("sm_90 Stand-in", "Stand-in")
    assert DeviceProperties(1, "Stand-in", (12, 0)).architecture == "sm_120"
    assert device.free_bytes() == CAPACITY


@pytest.mark.parametrize(("count", "there"), [(1, "GPU 0 to 0"), (2, "GPU 0 to 1"), (0, "none")])
@pytest.mark.parametrize("number", [-1, 4])
def test_a_gpu_of_another_number(runtime, count, there, number):
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice

    runtime.count = count
    with pytest.raises(EngineError, match=f"no GPU {number}; this machine has {there}"):
        CudaDevice(number)


def test_streams_are_ordered_and_nothing_is_left(device, runtime):
    with holding(device) as held:
        first, then = held.stream(), held.stream()
        device.order(first, then)
        assert list(runtime.handles.values()) == ["stream", "stream"]


def test_data_go_there_and_back(device):
    source = device.pinned((3, 4), np.float32)
    source[...] = np.arange(12).reshape(3, 4)
    target = device.pinned((3, 4), np.float32)
    with holding(device) as held:
        stream, pointer = held.stream(), held.buffer(source.nbytes)
        device.copy_in(pointer, source, stream)
        device.copy_out(target, pointer, stream)
        event = held.event(stream)
        device.finish(event)
        np.testing.assert_array_equal(target, source)
        device.zero(pointer, source.nbytes, stream)
        device.copy_out(target, pointer, stream)
        assert not target.any()


def test_everything_is_given_back(device, runtime):
    with holding(device) as held:
        stream = held.stream()
        first, last = held.event(stream), held.event(stream)
        device.wait(stream, first)
        assert device.seconds_between(first, last) == 1.5
        held.buffer(1000)
        graph = held.graph(stream, lambda: None)
        device.launch(graph, stream)
        assert sorted(runtime.handles.values()) == ["event", "event", "executable", "stream"]
    assert not runtime.handles
    assert not runtime.memory


def test_pinned_memory_lives_as_long_as_a_view_of_it(device, runtime):
    view = device.pinned((8, 8), np.float32)[2:, ::2]
    gc.collect()
    assert len(runtime.pinned) == 1
    view[...] = 1
    del view
    gc.collect()
    assert not runtime.pinned


def test_memory_that_is_not_there(device, runtime):
    with pytest.raises(MemoryLimitError, match=r"cannot allocate 2097152 bytes: out of memory"):
        device.allocate(2 * CAPACITY)


def test_a_capture_that_fails_is_ended(device, runtime):
    def fail():
        raise EngineError("the engine refuses")

    with holding(device) as held:
        stream = held.stream()
        with pytest.raises(EngineError, match="refuses"):
            held.graph(stream, fail)
        assert runtime.capturing is None
        assert list(runtime.handles.values()) == ["stream"]


def test_nothing_is_collected_during_a_capture(device, runtime):
    seen = []

    def enqueue():
        cycle = [device.pinned((4,), np.float32)]
        cycle.append(cycle)
        del cycle
        junk = [[] for _ in range(10 * gc.get_threshold()[0])]  # would collect it
        seen.append((len(runtime.pinned), len(junk) > 0))

    with holding(device) as held:
        held.graph(held.stream(), enqueue)
    assert seen == [(1, True)]
    assert gc.isenabled()
    gc.collect()
    assert not runtime.pinned


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("cudaEventSynchronize", lambda d, s: d.finish(d.record(s))),
        ("cudaDeviceSynchronize", lambda d, s: d.synchronize()),
        ("cudaMemsetAsync", lambda d, s: d.zero(d.allocate(4), 4, s)),
        ("cudaGraphInstantiate", lambda d, s: d.capture(s, lambda: None)),
        ("cudaStreamWaitEvent", lambda d, s: d.wait(s, d.record(s))),
        ("cudaHostAlloc", lambda d, s: d.pinned((4,), np.float32)),
    ],
)
def test_every_status_is_looked_at(device, runtime, name, use):
    stream = device.open_stream()
    runtime.failing[name] = cudart.cudaError_t.cudaErrorLaunchFailure
    with pytest.raises(EngineError, match=r"\(CUDA error 719\)"):
        use(device, stream)
