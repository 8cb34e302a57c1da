"""The GPU that is measured: its memory, its clock, and other libraries on it."""

import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row
from qsm_deploy.kernels.cuda_build import build_cuda_library
from qsm_deploy.kernels.cuda_library import CudaLibrary, open_cuda_library
from qsm_deploy.kernels.errors import EngineError

Shape = tuple[int, int, int]
Step = Callable[[], object]
CUFFT_R2C, CUFFT_C2R = 0x2A, 0x2C


@dataclass(frozen=True)
class Scale:
    """How large and how often: heads, transforms, patches, networks, repeats."""

    head: Shape = (96, 112, 88)
    sizes: tuple[Shape, ...] = ((160, 192, 160), (256, 256, 160))
    transforms: tuple[Shape, ...] = ((128,) * 3, (160, 192, 160), (256,) * 3, (512, 512, 256))
    most_checked_voxels: int = 10**9
    patch: int = 64
    overlap: int = 32
    profile: str = "16,160,256"
    compared: tuple[str, ...] = ("tv-unet", "ir2qsm demo")
    network: dict[str, Any] = field(default_factory=lambda: {"channels": (16, 32, 64, 128)})
    repeats: int = 7
    iterations: dict[str, int] = field(default_factory=dict)  # other than the methods' own
    training: tuple[str, ...] = (
        *("--minutes", "1", "--cases", "24", "--heads", "2", "--shapes", "1"),
        *("--size-mm", "112"),
    )
    tests: str = "gpu"  # as pytest's -k


class Watched:
    """A device that notes how little of its memory was ever free."""

    least_free = 2**63

    def allocate(self, size: int) -> int:
        """Return a pointer to ``size`` bytes."""
        pointer: int = super().allocate(size)  # type: ignore[misc]
        self._look()
        return pointer

    def synchronize(self) -> None:
        """Wait on the host; what the libraries took for themselves they keep until then."""
        super().synchronize()  # type: ignore[misc]
        self._look()

    def _look(self) -> None:
        self.least_free = min(self.least_free, self.free_bytes())  # type: ignore[attr-defined]


class Machine:
    """The first GPU, through CUDA; exits where there is none."""

    pretended = False
    scale = Scale()
    torch_device, half, compiler = "cuda", torch.float16, "inductor"

    def __init__(self, folder: Path) -> None:
        if not torch.cuda.is_available():
            build = "sees none" if torch.version.cuda else "is a CPU build"
            raise SystemExit(f"no GPU: this PyTorch {build}; nothing was measured")
        from qsm_deploy.runtime.gpu.cuda_device import CudaDevice

        self.folder = folder
        self.device: Any = type("WatchedDevice", (Watched, CudaDevice), {})(0)
        self._stream = torch.cuda.Stream()

    @functools.cached_property
    def library_path(self) -> Path:
        """The kernels, built for this GPU only."""
        capability = "{}{}-real".format(*torch.cuda.get_device_capability())
        return build_cuda_library(self.folder, capability, jobs=os.cpu_count() or 2)

    @functools.cached_property
    def library(self) -> CudaLibrary:
        """The kernels, which are seen to run here."""
        library = open_cuda_library(self.library_path)
        library.require_gpu()
        return library

    def facts(self) -> Row:
        """Return what the GPU is."""
        seen = torch.cuda.get_device_properties(0)
        return {
            "gpu": seen.name,
            "gpu_memory_gib": round(seen.total_memory / 2**30, 1),
            "compute_capability": f"{seen.major}.{seen.minor}",
            "torch_cuda": torch.version.cuda,
        }

    def tensor(self, pointer: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Return float32 memory of the GPU as PyTorch has it."""
        return torch.as_tensor(_Memory(pointer, shape), device=self.torch_device)

    def run_torch(self, stream: int, task: Callable[[], object]) -> None:
        """Enqueue PyTorch's work after that of a stream, and before what it does next.

        PyTorch keeps what it freed for the stream that it was for: one is used throughout.
        """
        caller = torch.cuda.ExternalStream(stream)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            task()
        caller.wait_stream(self._stream)

    def torch_peak_bytes(self, step: Step) -> int:
        """Return the most that PyTorch held during a step."""
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()

    def milliseconds(self, step: Step) -> float:
        """Return the time between two events around a step on the default stream."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        step()
        events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1]))

    def bare_pair(self, x: torch.Tensor) -> Step:
        """Return a call of cuFFT alone on the last three axes, forward and inverse."""
        cufft = ctypes.CDLL(f"libcufft.so.{int((torch.version.cuda or '0').split('.')[0]) - 1}")
        shape = x.shape[-3:]
        handles = ctypes.c_int(), ctypes.c_int()
        for handle, kind in zip(handles, (CUFFT_R2C, CUFFT_C2R), strict=True):
            _require(cufft.cufftPlan3d(ctypes.byref(handle), *shape, kind))
        half = (*shape[:2], shape[2] // 2 + 1)
        spectrum = torch.empty(half, dtype=torch.complex64, device=x.device)
        output = torch.empty_like(x)
        source, middle, y = (ctypes.c_void_p(t.data_ptr()) for t in (x, spectrum, output))

        def run(_keep: object = (x, spectrum, output)) -> None:
            _require(cufft.cufftExecR2C(handles[0], source, middle))
            _require(cufft.cufftExecC2R(handles[1], middle, y))

        return run

    def cupy(self) -> Any:
        """Return CuPy, or ``None``."""
        try:
            return importlib.import_module("cupy")
        except ImportError:
            return None

    @contextmanager
    def lent(self, other: str, *arrays: Any) -> Iterator[tuple[list[Any], Callable[[Any], Any]]]:
        """Lend arrays of another library on a side stream of it, and what reads a map there."""
        if other == "torch":
            with torch.cuda.stream(torch.cuda.Stream()):
                taken = [torch.from_numpy(array).cuda() for array in arrays]
                yield taken, lambda chi: torch.from_dlpack(chi).cpu().numpy()
        else:
            cupy = importlib.import_module(other)
            with cupy.cuda.Stream(non_blocking=True):
                taken = [cupy.asarray(array) for array in arrays]
                yield taken, lambda chi: cupy.asnumpy(cupy.asarray(chi))


@dataclass
class _Memory:
    """A pointer that PyTorch takes for an array."""

    pointer: int
    shape: tuple[int, ...]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self.pointer, False)
        return {"shape": self.shape, "typestr": "<f4", "data": data, "version": 2, "strides": None}


def _require(result: int) -> None:
    if result:
        raise EngineError(f"cuFFT error {result}")
