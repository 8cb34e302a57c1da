"""The weights in what MATLAB's ``exportONNXNetwork`` writes, by the names of its layers.

A network that MATLAB saves as an object is read by nothing else; its ONNX file is.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import Tensor

from qsm_deploy.kernels.errors import WeightsError

# of the operators with weights, what those are called in a state dict, in order after the input
WEIGHTS = {
    "Conv": ("weight", "bias"),
    "ConvTranspose": ("weight", "bias"),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
}
WITHOUT = {"Add", "AveragePool", "Concat", "Identity", "MaxPool", "Relu"}
EPSILON = 1e-5


def load_matlab_onnx(path: Path) -> dict[str, Tensor]:
    """Read the weights of a network that adds its input to what it computes.

    Returns
    -------
    tensors by name
        ``LAYER.weight`` and so on, as a module of PyTorch names and shapes them.

    Raises
    ------
    WeightsError
        If the file is damaged, has another operator in it, normalises with another epsilon, has
        two layers of a name, or does not end with that addition.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    except Exception as error:  # protobuf's own, which has no types
        raise WeightsError(f"{path}: truncated, or not one whole ONNX file") from error
    graph, state = model.graph, dict[str, Tensor]()
    for node in graph.node:
        if node.op_type not in WEIGHTS and node.op_type not in WITHOUT:
            raise WeightsError(
                f"{path}: {node.op_type} in it, which the network has not; pass what "
                "exportONNXNetwork writes of the authors' file"
            )
        if not np.isclose(_attribute(node, "epsilon", EPSILON), EPSILON, rtol=1e-3):
            raise WeightsError(f"{path}: {node.name} has another epsilon than {EPSILON}")
        for what, given in zip(WEIGHTS.get(node.op_type, ()), node.input[1:], strict=False):
            key = f"{node.name}.{what}"
            if key in state or given not in values:
                why = "two layers of this name" if key in state else "its values are not in there"
                raise WeightsError(f"{path}: {key}: {why}; export the network again")
            state[key] = torch.from_numpy(values[given].astype(np.float32))
    inputs = {value.name for value in graph.input} - values.keys()
    ends = {name: node for node in graph.node for name in node.output}
    last = ends.get(graph.output[0].name) if graph.output else None
    if last is None or last.op_type != "Add" or not inputs & set(last.input):
        raise WeightsError(
            f"{path}: does not end with the addition of its input; pass what exportONNXNetwork "
            "writes of the authors' file"
        )
    return state


def _attribute(node: NodeProto, name: str, default: float) -> float:
    return next((float(a.f) for a in node.attribute if a.name == name), default)
