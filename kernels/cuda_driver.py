"""The NVIDIA driver from Python: which GPUs there are, and order between streams.

Needs no CUDA toolkit, only the driver's own library. Streams, events and contexts are integers.
"""

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

from qsm_deploy.kernels.errors import EngineError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
STREAM_NON_BLOCKING = 1
EVENT_DISABLE_TIMING = 2
NAME_LENGTH = 256
# the functions that are called and what they take
SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDeviceTotalMem_v2": [POINTER(c_size_t), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
}


@dataclass(frozen=True)
class Gpu:
    """A GPU: its number, its maker's name for the model, compute capability and memory."""

    number: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def architecture(self) -> str:
        """Its compute capability as compilers write it, ``sm_90``."""
        return "sm_{}{}".format(*self.capability)

    def __str__(self) -> str:
        """Return architecture and model."""
        return f"{self.architecture} {self.name}"


class CudaDriver:
    """The driver's functions; all raise an EngineError that says what the driver says."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle
        for name, takes in SIGNATURES.items():
            getattr(handle, name).argtypes = takes
        self._call("cuInit", 0)

    @property
    def version(self) -> str:
        """The CUDA version that the driver serves, such as ``13.0``."""
        number = self._int("cuDriverGetVersion")
        return f"{number // 1000}.{number % 1000 // 10}"

    def gpu(self, number: int) -> Gpu:
        """Return what a GPU is.

        Raises
        ------
        EngineError
            If there is none of this number.
        """
        count = self._int("cuDeviceGetCount")
        if not 0 <= number < count:
            numbers = "none" if count == 0 else "0" if count == 1 else f"0 to {count - 1}"
            raise EngineError(f"there is no GPU {number}; this machine has {numbers}")
        device = self._int("cuDeviceGet", number)
        name = ctypes.create_string_buffer(NAME_LENGTH)
        self._call("cuDeviceGetName", name, NAME_LENGTH, device)
        major, minor = (
            self._int("cuDeviceGetAttribute", which, device)
            for which in (CAPABILITY_MAJOR, CAPABILITY_MINOR)
        )
        memory = c_size_t()
        self._call("cuDeviceTotalMem_v2", byref(memory), device)
        return Gpu(number, name.value.decode(errors="replace"), (major, minor), memory.value)

    def make_current(self, number: int) -> None:
        """Make a GPU this thread's current one, as ``cudaSetDevice`` does."""
        context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._int("cuDeviceGet", number))
        self._call("cuCtxSetCurrent", context)

    def create_stream(self) -> int:
        """Return a new stream of the current GPU, which waits for no other."""
        return self._handle_of("cuStreamCreate", STREAM_NON_BLOCKING)

    def create_event(self) -> int:
        """Return a new event of the current GPU."""
        return self._handle_of("cuEventCreate", EVENT_DISABLE_TIMING)

    def order(self, first: int, then: int, event: int) -> None:
        """Let what is enqueued from now on in ``then`` wait for what is in ``first``."""
        self._call("cuEventRecord", event, first)
        self._call("cuStreamWaitEvent", then, event, 0)

    def destroy(self, stream: int, *events: int) -> None:
        """Wait for a stream, and free it and events."""
        self._call("cuStreamSynchronize", stream)
        self._call("cuStreamDestroy_v2", stream)
        for event in events:
            self._call("cuEventDestroy_v2", event)

    def _int(self, name: str, *arguments: int) -> int:
        value = c_int()
        self._call(name, byref(value), *arguments)
        return value.value

    def _handle_of(self, name: str, flags: int) -> int:
        handle = c_void_p()
        self._call(name, byref(handle), flags)
        if not handle.value:
            raise EngineError(f"the NVIDIA driver gives no handle ({name})")
        return handle.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._handle, name)(*arguments)
        if status:
            text = c_char_p()
            self._handle.cuGetErrorString(status, byref(text))
            reason = text.value.decode(errors="replace") if text.value else f"error {status}"
            raise EngineError(f"the NVIDIA driver fails in {name}: {reason}")


def open_cuda_driver() -> CudaDriver:
    """Load the driver's library.

    Raises
    ------
    EngineError
        If it is not installed, too old, or finds no GPU.
    """
    try:
        return CudaDriver(ctypes.CDLL(LIBRARY))
    except (OSError, AttributeError) as error:
        raise EngineError(
            f"this machine has no NVIDIA driver that can be used ({error}); install it, or run "
            "where there is a GPU"
        ) from error
