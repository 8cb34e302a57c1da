"""Running a graph in ONNX Runtime just as it says, with a look at the tensors within it.

Fast, and exact for FP32 and Q/DQ. Of FP16 it hides the rounding, so that the error of a whole
network in FP16 and INT8 is not judged here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.sessions.session import Precision

AT_ONCE = 64
Tensors = Mapping[str, NDArray[np.float32]]


class GraphRun:
    """A graph of standard operators, ready to run.

    Parameters
    ----------
    model
        With outputs of its own.
    within
        Names of tensors to see besides it.
    """

    def __init__(self, model: onnx.ModelProto, within: Sequence[str] = ()) -> None:
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        self._outputs = [output.name for output in whole.graph.output]
        self._within = list(within)
        seen = set(self._outputs)
        for name in self._within:
            if name not in seen:
                whole.graph.output.append(helper.make_empty_tensor_value_info(name))
                seen.add(name)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(
            whole.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Tensors) -> NDArray[np.float32]:
        """Return the graph's outputs, one after the other along the channels."""
        return np.concatenate(self._session.run(self._outputs, dict(inputs)), axis=1)

    def look(self, inputs: Tensors) -> Iterator[NDArray[np.float32]]:
        """Yield the tensors within, some at a time: all of a large network take gigabytes."""
        for first in range(0, len(self._within), AT_ONCE):
            names = self._within[first : first + AT_ONCE]
            yield from self._session.run(names, dict(inputs))


class GraphRunner(Protocol):
    """Runs a graph."""

    def run(self, inputs: Tensors) -> NDArray[np.float32]:
        """Return its outputs, one after the other along the channels."""


class GraphSession:
    """A graph, whatever runs it, behind the protocol of an inference backend."""

    precision: Precision = "fp32"

    def __init__(self, run: GraphRunner, card: ModelCard, backend: str, version: str) -> None:
        self.card, self.backend, self.version = card, backend, version
        self._run = run

    def run(self, tensors: Tensors) -> NDArray[np.float32]:
        """Run the graph once; see :class:`qsm_deploy.runtime.sessions.session.Session`."""
        return self._run.run({info.name: tensors[info.name] for info in self.card.inputs})
