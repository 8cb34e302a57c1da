"""The CUDA library from Python: dipole operator, patches, total variation on device pointers.

Nothing is loaded until :func:`open_cuda_library`. Pointers and streams are integers, as PyTorch's
``data_ptr()`` and ``cuda_stream``, or CuPy's, or cuda-python's; whose they are does not matter.
Run on an H100: benchmarks/results/gpu_suite.json.
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qsm_deploy.kernels.cuda_abi import (
    ABI_VERSION,
    Coefficient,
    Dipole,
    Multiplier,
    Patch,
    Status,
    TotalVariation,
    Versions,
    declare,
)
from qsm_deploy.kernels.cuda_build import BUILD_FOLDER, LIBRARY_NAME
from qsm_deploy.kernels.errors import (
    EngineError,
    GeometryError,
    MemoryLimitError,
    QsmDeployError,
    UsageError,
)
from qsm_deploy.kernels.geometry import Geometry

LIBRARY_VARIABLE = "QSM_CUDA_LIBRARY"
MultiplierName = Literal["dipole", "dipole_squared", "tkd", "tikhonov", "tikhonov_prior"]

_ERRORS: dict[Status, type[QsmDeployError]] = {
    Status.NULL_POINTER: UsageError,
    Status.BAD_SHAPE: GeometryError,
    Status.TOO_LARGE: GeometryError,
    Status.BAD_GEOMETRY: GeometryError,
    Status.BAD_MULTIPLIER: UsageError,
    Status.MISALIGNED: UsageError,
    Status.OVERLAP: UsageError,
    Status.SMALL_WORKSPACE: UsageError,
    Status.WRONG_MEMORY: UsageError,
    Status.OUT_OF_MEMORY: MemoryLimitError,
}  # every other one is an EngineError


@dataclass(frozen=True)
class DipoleOperator:
    """``y = F^-1 [E(k) F x]`` on a batch of volumes, as in :mod:`qsm_deploy.kernels.dipole`.

    ``threshold`` in (0, 2/3] is TKD's, ``lam`` > 0 Tikhonov's.
    """

    geometry: Geometry
    multiplier: MultiplierName = "dipole"
    batch: int = 1
    threshold: float = 0.12
    lam: float = 0.01

    def _as_struct(self) -> Dipole:
        if self.multiplier not in get_args(MultiplierName):
            raise UsageError(
                f"unknown multiplier {self.multiplier!r}; one of {get_args(MultiplierName)}"
            )
        return Dipole(
            _int32("batch", self.batch),
            _three_int32("shape", self.geometry.shape),
            (ctypes.c_double * 3)(*self.geometry.voxel_size_mm),
            (ctypes.c_double * 3)(*self.geometry.b0_direction),
            Multiplier[self.multiplier.upper()],
            self.threshold,
            self.lam,
        )


@dataclass(frozen=True)
class PatchBox:
    """A patch of a (channels, x, y, z) volume: ``start`` is its first voxel, maybe outside."""

    volume: Sequence[int]
    start: Sequence[int]
    size: Sequence[int]
    channels: int = 1

    def _as_struct(self) -> Patch:
        return Patch(
            _int32("channels", self.channels),
            _three_int32("volume", self.volume),
            _three_int32("start", self.start),
            _three_int32("size", self.size),
        )


@dataclass(frozen=True)
class VariationBuffers:
    """Total variation on a grid: its weights, and pointers to the volumes that it needs.

    Attributes
    ----------
    geometry
        The grid.
    alpha, mu1, mu3
        Weight of the gradient [ppm mm], penalties of the splits of gradient and support.
    field, mask, support
        Field [ppm], where it was measured, where sources may be (uint8).
    x, q2, b, s3
        The map [ppm], its field, the right-hand side, the dual of the support, 0 at first.
    """

    geometry: Geometry
    alpha: float
    mu1: float
    mu3: float
    field: int
    mask: int
    support: int
    x: int
    q2: int
    b: int
    s3: int

    def _as_struct(self) -> TotalVariation:
        return TotalVariation(
            DipoleOperator(self.geometry)._as_struct(),
            *(self.mu1, self.mu3, self.alpha),
            *(self.field, self.mask, self.support),
            *(self.x, self.q2, self.b, self.s3),
        )


@dataclass(frozen=True)
class Ratio:
    """``factor * *numerator / *denominator``, both pointers to float64 on the GPU; 0 by 0 is 0."""

    numerator: int
    denominator: int
    factor: float = 1.0


class CudaLibrary:
    """The functions of ``libqsm_cuda.so``; its header says what they do.

    All raise the error of the status: GeometryError, UsageError, MemoryLimitError, or EngineError
    where the driver, the GPU, CUDA or cuFFT is at fault. They may be called from any thread.
    """

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle

    def versions(self) -> dict[str, str]:
        """Return the versions of CUDA's runtime, of the driver's CUDA ("none") and of cuFFT."""
        seen = Versions()
        self._handle.qsm_cuda_probe(ctypes.byref(seen))
        return {
            "cuda_runtime": _cuda_version(seen.cuda_runtime),
            "cuda_driver": _cuda_version(seen.cuda_driver),
            "cufft": f"{seen.cufft // 1000}.{seen.cufft % 1000 // 100}" if seen.cufft else "none",
        }

    def require_gpu(self) -> None:
        """Raise an EngineError that says why, unless the current GPU can be used."""
        self._call("qsm_cuda_probe", None)

    def dipole_workspace_bytes(self, operator: DipoleOperator) -> int:
        """Make the plans of a shape, and return the bytes of workspace it needs."""
        needed = ctypes.c_size_t()
        self._call("qsm_cuda_dipole_workspace", operator._as_struct(), ctypes.byref(needed))
        return needed.value

    def dipole_apply(
        self,
        operator: DipoleOperator,
        x: int,
        y: int,
        workspace: int,
        workspace_bytes: int,
        stream: int = 0,
    ) -> None:
        """Enqueue the operator from ``x`` to ``y``, both (batch, x, y, z) float32."""
        self._call(
            "qsm_cuda_dipole_apply", operator._as_struct(), x, y, workspace, workspace_bytes, stream
        )

    def dipole_workspace_bound(self, operator: DipoleOperator) -> int:
        """Return bytes of workspace enough for this shape and smaller ones; needs no GPU."""
        enough = ctypes.c_size_t()
        self._call("qsm_cuda_dipole_workspace_bound", operator._as_struct(), ctypes.byref(enough))
        return enough.value

    def dipole_apply_device_geometry(
        self,
        operator: DipoleOperator,
        geometry: tuple[int, int],
        x: int,
        y: int,
        workspace: int,
        workspace_bytes: int,
        stream: int = 0,
    ) -> None:
        """Enqueue the operator with a geometry that the GPU has.

        ``geometry`` points to voxel size [mm] and B0 direction, three float32 each; of the
        operator's own only the shape counts. If it cannot be right, ``y`` is NaN.
        """
        self._call(
            "qsm_cuda_dipole_apply_device_geometry",
            operator._as_struct(),
            *geometry,
            x,
            y,
            workspace,
            workspace_bytes,
            stream,
        )

    def release_plans(self) -> None:
        """Wait for the GPU and free all FFT plans."""
        self._call("qsm_cuda_release_plans")

    def patch_gather(self, box: PatchBox, volume: int, patch: int, stream: int = 0) -> None:
        """Enqueue the copy of a patch, zero where it lies beyond the volume."""
        self._call("qsm_cuda_patch_gather", box._as_struct(), volume, patch, stream)

    def patch_accumulate(
        self,
        box: PatchBox,
        patch: int,
        windows: tuple[int, int, int],
        total: int,
        weight: int = 0,
        stream: int = 0,
    ) -> None:
        """Enqueue the sum of a windowed patch into ``total``, and of its window into ``weight``."""
        self._call(
            "qsm_cuda_patch_accumulate", box._as_struct(), patch, *windows, total, weight, stream
        )

    def patch_finish(
        self,
        box: PatchBox,
        total: int,
        output: int,
        weight: int = 0,
        mask: int = 0,
        stream: int = 0,
    ) -> None:
        """Enqueue ``output = (total / weight * mask)[box]``; 0 for none of the two."""
        self._call("qsm_cuda_patch_finish", box._as_struct(), total, weight, mask, output, stream)

    def combine(
        self, count: int, a: float | Ratio, x: int, b: float | Ratio, y: int, stream: int = 0
    ) -> None:
        """Enqueue ``y = a x + b y`` for vectors of ``count`` float32."""
        self._call("qsm_cuda_combine", count, _coefficient(a), x, _coefficient(b), y, stream)

    def dot(self, count: int, x: int, y: int, result: int, workspace: int, stream: int = 0) -> None:
        """Enqueue the sum of ``x y`` into a float64; the workspace is ``DOT_WORKSPACE_BYTES``."""
        self._call("qsm_cuda_dot", count, x, y, result, workspace, stream)

    def count_beyond(
        self, count: int, x: int, limit: float, result: int, workspace: int, stream: int = 0
    ) -> None:
        """Enqueue how many ``|x|`` exceed a limit, as :meth:`dot` enqueues a sum."""
        self._call("qsm_cuda_count_beyond", count, x, limit, result, workspace, stream)

    def tv_workspace_bytes(self, geometry: Geometry) -> int:
        """Make the plans of a grid, and return what :meth:`tv_solve` and the dipole need there."""
        needed = ctypes.c_size_t()
        grid = DipoleOperator(geometry)._as_struct()
        self._call("qsm_cuda_tv_workspace", grid, ctypes.byref(needed))
        return needed.value

    def tv_split(self, tv: VariationBuffers, s1: int, s1_next: int, stream: int = 0) -> None:
        """Enqueue the shrinkage of the gradient, and the right-hand side for the next solve.

        ``s1`` and ``s1_next`` point to (3, x, y, z) float32, and take turns.
        """
        self._call("qsm_cuda_tv_split", tv._as_struct(), s1, s1_next, stream)

    def tv_solve(
        self, tv: VariationBuffers, workspace: int, workspace_bytes: int, stream: int = 0
    ) -> None:
        """Enqueue the next map and its field from the right-hand side and the measured field."""
        self._call("qsm_cuda_tv_solve", tv._as_struct(), workspace, workspace_bytes, stream)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._handle, name)(*arguments)
        if status != Status.OK:
            message = self._handle.qsm_cuda_last_error().decode(errors="replace")
            raise _ERRORS.get(status, EngineError)(message)


def open_cuda_library(path: str | os.PathLike[str] | None = None) -> CudaLibrary:
    """Load the CUDA library; neither a GPU nor a driver is needed for that.

    Parameters
    ----------
    path
        The library; by default ``$QSM_CUDA_LIBRARY``, else where ``make cuda`` builds it.

    Raises
    ------
    EngineError
        If it is not there, cannot be loaded, or is of another version than this binding.
    """
    named = path or os.environ.get(LIBRARY_VARIABLE)
    file = Path(named) if named else BUILD_FOLDER / LIBRARY_NAME
    if not file.is_file():
        raise EngineError(
            f"no CUDA library at {file}; build it with 'make cuda', or name it in "
            f"${LIBRARY_VARIABLE}"
        )
    try:
        handle = ctypes.CDLL(str(file.resolve()))
        declare(handle)
    except OSError as error:
        raise EngineError(
            f"the CUDA library cannot be loaded ({error}); rebuild it with 'make cuda', and if "
            "cuFFT is missing: pip install nvidia-cufft"
        ) from error
    except AttributeError as error:
        raise EngineError(f"{file} is not a {LIBRARY_NAME} of this version: {error}") from error
    if (seen := handle.qsm_cuda_abi_version()) != ABI_VERSION:
        raise EngineError(
            f"{file} has version {seen} of the interface, this package needs {ABI_VERSION}; "
            "rebuild it with 'make cuda'"
        )
    return CudaLibrary(handle)


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _coefficient(value: float | Ratio) -> Coefficient:
    if isinstance(value, Ratio):
        return Coefficient(value.factor, value.numerator, value.denominator)
    return Coefficient(value, None, None)


def _int32(name: str, value: int) -> int:
    """Return a value that ctypes must not cut to 32 bits unseen."""
    if not -(2**31) <= value < 2**31:
        raise GeometryError(f"{name} does not fit 32 bits: {value}")
    return int(value)


def _three_int32(name: str, values: Sequence[int]) -> Any:
    if len(values) != 3:
        raise GeometryError(f"{name} must be three integers, got {tuple(values)}")
    return (ctypes.c_int32 * 3)(*(_int32(name, value) for value in values))
