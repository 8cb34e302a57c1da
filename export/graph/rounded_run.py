"""Running a graph in PyTorch with true rounding: what a reduced precision costs, engine or none.

ONNX Runtime computes graphs in FP16 in FP32 on a CPU, and removes the casts between operators.
Here every operator that takes a reduced type accumulates in FP32, as tensor cores do, and its
output is rounded to that type. An engine that fuses operators rounds less often.

INT8 is what Q/DQ say: a quantised value has the type of its scale again before an operator takes
it. An engine that fuses them multiplies the integers, which is the same but for that rounding.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qsm_deploy.export.graph.torch_operators import OPERATORS, Attributes
from qsm_deploy.kernels.errors import ExportError

REDUCED = (torch.float16, torch.bfloat16)


class RoundedRun:
    """A graph, ready to run.

    Attributes
    ----------
    largest
        For each operator with a reduced type, the largest magnitude that it returned in all runs
        before it was rounded.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.opsets = list(model.opset_import)
        self.weights = {tensor.name: _tensor(tensor) for tensor in model.graph.initializer}
        self.largest: dict[str, float] = {}

    def run(self, inputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return the graph's outputs, one after the other along the channels."""
        values = self.weights | {name: torch.from_numpy(array) for name, array in inputs.items()}
        uses = Counter(name for node in self.graph.node for name in node.input)
        wanted = [output.name for output in self.graph.output]
        with torch.inference_mode():
            for node in self.graph.node:
                given = [values[name] if name else None for name in node.input]
                for name, value in zip(node.output, self._compute(node, given), strict=False):
                    values[name] = value
                for name in node.input:
                    uses[name] -= 1
                    if not uses[name] and name not in wanted:
                        values.pop(name, None)
        output: NDArray[np.float32] = torch.cat([values[name] for name in wanted], dim=1).numpy()
        return output

    def _compute(self, node: onnx.NodeProto, given: Sequence[Tensor | None]) -> list[Tensor]:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Cast":
            to = helper.tensor_dtype_to_np_dtype(attributes["to"])
            kind = next((k for k in REDUCED if str(k).endswith(f".{to}")), None)
            if kind is not None or (given[0] is not None and given[0].dtype in REDUCED):
                assert given[0] is not None
                return [given[0].to(kind or torch.float32)]
        if node.op_type in QDQ:
            assert given[0] is not None
            assert given[1] is not None
            return [QDQ[node.op_type](attributes, given[0], given[1])]
        reduced = next((t.dtype for t in given if t is not None and t.dtype in REDUCED), None)
        if node.op_type not in OPERATORS:
            if reduced is not None:
                raise ExportError(f"{node.op_type} ({node.name}) cannot be run in {reduced}")
            return self._by_reference(node, given)
        wide = [t.float() if t is not None and t.dtype in REDUCED else t for t in given]
        y = OPERATORS[node.op_type](attributes, *wide)
        if reduced is None:
            return [y]
        seen = [float(y.abs().amax()), self.largest.get(node.name, 0.0)]
        self.largest[node.name] = float(np.max(seen))  # NaN if one is
        return [y.to(reduced)]

    def _by_reference(self, node: onnx.NodeProto, given: Sequence[Tensor | None]) -> list[Tensor]:
        """Compute an operator in FP32 or of integers as the ONNX package defines it."""
        names = [name for name in node.input if name]
        function = helper.make_function(
            *("reference", "one_node", list(dict.fromkeys(names)), list(node.output)),
            *([node], self.opsets),
        )
        arrays = {
            name: t.numpy() for name, t in zip(node.input, given, strict=True) if t is not None
        }
        results = ReferenceEvaluator(function).run(None, arrays, attributes={})
        return [torch.from_numpy(np.array(result)) for result in results]


def _tensor(stored: onnx.TensorProto) -> Tensor:
    array = numpy_helper.to_array(stored)
    if stored.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def _quantise(attributes: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    y = torch.round(x.float() / _along(scale, attributes, x.ndim))  # halves to even
    return y.clamp_(-128, 127).to(torch.int8)


def _dequantise(attributes: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * _along(scale, attributes, x.ndim)).to(scale.dtype)


def _along(scale: Tensor, attributes: Attributes, rank: int) -> Tensor:
    """Return a scale, one number or one for each index of an axis, ready to be broadcast."""
    if scale.ndim == 0:
        return scale.float()
    axis = attributes.get("axis", 1) % rank
    return scale.float().reshape([-1 if n == axis else 1 for n in range(rank)])


# symmetric: the zero point is 0
QDQ: dict[str, Callable[[Attributes, Tensor, Tensor], Tensor]] = {
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _dequantise,
}
