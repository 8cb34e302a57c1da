"""Models in OpenVINO on the CPU."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.card import METADATA_KEY
from qsm_deploy.runtime.card.read import onnx_file, read_card
from qsm_deploy.runtime.console.time_limit import LONGEST_S, TimeLimit
from qsm_deploy.runtime.sessions.int8 import computed_precision
from qsm_deploy.runtime.sessions.open import cannot_load, joined_outputs
from qsm_deploy.runtime.sessions.session import Backend, Precision

# OpenVINO tells its makers over the network that it was imported, from a thread that can hang an
# interrupted process. Without the package for that it uses a stub of its own.
sys.modules.setdefault("openvino_telemetry", cast(Any, None))
import openvino  # noqa: E402


class OpenVinoSession:
    """A model in OpenVINO, compiled for one shape at a time.

    The precision is always stated: left alone, OpenVINO computes in bf16 on CPUs that can. Shapes
    are fixed before compiling, which halves the memory of dynamic ones.
    """

    backend: Backend = "openvino"
    version = openvino.__version__.split("-")[0]

    def __init__(
        self,
        path: Path,
        precision: Precision = "fp32",
        threads: int = 0,
        time_limit: float = LONGEST_S,
    ) -> None:
        self._core, self._limit = openvino.Core(), TimeLimit(time_limit)
        if precision == "bf16":
            self._require_bf16()
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            with onnx_file(path) as file:
                self._model = self._limit.within(
                    f"opening {path} in OpenVINO",
                    partial(self._core.read_model, file),
                )
            stored = ["framework", METADATA_KEY]
            has_card = self._model.has_rt_info(stored)
            self.card = read_card(
                path,
                str(self._model.get_rt_info(stored).astype(str)) if has_card else None,
                [i.get_any_name() for i in self._model.inputs],
                [o.get_any_name() for o in self._model.outputs],
            )
        except (RuntimeError, UnicodeDecodeError) as error:
            raise cannot_load(path, "OpenVINO", error) from error
        self.precision = computed_precision(self.card, self.backend, precision)
        if self.precision != "int8":  # what the graph says of INT8, in floating point
            self._settings["LP_TRANSFORMS_MODE"] = "NO"
        self._request: Any = None
        self._shapes: dict[str, list[int]] = {}

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the model once; see :class:`qsm_deploy.runtime.sessions.session.Session`."""
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        network = self.card.network
        try:
            if shapes != self._shapes:
                self._request, self._shapes = None, {}
                self._request = self._limit.within(
                    f"compiling {network} in OpenVINO",
                    partial(self._compiled, shapes),
                )
                self._shapes = shapes
            outputs = self._limit.within(
                f"one run of {network} in OpenVINO",
                partial(self._computed, dict(tensors)),
                self._request.cancel,
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise EngineError(f"OpenVINO failed ({reason}); export the model again") from error
        return joined_outputs(outputs, tensors, self.card)

    def _compiled(self, shapes: Mapping[str, list[int]]) -> Any:
        self._model.reshape(shapes)
        compiled = self._core.compile_model(self._model, "CPU", self._settings)
        return compiled.create_infer_request()

    def _computed(self, tensors: dict[str, NDArray[np.float32]]) -> list[NDArray[Any]]:
        self._request.start_async(tensors, share_inputs=True)  # what infer() begins, nothing ends
        self._request.wait()
        return [output.data.copy() for output in self._request.output_tensors]

    def _require_bf16(self) -> None:
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in able:
            raise EngineError(
                f"--precision bf16: this CPU has no bf16 instructions (it has {', '.join(able)}); "
                "use --precision fp32"
            )
