"""The operators of ONNX that convolutional networks are made of, in PyTorch.

https://onnx.ai/onnx/operators/. What PyTorch has not is refused by name, never approximated.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qsm_deploy.kernels.errors import ExportError

Attributes = Mapping[str, Any]


def _convolution(a: Attributes, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    x, padding = _padded(a, x, tuple(weight.shape[2:]))
    convolve: Callable[..., Tensor] = getattr(functional, f"conv{x.ndim - 2}d")
    return convolve(
        x,
        weight,
        bias,
        padding=padding,
        stride=a.get("strides", 1),
        dilation=a.get("dilations", 1),
        groups=a.get("group", 1),
    )


def _transposed(a: Attributes, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    _refuse(a, "output_shape", bool(a.get("output_shape")))
    _refuse_auto_pad(a)
    rank = x.ndim - 2
    pads = a.get("pads") or [0] * (2 * rank)
    convolve: Callable[..., Tensor] = getattr(functional, f"conv_transpose{rank}d")
    more = a.get("output_padding") or [0] * rank
    low, high = pads[:rank], pads[rank:]
    # PyTorch takes the same off both ends: the larger is cut by hand
    y = convolve(
        x,
        weight,
        bias,
        stride=a.get("strides", 1),
        padding=[min(pair) for pair in zip(low, high, strict=True)],
        output_padding=more,
        groups=a.get("group", 1),
        dilation=a.get("dilations", 1),
    )
    for axis, (first, last) in enumerate(zip(low, high, strict=True), 2):
        begin, end = max(0, first - last), max(0, last - first)
        y = y.narrow(axis, begin, y.shape[axis] - begin - end) if begin or end else y
    return y


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    _refuse(a, "storage_order", bool(a.get("storage_order")))
    kernel = a["kernel_shape"]
    x, padding = _padded(a, x, kernel, value=float("-inf"))
    pool: Callable[..., Tensor] = getattr(functional, f"max_pool{x.ndim - 2}d")
    return pool(
        x,
        kernel,
        a.get("strides") or [1] * len(kernel),
        padding=padding,
        dilation=a.get("dilations", 1),
        ceil_mode=bool(a.get("ceil_mode")),
    )


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    _refuse(a, "dilations", any(n != 1 for n in a.get("dilations", ())))
    kernel = a["kernel_shape"]
    pads = a.get("pads") or [0]
    uneven = list(pads[: len(kernel)]) != list(pads[len(kernel) :]) and any(pads)
    _refuse(a, "uneven pads", uneven)
    _, padding = _padded(a, x, kernel)
    pool: Callable[..., Tensor] = getattr(functional, f"avg_pool{x.ndim - 2}d")
    return pool(
        x,
        kernel,
        a.get("strides") or [1] * len(kernel),
        padding=padding,
        ceil_mode=bool(a.get("ceil_mode")),
        count_include_pad=bool(a.get("count_include_pad")),
    )


def _padded(
    a: Attributes, x: Tensor, kernel: Sequence[int], value: float = 0.0
) -> tuple[Tensor, Sequence[int] | int]:
    """Return a volume, and the same padding at both ends that an operator is to add to it."""
    if (auto := _text(a, "auto_pad", "NOTSET")) in ("SAME_UPPER", "SAME_LOWER"):
        strides, dilations = (a.get(n) or [1] * len(kernel) for n in ("strides", "dilations"))
        _refuse(a, f"auto_pad {auto} and strides", any(n != 1 for n in strides))
        extents = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        low = [n // 2 if auto == "SAME_UPPER" else n - n // 2 for n in extents]
        high = [n - m for n, m in zip(extents, low, strict=True)]
    else:
        pads = a.get("pads") or [0] * (2 * len(kernel))
        low, high = list(pads[: len(kernel)]), list(pads[len(kernel) :])
    if low == high:
        return x, low
    both = [n for pair in zip(low[::-1], high[::-1], strict=True) for n in pair]
    return functional.pad(x, both, value=value), 0


def _refuse_auto_pad(a: Attributes) -> None:
    auto = _text(a, "auto_pad", "NOTSET")
    _refuse(a, f"auto_pad {auto}", auto not in ("NOTSET", "VALID"))


def _refuse(a: Attributes, what: str, refused: bool) -> None:
    if refused:
        raise ExportError(f"an operator with {what} cannot be run here")


def _text(a: Attributes, name: str, default: str) -> str:
    value = a.get(name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def _gelu(a: Attributes, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=_text(a, "approximate", "none"))


def _batch_norm(
    a: Attributes, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    _refuse(a, "training_mode", bool(a.get("training_mode")))
    return functional.batch_norm(x, mean, variance, scale, shift, eps=a.get("epsilon", 1e-5))


def _prelu(a: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _concat(a: Attributes, *parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=a["axis"])


# of values of one type; with a rounding of what they return they show what a precision costs
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Relu": lambda a, x: torch.relu(x),
    "LeakyRelu": lambda a, x: functional.leaky_relu(x, a.get("alpha", 0.01)),
    "PRelu": _prelu,
    "Elu": lambda a, x: functional.elu(x, a.get("alpha", 1.0)),
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Tanh": lambda a, x: torch.tanh(x),
    "Softplus": lambda a, x: functional.softplus(x),
    "Exp": lambda a, x: torch.exp(x),
    "Sqrt": lambda a, x: torch.sqrt(x),
    "Abs": lambda a, x: torch.abs(x),
    "Neg": lambda a, x: -x,
    "Gelu": _gelu,
    "Add": lambda a, x, y: x + y,
    "Sub": lambda a, x, y: x - y,
    "Mul": lambda a, x, y: x * y,
    "Div": lambda a, x, y: (
        x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")
    ),
    "Pow": lambda a, x, y: torch.pow(x, y),
    "Concat": _concat,
}
