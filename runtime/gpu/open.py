"""From ``--device`` to engines on a GPU; nothing falls back to the CPU.

A run on the CPU asks here too, so what a GPU needs is imported where it is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import DataError, EngineError
from qsm_deploy.runtime.card.graph import require_bounded_graph
from qsm_deploy.runtime.card.read import PLAN, card_in_plan

if TYPE_CHECKING:
    from qsm_deploy.runtime.gpu.engines.inference import DeviceSession
    from qsm_deploy.runtime.gpu.run import Place
    from qsm_deploy.runtime.gpu.session import GpuSession


def open_gpu_sessions(
    models: Sequence[Path], number: int, memory_limit: int | None = None
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

    Raises
    ------
    EngineError
        If there is no GPU of that number, a model cannot run there, or the CUDA library is not
        built.
    MissingDependencyError
        If a library is not installed.
    """
    engines = [open_device_session(m, number, memory_limit=memory_limit) for m in models]
    from qsm_deploy.runtime.gpu.pipeline import Gpu
    from qsm_deploy.runtime.gpu.session import GpuSession

    place = open_place(number)
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
    path: Path, device: int = 0, *, memory_limit: int | None = None
) -> "DeviceSession":
    """Load a model file on a GPU, which becomes this thread's current one.

    Parameters
    ----------
    path
        A plan, which runs in the flavour of TensorRT that its card names, or an ONNX file, which
        runs in ONNX Runtime.
    device
        The number of the GPU.
    memory_limit
        Bytes of GPU memory that ONNX Runtime may take; TensorRT computes in the caller's.

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
    return (
        _open_plan(path, device) if path.suffix == PLAN else _open_onnx(path, device, memory_limit)
    )


def _open_plan(path: Path, device: int) -> "DeviceSession":
    from qsm_deploy.runtime.gpu.engines.plan_target import target_from_card

    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    card = card_in_plan(data, path)
    target = target_from_card(card, path)
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice
    from qsm_deploy.runtime.gpu.engines.tensorrt import TensorRtSession

    return TensorRtSession(path, data, card, target, CudaDevice(device))


def _open_onnx(path: Path, device: int, memory_limit: int | None) -> "DeviceSession":
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice
    from qsm_deploy.runtime.gpu.engines.onnxruntime_cuda import OnnxRuntimeCudaSession

    require_bounded_graph(path)
    return OnnxRuntimeCudaSession(path, CudaDevice(device), memory_limit)
