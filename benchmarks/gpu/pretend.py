"""The made-up GPU of the tests in a GPU's place: every row runs, and none of it counts.

The kernels are compiled for the host, PyTorch computes on the CPU, numpy plays CuPy, stand-ins
TensorRT (twice the field is its map) and ONNX Runtime's CUDA provider.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.common import Row
from benchmarks.gpu.machine import Scale, Step, Watched
from qsm_deploy.kernels.cuda_library import CudaLibrary
from qsm_deploy.runtime.gpu.device import DeviceProperties
from tests.engines import onnxruntime_stand_in, stand_in
from tests.host_twin import build_host_twin
from tests.made_up_gpu import CupyLike, FakeDevice, FakeLibrary, TorchLike, at, read

TINY = (16, 16, 16)
VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}


class PretendedDevice(Watched, FakeDevice):
    """A made-up GPU that engines take for CUDA's."""

    properties = DeviceProperties(0, FakeDevice.name, (8, 9))

    def order(self, first: int, then: int) -> None:
        """Let what is enqueued from now on in ``then`` wait for what is in ``first``."""
        event = self.record(first)
        self.wait(then, event)
        self.enqueue(then, lambda: self.release_event(event))


class PretendedMachine:
    """What :class:`benchmarks.gpu.machine.Machine` has, without a GPU."""

    pretended = True
    scale = Scale(
        head=(24, 16, 16),
        sizes=(TINY,),
        transforms=((8, 10, 12),),
        most_checked_voxels=400,
        patch=16,
        overlap=8,
        profile="8,16,32",
        compared=("tv-unet",),
        network={"channels": (2, 4, 8, 16), "iterations": 1},
        repeats=1,
        iterations={"iterations": 2},
        training=(
            *("--steps", "2", "--cases", "1", "--heads", "1", "--shapes", "1"),
            *("--threads", "1", "--size-mm", "64", "--patch", "16"),
        ),
        tests="importing_the_binding",
    )
    torch_device, compiler = "cpu", "eager"
    half = torch.float64  # which every layer takes on a CPU

    def __init__(self, folder: Path) -> None:
        os.environ["XDG_CACHE_HOME"] = str(folder)
        self.library_path = folder / "libqsm_twin.so"
        twin = CudaLibrary(build_host_twin("g++", folder))
        self.folder, self.device = folder, PretendedDevice()
        self.library: Any = FakeLibrary(twin, self.device)
        self._install()

    def _install(self) -> None:
        """Put the stand-ins where CUDA, TensorRT and ONNX Runtime are imported."""
        cuda: Any = SimpleNamespace(
            CudaDevice=lambda number: self.device,
            device_properties=lambda number: self.device.properties,
        )
        sys.modules["qsm_deploy.runtime.gpu.cuda_device"] = cuda
        levers = stand_in.Levers()
        levers.enqueue = self.device.enqueue
        for name, version in VERSIONS.items():
            sys.modules[name] = stand_in.stand_in(name, version, levers)
        from qsm_deploy.runtime.gpu.engines import onnxruntime_cuda

        gpu = onnxruntime_stand_in.Gpu()
        gpu.enqueue = self.device.enqueue
        onnxruntime_cuda.onnxruntime = gpu.module()

    def facts(self) -> Row:
        return {"gpu": self.device.name}

    def tensor(self, pointer: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(at(pointer, shape))

    def run_torch(self, stream: int, task: Callable[[], object]) -> None:
        self.device.enqueue(stream, lambda: task() and None)

    def torch_peak_bytes(self, step: Step) -> int:
        step()
        return 0

    def milliseconds(self, step: Step) -> float:
        began = time.perf_counter()
        step()
        self.device.synchronize()
        return 1000 * (time.perf_counter() - began)

    def bare_pair(self, x: torch.Tensor) -> Step:
        axes = (-3, -2, -1)
        return lambda: torch.fft.irfftn(torch.fft.rfftn(x, dim=axes), s=x.shape[-3:], dim=axes)

    def cupy(self) -> Any:
        return np

    @contextmanager
    def lent(self, other: str, *arrays: Any) -> Iterator[tuple[list[Any], Callable[[Any], Any]]]:
        kinds = (TorchLike if other == "torch" else CupyLike, CupyLike)
        taken = [kind(self.device, a) for kind, a in zip(kinds, arrays, strict=True)]
        yield taken, partial(read, self.device)
        for array in taken:
            array.free()
