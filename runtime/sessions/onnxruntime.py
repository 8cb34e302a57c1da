"""Models in ONNX Runtime on the CPU."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as status

from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.card import METADATA_KEY
from qsm_deploy.runtime.card.read import onnx_file, read_card
from qsm_deploy.runtime.console.time_limit import LONGEST_S, TimeLimit
from qsm_deploy.runtime.sessions.open import cannot_load, joined_outputs
from qsm_deploy.runtime.sessions.session import Backend, Precision

UNREADABLE = (
    *(status.Fail, status.InvalidArgument, status.InvalidGraph),
    *(status.InvalidProtobuf, status.NotImplemented, UnicodeDecodeError),
)


class OnnxRuntimeSession:
    """A model in ONNX Runtime, FP32 whatever the file is in.

    Memory patterns are off: they add one block for all activations to what the arena holds
    already, which doubles the peak. The arena stays on: left to malloc, freed activations linger
    in the heap, the peak grows from run to run, and closing the session does not give it back.
    """

    backend: Backend = "onnxruntime"
    version = onnxruntime.__version__

    def __init__(
        self,
        path: Path,
        precision: Precision = "fp32",
        threads: int = 0,
        time_limit: float = LONGEST_S,
        *,
        optimised: bool = True,
    ) -> None:
        self.precision: Precision = "fp32"
        self._limit = TimeLimit(time_limit)
        options = onnxruntime.SessionOptions()
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False
        # it fuses Q/DQ only around a convolution without an activation function, and makes biases
        # INT32 with a scale in FP16 that underflows
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 4  # what fails is raised, in one line
        try:
            with onnx_file(path) as file:
                self._session = self._limit.within(
                    f"opening {path} in ONNX Runtime",
                    lambda: onnxruntime.InferenceSession(
                        file, options, providers=["CPUExecutionProvider"], enable_fallback=0
                    ),
                )
            self.card = read_card(
                path,
                self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY),
                [i.name for i in self._session.get_inputs()],
                [o.name for o in self._session.get_outputs()],
            )
        except UNREADABLE as error:
            raise cannot_load(path, "ONNX Runtime", error) from error

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the model once; see :class:`qsm_deploy.runtime.sessions.session.Session`."""
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        try:
            outputs = self._limit.within(
                f"one run of {self.card.network} in ONNX Runtime",
                lambda: self._session.run(None, dict(tensors), options),
                lambda: setattr(options, "terminate", True),
            )
        except (status.Fail, status.RuntimeException, status.InvalidArgument) as error:
            reason = str(error).splitlines()[0]
            raise EngineError(f"ONNX Runtime failed ({reason}); export the model again") from error
        return joined_outputs(outputs, tensors, self.card)
