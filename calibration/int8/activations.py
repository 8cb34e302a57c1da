"""What the tensors of a network hold in the middle of heads, and what its convolutions cost."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qsm_deploy.calibration.graph.graph_run import GraphRun
from qsm_deploy.calibration.graph.nodes import CONVOLUTIONS
from qsm_deploy.calibration.int8.collectors import Histogram
from qsm_deploy.calibration.int8.patches import CalibrationPatch, Tensors
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.console.terminal import Progress, no_progress

SHARE_OF_VOXELS = 4  # every fourth voxel is counted, all of them for the largest value


def collect_histograms(
    model: onnx.ModelProto,
    tensors: Collection[str],
    patches: Sequence[CalibrationPatch],
    progress: Progress = no_progress,
) -> dict[str, Histogram]:
    """Return the magnitudes of tensors in the masks of all patches.

    Parameters
    ----------
    model
        In FP32.
    tensors
        Names of (n, c, x, y, z) tensors within it, on the patches' grid or one coarser by a whole
        factor. Of a coarser one the voxels count that lie in the mask by half or more.
    patches
        What the network takes.
    progress
        Shows how far it is.

    Raises
    ------
    DataError
        If a tensor is not finite.
    """
    names = sorted(tensors)
    histograms = {name: Histogram() for name in names}
    run = GraphRun(model, names)
    for patch in progress(patches, "calibrating"):
        for name, value in zip(names, run.look(patch.tensors), strict=True):
            inside = value[0][:, coarsened(patch.mask, value.shape[2:])]
            if not np.isfinite(inside).all():
                raise DataError(
                    f"{name} is not finite on the calibration data; check the maps, or export "
                    "the network in fp32"
                )
            histogram = histograms[name]
            histogram.add(inside[:, ::SHARE_OF_VOXELS])
            histogram.largest = max(histogram.largest, float(np.abs(inside).max(initial=0)))
    return histograms


def coarsened(mask: NDArray[np.bool_], shape: Sequence[int]) -> NDArray[np.bool_]:
    """Return a mask on a grid that is coarser by a whole factor along each axis."""
    factors = [n // m for n, m in zip(mask.shape, shape, strict=True)]
    if any(n != m * f for n, m, f in zip(mask.shape, shape, factors, strict=True)):
        raise DataError(
            f"a tensor of {tuple(shape)} voxels does not lie on a patch of {mask.shape}"
        )
    (x, y, z), (a, b, c) = shape, factors
    share: NDArray[np.float64] = mask.reshape(x, a, y, b, z, c).mean(axis=(1, 3, 5))
    coarse: NDArray[np.bool_] = share >= 0.5
    return coarse


def multiply_accumulates(model: onnx.ModelProto, tensors: Tensors) -> dict[str, int]:
    """Return the multiply-accumulates of each convolution, by its output, for one input."""
    sizes = {t.name: math.prod(t.dims) for t in model.graph.initializer}
    nodes = [
        node for node in model.graph.node if node.op_type in CONVOLUTIONS and node.input[1] in sizes
    ]
    # a convolution uses every weight once for each output voxel, a transposed one for each input
    counted = {
        node.output[0]: node.output[0] if node.op_type == "Conv" else node.input[0]
        for node in nodes
    }
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    shapes = {name: f"{name}_shape" for name in counted.values()}
    whole.graph.node.extend(
        helper.make_node("Shape", [name], [shape]) for name, shape in shapes.items()
    )
    found = GraphRun(whole, list(shapes.values())).look(tensors)
    voxels = {name: int(np.prod(shape[2:])) for name, shape in zip(shapes, found, strict=True)}
    return {
        node.output[0]: voxels[counted[node.output[0]]] * sizes[node.input[1]] for node in nodes
    }
