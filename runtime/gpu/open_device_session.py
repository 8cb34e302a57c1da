"""The engine on a GPU that a file is for, by its suffix and its card."""

from pathlib import Path

from qsm_deploy.kernels.cuda_driver import open_cuda_driver
from qsm_deploy.kernels.errors import DataError, EngineError
from qsm_deploy.runtime.card.read import ONNX, PLAN, card_in_plan
from qsm_deploy.runtime.gpu.inference import DeviceSession
from qsm_deploy.runtime.gpu.plan_target import target_from_card


def open_device_session(
    path: Path, device: int = 0, *, memory_limit: int | None = None
) -> DeviceSession:
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
    if path.suffix not in (PLAN, ONNX):
        raise EngineError(f"{path}: neither a {PLAN} nor an .onnx file; make one with qsm-export")
    if not path.is_file():
        raise DataError(f"{path}: no such model file")
    if path.suffix == PLAN:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        card = card_in_plan(data, path)
        target = target_from_card(card, path)
        driver = open_cuda_driver()
        from qsm_deploy.runtime.gpu.tensorrt import TensorRtSession

        return TensorRtSession(path, data, card, target, driver, device)
    driver = open_cuda_driver()
    from qsm_deploy.runtime.gpu.onnxruntime_cuda import OnnxRuntimeCudaSession

    return OnnxRuntimeCudaSession(path, driver, device, memory_limit)
