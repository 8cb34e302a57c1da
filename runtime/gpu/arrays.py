"""Arrays that lie on a GPU, taken and given without a copy.

Two protocols: ``__cuda_array_interface__`` (CuPy, PyTorch, Numba, PyCUDA) and DLPack (PyTorch,
CuPy, JAX). Of a foreign array nothing is read but its address, shape and type.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.gpu.dlpack import CUDA, TakenTensor, capsule_of

DEFAULT_STREAM = 1  # cudaStreamLegacy; DLPack's producers order their work before it


@dataclass(frozen=True)
class DeviceView:
    """Contiguous memory of a GPU that somebody else owns.

    Attributes
    ----------
    pointer, shape, kind
        Address, sizes, and numpy's name of the type (``f4``).
    stream
        Where the owner's work on it was enqueued.
    owner
        Keeps it alive.
    """

    pointer: int
    shape: tuple[int, ...]
    kind: str
    stream: int
    owner: Any


def is_on_device(array: Any) -> bool:
    """Return whether an array lies on a GPU and says so."""
    # asked first: PyTorch's other property raises where a gradient is wanted
    if hasattr(array, "__dlpack_device__") and int(array.__dlpack_device__()[0]) == CUDA:
        return True
    return hasattr(array, "__cuda_array_interface__")


def view(name: str, array: Any, device: int) -> DeviceView:
    """Return what a foreign array is.

    Parameters
    ----------
    name
        Of the argument, for messages.
    array
        On the GPU.
    device
        The number of the GPU that it must be on, where the protocol says one.

    Raises
    ------
    DataError
        If it is on another GPU, not contiguous, of a type that is not known, or its library does
        not give it.
    """
    facts = _interface(array)
    # versions before 3 say nothing of streams, and PyTorch's work may be on any: DLPack orders it
    if facts is not None and (facts["version"] >= 3 or not hasattr(array, "__dlpack__")):
        shape, kind = tuple(facts["shape"]), str(facts["typestr"]).lstrip("<|=")
        _require_contiguous(name, shape, facts.get("strides"), int(kind[1:]))
        # PyCUDA and Numba say that there is nothing to wait for, and launch on the default stream
        stream = facts.get("stream") or DEFAULT_STREAM
        return DeviceView(int(facts["data"][0]), shape, kind, stream, array)
    _, number = array.__dlpack_device__()
    if number != device:
        raise DataError(f"{name} lies on GPU {number}, the engine on GPU {device}; copy it there")
    try:
        tensor = TakenTensor(array.__dlpack__(stream=DEFAULT_STREAM))
    except BufferError as error:
        raise DataError(f"{name} cannot be taken where it lies: {error}") from error
    if tensor.kind is None:
        raise DataError(f"{name} has a type that is not known here; pass float32")
    _require_contiguous(name, tensor.shape, tensor.strides, 1)
    return DeviceView(tensor.pointer, tensor.shape, tensor.kind, DEFAULT_STREAM, tensor)


class DeviceVolume:
    """A float32 volume on a GPU, owned here, for whoever speaks one of the protocols.

    All work on it is done when it is handed out.

    Parameters
    ----------
    pointer, shape, device
        Where it lies.
    release
        Called with the pointer when nobody uses it any more.
    """

    def __init__(
        self, pointer: int, shape: tuple[int, ...], device: int, release: Callable[[int], None]
    ) -> None:
        self._pointer, self.shape, self.device, self._release = pointer, shape, device, release

    def __del__(self) -> None:
        self._release(self._pointer)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The volume, with nothing to wait for."""
        data = {"shape": self.shape, "typestr": "<f4", "data": (self._pointer, False)}
        return data | {"version": 3, "strides": None, "stream": None}

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return CUDA and the number of the GPU."""
        return CUDA, self.device

    def __dlpack__(
        self, *, stream: int | None = None, copy: bool | None = None, **_newer: Any
    ) -> Any:
        """Return a capsule; there is nothing for ``stream`` to wait for.

        Raises
        ------
        BufferError
            If it is to be a copy.
        """
        if copy:
            raise BufferError("the map is handed out as it lies; copy what you took")
        return capsule_of(self, self._pointer, self.shape, self.device)


def _interface(array: Any) -> dict[str, Any] | None:
    """Return what ``__cuda_array_interface__`` says, ``None`` where it is missing or refuses."""
    try:
        facts: dict[str, Any] = array.__cuda_array_interface__
    except (AttributeError, RuntimeError):  # PyTorch's, where a gradient is wanted
        return None
    return facts


def _require_contiguous(name: str, shape: tuple[int, ...], strides: Any, unit: int) -> None:
    """Check that the last axis is fastest and nothing lies between; axes of one may have any."""
    step = unit
    for size, stride in reversed(list(zip(shape, strides or (), strict=False))):
        if size != 1 and stride != step:
            raise DataError(f"{name} is not contiguous with z fastest; pass a contiguous copy")
        step *= size
