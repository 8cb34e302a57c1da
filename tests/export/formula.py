"""Weights that follow from a formula, so that two programs fill a network alike."""

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


def fill(shapes: Mapping[str, Tensor]) -> State:
    """Return values for a state dict's keys and shapes."""
    norms = {key.removesuffix("running_mean") for key in shapes if key.endswith("running_mean")}
    return {key: _value(key, tensor, norms) for key, tensor in shapes.items()}


def _value(key: str, like: Tensor, norms: set[str]) -> Tensor:
    if not like.is_floating_point():
        return like
    r = _pseudo_random(key, like.numel()).reshape(tuple(like.shape))
    if key.endswith("running_var"):
        r = 1 + 0.5 * r
    elif key.endswith("weight") and key.removesuffix("weight") in norms:
        r = 1 + 0.2 * r
    elif key == "alpha":
        r = np.full_like(r, 1.5)
    elif "params_" in key:
        r = 1 + 0.5 * r
    elif like.ndim <= 1:
        r = 0.1 * r
    else:
        r = r * np.sqrt(3 / np.prod(like.shape[1:]))
    return torch.from_numpy(np.asarray(r, dtype=np.float32))


def _pseudo_random(name: str, count: int) -> np.ndarray:
    s = zlib.crc32(name.encode()) % 10007
    v = np.sin(12.9898 * (np.arange(count) + 1) + 78.233 * (s + 1)) * 43758.5453
    return (v - np.floor(v)) * 2 - 1
