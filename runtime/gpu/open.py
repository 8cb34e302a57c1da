"""From ``--device`` to engines on a GPU.

A run on the CPU asks here too, so what a GPU needs is imported where it is used.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import CardError, DataError, EngineError, MissingDependencyError
from qsm_deploy.runtime.card.graph import require_bounded_graph
from qsm_deploy.runtime.card.read import PLAN, open_plan
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.sessions.session import AUTO

if TYPE_CHECKING:
    from qsm_deploy.runtime.gpu.engines.inference import DeviceSession
    from qsm_deploy.runtime.gpu.run import Place
    from qsm_deploy.runtime.gpu.session import GpuSession


def missing_gpu(number: int = 0) -> str | None:
    """Return why there is no GPU of a number, ``None`` if there is one.

    Raises
    ------
    EngineError
        If there is a driver, but the bindings are not installed.
    """
    try:
        from qsm_deploy.runtime.gpu.cuda_device import device_properties

        device_properties(number)
    except MissingDependencyError as error:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return "this machine has no NVIDIA driver"
        raise EngineError(f"{error}; or pass --device cpu, for the graph in a plan") from error
    except EngineError as error:
        return str(error).partition("; ")[0].removeprefix(f"GPU {number}: ")
    return None


def open_gpu_sessions(
    models: Sequence[Path],
    number: int,
    *,
    memory_limit: int | None = None,
    plan_cache: "str | os.PathLike[str]" = AUTO,
    log: TerminalLog | None = None,
) -> "list[GpuSession]":
    """Load models on a GPU.

    Parameters
    ----------
    models
        Plans, or ONNX files.
    number
        Of the GPU.
    memory_limit
        Bytes that a library may take which does not compute in memory of ours.
    plan_cache, log
        As for :class:`qsm_deploy.runtime.gpu.rebuilding.Rebuilding`.

    Raises
    ------
    EngineError
        If there is no GPU of that number, a model cannot run there, or the CUDA library is not
        built.
    MissingDependencyError
        If a library is not installed.
    """
    place = open_place(number)
    engines = [
        open_device_session(m, number, memory_limit=memory_limit, plan_cache=plan_cache, log=log)
        for m in models
    ]
    from qsm_deploy.runtime.gpu.pipeline import Gpu
    from qsm_deploy.runtime.gpu.session import GpuSession

    return [GpuSession(Gpu(place.device, place.library, engine)) for engine in engines]


def open_place(number: int) -> "Place":
    """Return a GPU and its kernels; this thread's current one from now on.

    Raises
    ------
    EngineError
        If there is no GPU of that number, or the CUDA library is not built.
    MissingDependencyError
        If the bindings are not installed.
    """
    from qsm_deploy.kernels.cuda_library import open_cuda_library
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice
    from qsm_deploy.runtime.gpu.run import Place

    device, library = CudaDevice(number), open_cuda_library()
    library.require_gpu()
    return Place(device, library)


def open_device_session(
    path: Path,
    device: int = 0,
    *,
    memory_limit: int | None = None,
    plan_cache: "str | os.PathLike[str]" = AUTO,
    log: TerminalLog | None = None,
) -> "DeviceSession":
    """Load a model file on a GPU, which becomes this thread's current one.

    Parameters
    ----------
    path
        A plan, which runs in the flavour of TensorRT that its card names, or is built again from
        the graph in it if it does not fit what is there; or an ONNX file, which runs in ONNX
        Runtime.
    device
        The number of the GPU.
    memory_limit
        Bytes of GPU memory that ONNX Runtime may take; TensorRT computes in the caller's.
    plan_cache, log
        As for :class:`qsm_deploy.runtime.gpu.rebuilding.Rebuilding`.

    Raises
    ------
    DataError
        If the file is missing or cannot be read.
    EngineError
        If there is no driver or GPU, or the file cannot run on it; the message says why and how to
        make one that can.
    CardError
        If it has no card, or one that contradicts it.
    MissingDependencyError
        If the library that runs it is not installed.
    """
    if path.suffix not in (PLAN, ".onnx"):
        raise EngineError(f"{path}: neither a {PLAN} nor an .onnx file; make one with qsm-export")
    if not path.is_file():
        raise DataError(f"{path}: no such model file")
    if path.suffix == PLAN:
        return _open_plan(path, device, plan_cache, log or TerminalLog(quiet=True))
    return _open_onnx(path, device, memory_limit)


def _open_plan(
    path: Path, device: int, plan_cache: "str | os.PathLike[str]", log: TerminalLog
) -> "DeviceSession":
    from qsm_deploy.runtime.gpu.engines.plan_target import target_from_card

    plan, card = open_plan(path)
    target = target_from_card(card, path)
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice
    from qsm_deploy.runtime.gpu.engines.tensorrt import TensorRtSession

    gpu = CudaDevice(device)
    if plan.graph is None:
        return TensorRtSession(path, plan.engine, card, target, gpu)
    from qsm_deploy.runtime.gpu.rebuilding import Rebuilding

    rebuilding = Rebuilding(path, plan.graph, card, gpu, plan_cache, log)
    try:
        session = TensorRtSession(path, plan.engine, card, target, gpu)
    except CardError:
        raise
    except EngineError as error:
        return rebuilding.session(error)
    session.rebuild = rebuilding.session
    return session


def _open_onnx(path: Path, device: int, memory_limit: int | None) -> "DeviceSession":
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice
    from qsm_deploy.runtime.gpu.engines.onnxruntime_cuda import OnnxRuntimeCudaSession

    require_bounded_graph(path)
    return OnnxRuntimeCudaSession(path, CudaDevice(device), memory_limit)
