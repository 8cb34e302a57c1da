"""Models in ONNX Runtime's CUDA provider, on device pointers.

Written against ONNX Runtime's interface, and never run on a GPU.
"""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as status

from qsm_deploy.kernels.errors import EngineError, MemoryLimitError
from qsm_deploy.runtime.card.card import METADATA_KEY
from qsm_deploy.runtime.card.read import read_card
from qsm_deploy.runtime.gpu.engines.inference import DeviceBackend, Shapes
from qsm_deploy.runtime.gpu.engines.shapes import bound_shape, bound_sizes
from qsm_deploy.runtime.sessions.onnxruntime import UNREADABLE
from qsm_deploy.runtime.sessions.open import cannot_load

if TYPE_CHECKING:
    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice

FLOAT = "tensor(float)"
PROVIDER = "CUDAExecutionProvider"
INSTALL = (
    "it is in onnxruntime-gpu, which takes the place of onnxruntime: pip uninstall -y onnxruntime "
    "&& pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]'"
)
DEVICE_FAILS = (status.EPFail, status.RuntimeException, RuntimeError, ValueError)
# nothing waits for the GPU when a run returns
ASYNCHRONOUS = "disable_synchronize_execution_providers"


class OnnxRuntimeCudaInference:
    """A set of shapes in a session; the tensors' addresses are bound for each run."""

    def __init__(self, session: "OnnxRuntimeCudaSession", shapes: Shapes) -> None:
        self._session = session
        self._shapes = dict(shapes)
        self._output_shape = session.output_shape(shapes)

    def enqueue(self, inputs: Mapping[str, int], output: int, stream: int) -> None:
        """Enqueue one run; see :class:`qsm_deploy.runtime.gpu.engines.inference.Inference`.

        Raises
        ------
        MemoryLimitError
            If ONNX Runtime cannot allocate what it needs.
        """
        if inputs.keys() != self._shapes.keys():
            raise EngineError(f"the model takes {sorted(self._shapes)}, got {sorted(inputs)}")
        self._session.enqueue(inputs, self._shapes, output, self._output_shape, stream)


