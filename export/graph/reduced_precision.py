"""Writing a reduced precision into a graph: weights and casts, so that no engine has to choose.

TensorRT 11 knows no other way, and TensorRT 10 and TensorRT for RTX take it as well.
"""

from collections.abc import Mapping, Set
from typing import Literal

import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from qsm_deploy.calibration.graph.nodes import replace_nodes
from qsm_deploy.export.graph.precision_policy import reducible_nodes
from qsm_deploy.kernels.errors import ExportError

ReducedPrecision = Literal["fp16", "bf16"]
TYPES: Mapping[ReducedPrecision, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
BF16_OPSET = 22  # the first whose convolutions may be in bf16


def with_precision(model: onnx.ModelProto, precision: ReducedPrecision) -> onnx.ModelProto:
    """Return a graph that computes in a reduced precision where the policy allows it.

    Parameters
    ----------
    model
        In FP32; not changed.
    precision
        Of what :func:`qsm_deploy.export.graph.precision_policy.reducible_nodes` names.

    Returns
    -------
    ModelProto
        Checked. Inputs and output stay float32.

    Raises
    ------
    ExportError
        If nothing in it may be reduced, or the result is no valid graph.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    if precision == "bf16":
        whole = version_converter.convert_version(whole, BF16_OPSET)
    reduced = reducible_nodes(whole.graph)
    if not reduced:
        raise ExportError(f"nothing in this network may compute in {precision}; export it in fp32")
    _Rewriter(whole.graph, precision, reduced).rewrite()
    try:
        onnx.checker.check_model(whole, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"the graph in {precision} is not valid: {reason}") from error
    return whole


class _Rewriter:
    """Gives every node its inputs in the type that it computes in, each cast once."""

    def __init__(
        self, graph: onnx.GraphProto, precision: ReducedPrecision, reduced: Set[str]
    ) -> None:
        self.graph = graph
        self.precision = precision
        self.reduced = reduced
        self.weights = {
            tensor.name: tensor
            for tensor in graph.initializer
            if tensor.data_type == TensorProto.FLOAT
        }
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()

    def rewrite(self) -> None:
        for node in self.graph.node:
            reduces = node.output[0] in self.reduced
            for n, name in enumerate(node.input):
                if reduces and name not in self.reduced:
                    node.input[n] = self._reduce(name)
                elif not reduces and name in self.reduced:
                    node.input[n] = self._cast(name, TensorProto.FLOAT, "fp32")
            self.nodes.append(node)
        replace_nodes(self.graph, self.nodes)

    def _reduce(self, name: str) -> str:
        if not name or name not in self.weights:
            return self._cast(name, TYPES[self.precision], self.precision) if name else name
        new = f"{name}_{self.precision}"
        if new not in self.made:
            values = numpy_helper.to_array(self.weights[name])
            element = helper.tensor_dtype_to_np_dtype(TYPES[self.precision])
            self.graph.initializer.append(numpy_helper.from_array(values.astype(element), new))
            self.made.add(new)
        return new

    def _cast(self, name: str, to: int, suffix: str) -> str:
        new = f"{name}_{suffix}"
        if new not in self.made:
            self.nodes.append(helper.make_node("Cast", [name], [new], f"cast_{new}", to=to))
            self.made.add(new)
        return new
