"""From ``--device`` to engines on a GPU; nothing falls back to the CPU."""

import re
from collections.abc import Sequence
from pathlib import Path

from qsm_deploy.kernels.cuda_library import open_cuda_library
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.read import PLAN
from qsm_deploy.runtime.gpu.pipeline import Gpu
from qsm_deploy.runtime.gpu.session import GpuSession

CUDA = re.compile(r"cuda:(\d+)")


def gpu_number(device: str, models: Sequence[Path]) -> int | None:
    """Return the GPU that models are to run on, ``None`` for the CPU.

    Parameters
    ----------
    device
        ``cpu``, ``cuda:N``, or ``auto``: the first GPU for plans, the CPU for ONNX files.
    models
        The files.

    Raises
    ------
    UsageError
        If a plan is to run on the CPU.
    """
    plans = [path for path in models if path.suffix == PLAN]
    if found := CUDA.fullmatch(device):
        return int(found[1])
    if device == "auto":
        return 0 if plans else None
    if plans:
        raise UsageError(f"{plans[0]} is a plan, which runs on a GPU only; pass --device cuda:0")
    return None


def open_gpu_sessions(
    models: Sequence[Path], number: int, memory_limit: int | None = None
) -> list[GpuSession]:
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
    # here: they import CUDA's bindings and engines
    from qsm_deploy.runtime.gpu.open_device_session import open_device_session

    engines = [open_device_session(m, number, memory_limit=memory_limit) for m in models]
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice

    device, library = CudaDevice(number), open_cuda_library()
    library.require_gpu()
    return [GpuSession(Gpu(device, library, engine)) for engine in engines]
