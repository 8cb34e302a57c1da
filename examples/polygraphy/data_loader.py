"""Inputs for NVIDIA's Polygraphy: what a network of qsm-export takes, of a drawn head.

    polygraphy run ir2qsm.onnx --onnxrt --data-loader-script examples/polygraphy/data_loader.py

The model is the first on the command line that is an ONNX file or a plan of qsm-export, or what
``QSM_MODEL`` names, as for a bare engine: its card says what to draw. Needs the extra ``export``.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.export.measure.verification import SHAPES, phantom_inputs, phantom_scan
from qsm_deploy.runtime.card.read import ONNX, PLAN, load_card


def load_data() -> Iterator[dict[str, NDArray[np.float32]]]:
    """Yield the inputs of a few runs by name: volumes (1, c, x, y, z), float32 in each precision.

    The heads and the units are those that every export is verified with; sizes are rounded up to
    what the network divides.
    """
    card = load_card(_model())
    for shape in SHAPES:
        x, y, z = (card.divisor * math.ceil(size / card.divisor) for size in shape)
        inputs = phantom_inputs(card, phantom_scan(card, (x, y, z)))
        yield {
            tensor.name: inputs[tensor.name][None] if tensor.is_volume else inputs[tensor.name]
            for tensor in card.inputs
        }


def _model() -> Path:
    named = [os.environ["QSM_MODEL"]] if "QSM_MODEL" in os.environ else sys.argv[1:]
    models = [path for path in map(Path, named) if path.suffix in (ONNX, PLAN)]
    if not models:
        sys.exit(f"no {ONNX} or {PLAN} of qsm-export on the command line: set QSM_MODEL to it")
    return models[0]
