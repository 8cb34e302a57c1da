"""``csrc/qsm_cuda.h`` in ctypes: statuses, structures and signatures."""

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from enum import IntEnum
from typing import Any, ClassVar

ABI_VERSION = 4
DOT_WORKSPACE_BYTES = 526336


class Status(IntEnum):
    """What a call returns (``qsm_cuda_status``)."""

    OK = 0
    NULL_POINTER = 1
    BAD_SHAPE = 2
    TOO_LARGE = 3
    BAD_GEOMETRY = 4
    BAD_MULTIPLIER = 5
    MISALIGNED = 6
    OVERLAP = 7
    SMALL_WORKSPACE = 8
    WRONG_MEMORY = 9
    NO_DRIVER = 10
    NO_GPU = 11
    UNSUPPORTED_GPU = 12
    NOT_PREPARED = 13
    OUT_OF_MEMORY = 14
    CUDA_ERROR = 15
    CUFFT_ERROR = 16
    INTERNAL_ERROR = 17


class Multiplier(IntEnum):
    """What the operator does in k-space (``qsm_cuda_multiplier``)."""

    DIPOLE = 0
    DIPOLE_SQUARED = 1
    TKD = 2
    TIKHONOV = 3
    TIKHONOV_PRIOR = 4


class Dipole(ctypes.Structure):
    """The operator (``qsm_cuda_dipole``)."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("batch", c_int32),
        ("shape", c_int32 * 3),
        ("voxel_size_mm", c_double * 3),
        ("b0_direction", c_double * 3),
        ("multiplier", c_int32),
        ("tkd_threshold", c_double),
        ("tikhonov_lambda", c_double),
    ]


class Patch(ctypes.Structure):
    """A box of voxels in a volume (``qsm_cuda_patch``)."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("channels", c_int32),
        ("volume", c_int32 * 3),
        ("start", c_int32 * 3),
        ("size", c_int32 * 3),
    ]


class Coefficient(ctypes.Structure):
    """A factor, times a ratio in the GPU's memory if there is one (``qsm_cuda_coefficient``)."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("factor", c_float),
        ("numerator", c_void_p),
        ("denominator", c_void_p),
    ]


class TotalVariation(ctypes.Structure):
    """Equation and buffers of total variation (``qsm_cuda_tv``)."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("grid", Dipole),
        ("mu1", c_double),
        ("mu3", c_double),
        ("alpha", c_double),
        ("field", c_void_p),
        ("mask", c_void_p),
        ("support", c_void_p),
        ("x", c_void_p),
        ("q2", c_void_p),
        ("b", c_void_p),
        ("s3", c_void_p),
    ]


class Versions(ctypes.Structure):
    """CUDA's and cuFFT's versions (``qsm_cuda_versions``)."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("cuda_runtime", c_int32),
        ("cuda_driver", c_int32),
        ("cufft", c_int32),
    ]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "qsm_cuda_abi_version": (c_int32, []),
    "qsm_cuda_last_error": (c_char_p, []),
    "qsm_cuda_probe": (c_int, [POINTER(Versions)]),
    "qsm_cuda_dipole_default": (Dipole, []),
    "qsm_cuda_dipole_workspace": (c_int, [POINTER(Dipole), POINTER(c_size_t)]),
    "qsm_cuda_dipole_workspace_bound": (c_int, [POINTER(Dipole), POINTER(c_size_t)]),
    "qsm_cuda_dipole_apply": (
        c_int,
        [POINTER(Dipole), c_void_p, c_void_p, c_void_p, c_size_t, c_void_p],
    ),
    "qsm_cuda_dipole_apply_device_geometry": (
        c_int,
        [POINTER(Dipole), *[c_void_p] * 5, c_size_t, c_void_p],
    ),
    "qsm_cuda_release_plans": (c_int, []),
    "qsm_cuda_patch_gather": (c_int, [POINTER(Patch), c_void_p, c_void_p, c_void_p]),
    "qsm_cuda_patch_accumulate": (c_int, [POINTER(Patch), *[c_void_p] * 7]),
    "qsm_cuda_patch_finish": (c_int, [POINTER(Patch), *[c_void_p] * 5]),
    "qsm_cuda_combine": (c_int, [c_int64, Coefficient, c_void_p, Coefficient, c_void_p, c_void_p]),
    "qsm_cuda_dot": (c_int, [c_int64, *[c_void_p] * 5]),
    "qsm_cuda_count_beyond": (c_int, [c_int64, c_void_p, c_float, *[c_void_p] * 3]),
    "qsm_cuda_tv_workspace": (c_int, [POINTER(Dipole), POINTER(c_size_t)]),
    "qsm_cuda_tv_split": (c_int, [POINTER(TotalVariation), *[c_void_p] * 3]),
    "qsm_cuda_tv_solve": (c_int, [POINTER(TotalVariation), c_void_p, c_size_t, c_void_p]),
}


def declare(library: ctypes.CDLL) -> None:
    """Give the library's functions their signatures.

    Raises
    ------
    AttributeError
        If it lacks one of them.
    """
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