class OnnxRuntimeCudaSession:
    """A model on a GPU; see :class:`qsm_deploy.runtime.gpu.engines.inference.DeviceSession`.

    ONNX Runtime takes the memory that it computes in from an arena of its own, which no caller can
    provide: ``scratch_bytes`` is 0 and :meth:`own_bytes` an estimate. It also keeps to one stream
    for its life: runs are ordered with the caller's stream by events, and none overlap. It may
    allocate and wait while it runs, so it cannot be captured.

    Parameters
    ----------
    path
        An ONNX file with a card.
    gpu
        What is to run it.
    memory_limit
        Bytes that the arena may take; no limit by default.

    Raises
    ------
    EngineError
        If ONNX Runtime has no CUDA provider, it does not start, or cannot load the model.
    CardError
        If the model has no card, or one that contradicts the graph.
    """

    backend: DeviceBackend = "onnxruntime-cuda"
    version = onnxruntime.__version__
    capturable = False

    def __init__(self, path: Path, gpu: "CudaDevice", memory_limit: int | None = None) -> None:
        if PROVIDER not in onnxruntime.get_available_providers():
            raise EngineError(
                f"this onnxruntime {onnxruntime.__version__} has no CUDA provider; {INSTALL}"
            )
        self._gpu, self.device = gpu, gpu.number
        self._stream = gpu.open_stream()
        try:
            self._session: onnxruntime.InferenceSession | None = self._opened(path, memory_limit)
            self.card = read_card(
                path,
                self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY),
                [i.name for i in self._session.get_inputs()],
                [o.name for o in self._session.get_outputs()],
            )
            for tensor in (*self._session.get_inputs(), *self._session.get_outputs()):
                if tensor.type != FLOAT:
                    raise EngineError(
                        f"{path}: {tensor.name} is {tensor.type}, expected {FLOAT}; export it again"
                    )
        except EngineError:
            gpu.close_stream(self._stream)
            raise
        self.weights_bytes = path.stat().st_size
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry(ASYNCHRONOUS, "1")

    def _opened(self, path: Path, memory_limit: int | None) -> onnxruntime.InferenceSession:
        """Return a session that computes on the GPU, on this session's stream."""
        options = onnxruntime.SessionOptions()
        options.enable_mem_pattern = False  # as on the CPU: it doubles the peak
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 4  # what fails is raised, in one line
        chosen = provider_options(self.device, self._stream, memory_limit)
        _load_cuda_libraries()
        try:
            session = onnxruntime.InferenceSession(
                path,
                options,
                providers=[(PROVIDER, chosen), "CPUExecutionProvider"],
                enable_fallback=0,  # left alone, it prints on stdout and computes on the CPU
            )
        except UNREADABLE as error:
            raise cannot_load(path, "ONNX Runtime", error) from error
        except DEVICE_FAILS as error:
            raise _not_started(str(error).strip().splitlines()[0]) from error
        if session.get_providers()[:1] != [PROVIDER]:
            raise _not_started("it gives no reason")
        return session

    def output_shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Return the output's shape for inputs of these shapes."""
        return bound_shape(self.card, shapes)

    def scratch_bytes(self, shapes: Shapes) -> int:
        """Return 0: the caller provides no memory."""
        bound_sizes(self.card, shapes)
        return 0

    def own_bytes(self, shapes: Shapes) -> int | None:
        """Return about what the arena takes for these shapes, or nothing if nobody measured it.

        It is what the same graph took in ONNX Runtime on the CPU, where the activations are the
        same; cuDNN's workspaces come on top.
        """
        sizes = bound_sizes(self.card, shapes)
        used = self.card.memory.get("onnxruntime")
        if used is None:
            return None
        voxels = sizes["n"] * sizes["x"] * sizes["y"] * sizes["z"]
        return used.fixed_bytes + used.bytes_per_voxel * voxels

    def open_inference(self, shapes: Shapes, scratch: int) -> OnnxRuntimeCudaInference:
        """Return what runs these shapes; ``scratch`` is not used."""
        return OnnxRuntimeCudaInference(self, shapes)

    def enqueue(
        self,
        inputs: Mapping[str, int],
        shapes: Shapes,
        output: int,
        output_shape: tuple[int, ...],
        stream: int,
    ) -> None:
        """Enqueue one run after the work of a stream and before what it does next."""
        if self._session is None:
            raise EngineError("this session was closed")
        binding = self._session.io_binding()
        where = ("cuda", self.device, np.float32)
        for name, address in inputs.items():
            binding.bind_input(name, *where, list(shapes[name]), address)
        binding.bind_output(self.card.output.name, *where, list(output_shape), output)
        self._gpu.order(stream, self._stream)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except (*UNREADABLE, *DEVICE_FAILS) as error:
            reason = str(error).strip().splitlines()[0]
            if "allocate memory" in reason:
                raise MemoryLimitError(
                    f"ONNX Runtime has not enough GPU memory ({reason}); use smaller patches"
                ) from error
            raise EngineError(f"ONNX Runtime failed ({reason}); export the model again") from error
        self._gpu.order(self._stream, stream)

    def close(self) -> None:
        """Wait for its work, and free the session."""
        if self._session is not None:
            self._gpu.synchronize()
            self._session = None
            self._gpu.close_stream(self._stream)


def _not_started(reason: str) -> EngineError:
    return EngineError(
        f"ONNX Runtime's CUDA provider does not start ({reason}); CUDA and cuDNN must be of the "
        f"versions that it was built for; {INSTALL}"
    )


def provider_options(device: int, stream: int, memory_limit: int | None) -> dict[str, str]:
    """Return how the CUDA provider computes: FP32 as such, memory as needed, on one stream."""
    limit = {} if memory_limit is None else {"gpu_mem_limit": str(memory_limit)}
    return limit | {
        "device_id": str(device),
        "user_compute_stream": str(stream),
        "use_tf32": "0",
        # to try every algorithm takes a workspace for each, anew for every shape
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }


def _load_cuda_libraries() -> None:
    """Load CUDA and cuDNN from NVIDIA's wheels, where this version can; it reports on stdout."""
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()
