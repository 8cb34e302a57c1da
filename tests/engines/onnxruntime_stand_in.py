"""ONNX Runtime's CUDA provider, played by its CPU provider on host memory.

Sessions, bindings and run options are ONNX Runtime's own; only the name of the device is changed.
"""

import sys
from types import SimpleNamespace
from typing import Any

import onnxruntime

# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
OPTIONS = {
    *(
        "device_id",
        "user_compute_stream",
        "do_copy_in_default_stream",
        "use_ep_level_unified_stream",
    ),
    *("gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search", "use_tf32"),
    *("cudnn_conv_use_max_workspace", "cudnn_conv1d_pad_to_nc1d", "enable_cuda_graph"),
    *("prefer_nhwc", "enable_skip_layer_norm_strict_mode", "gpu_external_alloc"),
}


class Binding:
    """ONNX Runtime's binding; device memory is host memory."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.real = session.io_binding()

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.real.bind_input(name, "cpu", 0, element_type, shape, buffer_ptr)

    def bind_output(
        self, name, device_type="cpu", device_id=0, element_type=None, shape=None, buffer_ptr=None
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.real.bind_output(name, "cpu", 0, element_type, shape, buffer_ptr)


class Gpu:
    """What the stand-in is asked, and what it does wrong."""

    def __init__(self) -> None:
        self.options: dict[str, str] = {}
        self.starts = True
        self.refuses: Exception | None = None
        self.raises: Exception | None = None
        self.runs = 0
        self.enqueue: Any = lambda stream, task: task()

    def module(self) -> Any:
        """Return what stands where ``onnxruntime`` is imported."""
        return SimpleNamespace(
            __version__=onnxruntime.__version__,
            SessionOptions=onnxruntime.SessionOptions,
            RunOptions=onnxruntime.RunOptions,
            InferenceSession=self.session,
            get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            preload_dlls=lambda: sys.stdout.write("loaded\n"),
        )

    def session(self, path: Any, options: Any, providers: Any, enable_fallback: int) -> "Session":
        if self.refuses:
            raise self.refuses
        (name, self.options), last = providers
        assert (name, last) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        assert self.options.keys() <= OPTIONS
        assert all(isinstance(value, str) for value in self.options.values())
        real = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], enable_fallback=enable_fallback
        )
        assert not real._enable_fallback
        return Session(self, real)


class Session:
    """A session on the CPU that says it is one on a GPU."""

    def __init__(self, gpu: Gpu, real: onnxruntime.InferenceSession) -> None:
        self.gpu, self.real = gpu, real
        self.get_modelmeta = real.get_modelmeta
        self.get_inputs, self.get_outputs = real.get_inputs, real.get_outputs

    def get_providers(self) -> list[str]:
        return [*(["CUDAExecutionProvider"] if self.gpu.starts else []), "CPUExecutionProvider"]

    def io_binding(self) -> Binding:
        return Binding(self.real)

    def run_with_iobinding(self, iobinding: Binding, run_options: Any = None) -> None:
        assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        if self.gpu.raises:
            raise self.gpu.raises
        self.gpu.runs += 1
        stream = int(self.gpu.options["user_compute_stream"])
        run = self.real.run_with_iobinding
        self.gpu.enqueue(stream, lambda: run(iobinding.real, run_options))
