"""Memory of a GPU in DLPack's capsules, as other libraries give and take it.

A capsule holds a pointer to a structure with a deleter; who takes it renames it and calls the
deleter in the end. The format is DLPack's first, which every version may still speak.
"""

import ctypes
from typing import Any

CUDA = 2  # DLDeviceType
FLOAT32 = (2, 32, 1)  # DLDataType: floating point, bits, lanes
KINDS = {FLOAT32: "f4", (1, 8, 1): "u1", (6, 8, 1): "b1"}  # as numpy calls them
FRESH, TAKEN = b"dltensor", b"used_dltensor"


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor."""


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_DESTRUCTOR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)  # of a capsule, by its address
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR]
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.restype, _rename.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)


class TakenTensor:
    """What a capsule held; its deleter is called when this is gone.

    Attributes
    ----------
    pointer, shape, strides
        Address, sizes, and elements from one to the next along each axis (``None``: contiguous).
    kind
        Numpy's name of the type (``f4``); ``None`` if it is none of those known here.
    """

    def __init__(self, capsule: Any) -> None:
        address = _pointer(id(capsule), FRESH)
        self._managed = ctypes.cast(address, ctypes.POINTER(_Managed))
        _rename(capsule, TAKEN)
        tensor = self._managed.contents.tensor
        self.pointer = int(tensor.data or 0) + int(tensor.byte_offset)
        self.shape: tuple[int, ...] = tuple(tensor.shape[: tensor.ndim])
        steps = tensor.strides[: tensor.ndim] if tensor.strides else None
        self.strides: tuple[int, ...] | None = None if steps is None else tuple(steps)
        self.kind = KINDS.get((tensor.code, tensor.bits, tensor.lanes))

    def __del__(self) -> None:
        managed = getattr(self, "_managed", None)  # none where the capsule was refused
        if managed and managed.contents.deleter:
            managed.contents.deleter(managed)


_given: dict[int, tuple[Any, ...]] = {}  # what capsules that are out need, by their address


def capsule_of(owner: Any, pointer: int, shape: tuple[int, ...], device: int) -> Any:
    """Return a capsule of contiguous float32 memory on a GPU, which keeps ``owner`` alive."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    shape_pointer = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    tensor = _Tensor(pointer, CUDA, device, len(shape), *FLOAT32, shape_pointer, None, 0)
    managed = _Managed(tensor, None, _forget)
    address = ctypes.addressof(managed)
    _given[address] = (owner, managed, sizes)
    return _new(address, FRESH, _forget_untaken)


def _deleted(managed: Any) -> None:
    _given.pop(ctypes.addressof(managed.contents), None)


def _destroyed(capsule: int) -> None:
    if _is_valid(capsule, FRESH):
        _given.pop(_pointer(capsule, FRESH), None)


_forget, _forget_untaken = _DELETER(_deleted), _DESTRUCTOR(_destroyed)
