"""The CUDA dipole operator: accuracy against float64 numpy, time against cuFFT, PyTorch and CuPy.

The bare pair of transforms (real to complex and back, cuFFT called directly) is the floor: what
the operator takes beyond it is what the multiplication costs. PyTorch and CuPy multiply by a
stored kernel, as is usual. Contenders take turns; times are the GPU's, from events.
"""

import math
import statistics
from collections.abc import Callable
from typing import get_args

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray

from benchmarks.common import Row
from benchmarks.gpu.machine import Machine, Shape, Step
from qsm_deploy.export.bench.rounds import spread
from qsm_deploy.kernels.cuda_library import DipoleOperator, MultiplierName
from qsm_deploy.kernels.dipole import CONE
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.kernels.geometry import Geometry

OBLIQUE = (0.3, -0.5, 0.8)
WARM_UP, TURNS = 5, 50
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
Array = NDArray[np.float64]


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

    def __init__(self, machine: Machine, operator: DipoleOperator) -> None:
        self.machine, self.operator = machine, operator
        shape, device = (operator.batch, *operator.geometry.shape), machine.torch_device
        generator = torch.Generator().manual_seed(sum(shape))
        self.x = torch.randn(shape, generator=generator).to(device)
        self.y = torch.full(shape, torch.nan, device=device)
        needed = machine.library.dipole_workspace_bytes(operator)
        self.workspace = torch.full((needed + 256,), 0xFF, dtype=torch.uint8, device=device)
        start = self.workspace.data_ptr() + -self.workspace.data_ptr() % 256
        self.pointers = self.x.data_ptr(), self.y.data_ptr(), start, needed

    def apply(self) -> None:
        """Enqueue the operator on the default stream."""
        self.machine.library.dipole_apply(self.operator, *self.pointers)

    def errors(self) -> dict[str, float]:
        """Return how far the output is from float64's."""
        expected = reference(self.operator, self.x.cpu().numpy())
        self.machine.device.synchronize()
        difference = self.y.cpu().numpy() - expected
        if not np.isfinite(difference).all():
            raise EngineError(f"{self.operator}: NaN or Inf in the output")
        relative = np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-30)
        return {
            "relative_error_to_float64": float(relative),
            "max_abs_error_to_float64": float(abs(difference).max()),
        }


def accuracy_row(machine: Machine) -> Row:
    """Return the largest errors of all multipliers at every checked shape."""
    worst: Row = {}
    for shape, voxel_size_mm, b0_direction, batch in CHECKED:
        if math.prod(shape) > machine.scale.most_checked_voxels:
            continue
        geometry = Geometry(shape, voxel_size_mm, b0_direction)
        seen = []
        for name in get_args(MultiplierName):
            buffers = Buffers(machine, DipoleOperator(geometry, name, batch))
            buffers.apply()
            seen.append(buffers.errors())
        worst[f"{batch} x {geometry}"] = {key: max(e[key] for e in seen) for key in seen[0]}
    return worst


def contenders(buffers: Buffers) -> dict[str, Step]:
    """Return what to time, by name; all on the default stream."""
    x, axes, shape = buffers.x, (-3, -2, -1), buffers.operator.geometry.shape
    e = torch.from_numpy(multiplier(buffers.operator).astype(np.float32)).to(x.device)
    steps: dict[str, Step] = {
        "bare cuFFT pair": buffers.machine.bare_pair(x),
        "libqsm_cuda": buffers.apply,
        "torch.fft": lambda: torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * e, s=shape, dim=axes),
    }
    if cupy := buffers.machine.cupy():
        cx, ce, fft = cupy.asarray(x), cupy.asarray(e), cupy.fft
        steps["CuPy"] = lambda: fft.irfftn(fft.rfftn(cx, axes=axes) * ce, s=shape, axes=axes)
    return steps


def times_row(machine: Machine, shape: Shape) -> Row:
    """Return the times of all contenders at a shape, with the operator's errors and memory."""
    operator = DipoleOperator(Geometry(shape, (0.86, 0.86, 2.0), OBLIQUE), "tkd")
    torch.cuda.empty_cache()
    buffers = Buffers(machine, operator)
    steps = contenders(buffers)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + TURNS):
        for name, step in steps.items():
            elapsed = machine.milliseconds(step)
            if turn >= WARM_UP:
                times[name].append(elapsed)
    floor = statistics.median(times["bare cuFFT pair"])
    return {
        "shape": shape,
        "operator": operator.multiplier,
        **buffers.errors(),
        "workspace_mib": round(buffers.pointers[3] / 2**20, 1),
        "milliseconds": {
            name: spread(seen) | {"over_bare_pair": round(statistics.median(seen) / floor, 3)}
            for name, seen in times.items()
        },
    }
