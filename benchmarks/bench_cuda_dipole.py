"""The CUDA dipole operator: accuracy against float64 numpy, time against cuFFT, PyTorch and CuPy.

    python benchmarks/bench_cuda_dipole.py -o benchmarks/results/cuda_dipole.json

Builds the library, for the GPU at hand only. Needs a GPU, and PyTorch built for CUDA, which
brings the memory and the clock; CuPy is timed where it is installed. Without the package
installed: ``PYTHONPATH=.dev``. Run on an H100, as a part of gpu_suite.py.

The bare pair of transforms (real to complex and back, cuFFT called directly) is the floor: what
the operator takes beyond it is what the multiplication costs. PyTorch and CuPy multiply by a
stored kernel, as is usual. Contenders take turns; times are the GPU's, from events.
"""

import ctypes
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import scipy.fft
import torch
from common import parser, say, write
from numpy.typing import NDArray

from qsm_deploy.kernels.cuda_build import build_cuda_library
from qsm_deploy.kernels.cuda_library import (
    CudaLibrary,
    DipoleOperator,
    MultiplierName,
    open_cuda_library,
)
from qsm_deploy.kernels.dipole import CONE
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.kernels.geometry import Geometry

OBLIQUE = (0.3, -0.5, 0.8)
TIMED = ((128, 128, 128), (160, 192, 160), (256, 256, 256), (512, 512, 256))
CHECKED = (  # shape, voxel size [mm], B0 direction, batch
    ((7, 9, 5), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0), 1),
    ((1, 8, 5), (1.0, 1.0, 3.0), OBLIQUE, 3),
    ((31, 1, 1), (1.0, 1.0, 1.0), OBLIQUE, 1),
    ((67, 71, 73), (0.6, 0.6, 2.0), OBLIQUE, 2),
    ((64, 80, 96), (2.0, 0.6, 0.9), (-0.1, 0.9, 0.4), 2),
    ((129, 151, 127), (1.0, 1.0, 1.0), OBLIQUE, 1),
    ((128, 128, 128), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0), 1),
    ((160, 192, 160), (0.86, 0.86, 2.0), OBLIQUE, 1),
)
CUFFT_R2C, CUFFT_C2R = 0x2A, 0x2C
Array = NDArray[np.float64]
Step = Callable[[], object]


