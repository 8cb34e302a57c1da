"""Exported models given in place of weights: what they are, and what to pass instead."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor

from qsm_deploy.calibration.int8.qdq import is_quantised
from qsm_deploy.kernels.errors import CardError, EngineError, WeightsError
from qsm_deploy.runtime.card.read import ONNX, load_card


def refuse_models(paths: list[Path], network: str, *, may_be_onnx: bool = False) -> None:
    """Refuse ONNX files among the weights, but those that such a network's may be.

    Raises
    ------
    WeightsError
        If there is one: it names what the file is by its card, and that it is quantised already
        or another network's.
    """
    for path in paths:
        if path.suffix.lower() != ONNX or not path.is_file():
            continue
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's own, which has no types
            raise WeightsError(
                f"{path}: no weights, and damaged; pass the authors' file"
            ) from error
        instead = "pass the weights that it was made from"
        said = None
        with contextlib.suppress(CardError, EngineError):
            if (said := load_card(path).network) != network:
                raise WeightsError(f"{path}: its card says {said}, not {network}; {instead}")
        if is_quantised(model):
            raise WeightsError(f"{path}: quantised to INT8 already; {instead}")
        if said or not may_be_onnx:
            raise WeightsError(f"{path}: an exported model, no weights; {instead}")


def refuse_quantised(state: Mapping[str, Tensor]) -> None:
    """Refuse weights in INT8.

    Raises
    ------
    WeightsError
        If a tensor is quantised.
    """
    for name, value in state.items():
        if value.dtype in (torch.int8, torch.uint8):
            raise WeightsError(
                f"{name} is quantised already ({str(value.dtype).removeprefix('torch.')}); pass "
                "the weights in floating point"
            )
