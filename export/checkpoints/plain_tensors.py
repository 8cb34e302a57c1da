"""Tensors as checkpoints have them, made what a network takes: float32, dense, with values."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from qsm_deploy.export.checkpoints.file_kind import refuse_inflated
from qsm_deploy.kernels.errors import WeightsError

FLOAT_BYTES = 4
UNUSABLE: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (lambda t: t.is_nested, "is a nested tensor, expected one of a fixed shape"),
    (lambda t: t.is_meta, "has no values (device meta); load them before you save it"),
    (lambda t: t.is_quantized, "is quantised already ({}); pass the weights in floating point"),
    (lambda t: t.is_complex(), "is of type {}, expected real numbers; pass the network's weights"),
)


def plain_tensors(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a file's tensors, floating point as float32, without gradients, views or sparsity.

    Raises
    ------
    WeightsError
        If one has no values, is quantised, complex, or of a type without arithmetic, or all of
        them are far larger than the file.
    """
    for key, value in state.items():
        for applies, words in UNUSABLE:
            if applies(value):
                kind = str(value.dtype).removeprefix("torch.")
                raise WeightsError(f"{path}: {key} {words.format(kind)}")
    refuse_inflated(path, sum(FLOAT_BYTES * math.prod(value.shape) for value in state.values()))
    return {key: _plain(value, f"{path}: {key}") for key, value in state.items()}


def _plain(value: Tensor, where: str) -> Tensor:
    try:
        dense = value.detach().to_dense().resolve_neg()
        return (dense.float() if dense.is_floating_point() else dense).contiguous()
    except RuntimeError as error:
        raise WeightsError(
            f"{where} is of type {value.dtype}, which is none of plain numbers; save it as float32"
        ) from error