def multiplier(operator: DipoleOperator) -> Array:
    """Return E on the half spectrum in float64, voxel by voxel as its definition reads."""
    geometry = operator.geometry
    g: dict[str, Callable[[Array], Array]] = {
        "dipole": lambda d: d,
        "dipole_squared": lambda d: d**2,
        "tkd": lambda d: (
            np.where(abs(d) < CONE, 0, np.sign(d)) / np.maximum(abs(d), operator.threshold)
        ),
        "tikhonov": lambda d: d / (d**2 + operator.lam),
        "tikhonov_prior": lambda d: operator.lam / (d**2 + operator.lam),
    }
    sum_ = np.zeros((*geometry.shape[:2], geometry.shape[2] // 2 + 1))
    for sign in (1, -1):
        k = [
            np.fft.fftfreq(n, size)[sign * np.arange(n) % n]
            for n, size in zip(geometry.shape, geometry.voxel_size_mm, strict=True)
        ]
        kx, ky, kz = np.ix_(k[0], k[1], k[2][: sum_.shape[2]])
        bx, by, bz = geometry.b0_direction
        squared = kx**2 + ky**2 + kz**2
        squared[0, 0, 0] = 1
        d = 1 / 3 - (kx * bx + ky * by + kz * bz) ** 2 / squared
        d[0, 0, 0] = 0
        sum_ += g[operator.multiplier](d)
    return sum_ / 2


def reference(operator: DipoleOperator, x: NDArray[np.float32]) -> Array:
    """Return the operator's output in float64, on the CPU."""
    axes = (-3, -2, -1)
    spectra = scipy.fft.rfftn(x.astype(np.float64), axes=axes, workers=-1)
    spectra *= multiplier(operator)
    result: Array = scipy.fft.irfftn(spectra, s=x.shape[1:], axes=axes, workers=-1)
    return result


class Buffers:
    """Input, output and workspace of an operator, the last two full of NaN."""

    def __init__(self, library: CudaLibrary, operator: DipoleOperator, device: str) -> None:
        shape = (operator.batch, *operator.geometry.shape)
        generator = torch.Generator().manual_seed(sum(shape))
        self.x = torch.randn(shape, generator=generator).to(device)
        self.y = torch.full(shape, torch.nan, device=device)
        needed = library.dipole_workspace_bytes(operator)
        self.workspace = torch.full((needed + 256,), 0xFF, dtype=torch.uint8, device=device)
        start = self.workspace.data_ptr() + -self.workspace.data_ptr() % 256
        self.pointers = self.x.data_ptr(), self.y.data_ptr(), start, needed

    def errors(self, operator: DipoleOperator) -> dict[str, float]:
        """Return how far the output is from float64's."""
        expected = reference(operator, self.x.cpu().numpy())
        difference = self.y.cpu().numpy() - expected
        if not np.isfinite(difference).all():
            raise EngineError(f"{operator}: NaN or Inf in the output")
        return {
            "relative_error_to_float64": float(
                np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-30)
            ),
            "max_abs_error_to_float64": float(abs(difference).max()),
        }


def check(library: CudaLibrary, device: str) -> list[dict[str, Any]]:
    """Return a row of errors for every checked shape and multiplier."""
    rows = []
    for shape, voxel_size_mm, b0_direction, batch in CHECKED:
        for name in get_args(MultiplierName):
            geometry = Geometry(shape, voxel_size_mm, b0_direction)
            operator = DipoleOperator(geometry, name, batch)
            buffers = Buffers(library, operator, device)
            library.dipole_apply(operator, *buffers.pointers)
            errors = buffers.errors(operator)
            row = {"operator": name, "grid": str(geometry), "batch": batch, **errors}
            rows.append(say(row))
    return rows


def bare_pair(buffers: Buffers) -> Step:
    """Return a call of cuFFT alone, forward and inverse, in workspaces of its own."""
    cufft = ctypes.CDLL(f"libcufft.so.{int((torch.version.cuda or '0').split('.')[0]) - 1}")
    shape = buffers.x.shape[1:]
    handles = ctypes.c_int(), ctypes.c_int()
    for handle, kind in zip(handles, (CUFFT_R2C, CUFFT_C2R), strict=True):
        require(cufft.cufftPlan3d(ctypes.byref(handle), *shape, kind))
    half = (*shape[:2], shape[2] // 2 + 1)
    spectrum = torch.empty(half, dtype=torch.complex64, device=buffers.x.device)
    output = torch.empty_like(buffers.x)
    x, middle, y = (ctypes.c_void_p(t.data_ptr()) for t in (buffers.x, spectrum, output))

    def run(_keep: object = (spectrum, output)) -> None:
        require(cufft.cufftExecR2C(handles[0], x, middle))
        require(cufft.cufftExecC2R(handles[1], middle, y))

    return run


def require(result: int) -> None:
    """Check what cuFFT returned."""
    if result:
        raise EngineError(f"cuFFT error {result}")


def contenders(library: CudaLibrary, operator: DipoleOperator, buffers: Buffers) -> dict[str, Step]:
    """Return what to time, by name; all on the default stream."""
    x, axes, shape = buffers.x, (-3, -2, -1), operator.geometry.shape
    e = torch.from_numpy(multiplier(operator).astype(np.float32)).to(x.device)
    steps: dict[str, Step] = {
        "bare cuFFT pair": bare_pair(buffers),
        "libqsm_cuda": lambda: library.dipole_apply(operator, *buffers.pointers),
        "torch.fft": lambda: torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * e, s=shape, dim=axes),
    }
    try:
        import cupy
    except ImportError:
        return steps
    cx, ce = cupy.asarray(x), cupy.asarray(e)
    steps["CuPy"] = lambda: cupy.fft.irfftn(cupy.fft.rfftn(cx, axes=axes) * ce, s=shape, axes=axes)
    return steps


def milliseconds(step: Step) -> float:
    """Return the time between two events around a step."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    step()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1]))


def measure(library: CudaLibrary, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Return the times of all contenders at a shape, with the operator's errors and memory."""
    operator = DipoleOperator(Geometry(shape, (0.86, 0.86, 2.0), OBLIQUE), "tkd")
    torch.cuda.empty_cache()
    buffers = Buffers(library, operator, "cuda")
    steps = contenders(library, operator, buffers)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 5):
        for name, step in steps.items():
            elapsed = milliseconds(step)
            if turn >= 5:  # after those to warm up
                times[name].append(elapsed)
    floor = statistics.median(times["bare cuFFT pair"])
    row = {
        "shape": shape,
        "operator": operator.multiplier,
        **buffers.errors(operator),
        "workspace_mib": round(buffers.pointers[3] / 2**20, 1),
        "milliseconds": {
            name: {
                "median": round(statistics.median(seen), 4),
                "min": round(min(seen), 4),
                "max": round(max(seen), 4),
                "over_bare_pair": round(statistics.median(seen) / floor, 3),
            }
            for name, seen in times.items()
        },
    }
    return say(row)


def hardware(library: CudaLibrary) -> dict[str, Any]:
    """Return the GPU and the versions of what drives it."""
    seen = torch.cuda.get_device_properties(0)
    return {
        "gpu": seen.name,
        "gpu_memory_gib": round(seen.total_memory / 2**30, 1),
        "compute_capability": f"{seen.major}.{seen.minor}",
        "torch_cuda": torch.version.cuda,
        **library.versions(),
    }


def open_on_gpu(folder: Path) -> CudaLibrary:
    """Build and open the library; exit where there is no GPU to run it on."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "no GPU: this PyTorch "
            + ("sees none" if torch.version.cuda else "is a CPU build")
            + "; nothing was measured"
        )
    major, minor = torch.cuda.get_device_capability()
    library = open_cuda_library(build_cuda_library(folder, f"{major}{minor}-real"))
    try:
        library.require_gpu()
    except EngineError as error:
        raise SystemExit(f"no GPU: {error}; nothing was measured") from error
    return library


def main() -> None:
    """Measure, print and write."""
    args = parser(__doc__, repeats=100).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = open_on_gpu(Path(folder))
        accuracy = check(library, "cuda")
        rows = [measure(library, shape, args.repeats) for shape in TIMED]
        gpu = hardware(library)
    write(args.output, rows, gpu=gpu, repeats=args.repeats, accuracy=accuracy)


if __name__ == "__main__":
    main()
