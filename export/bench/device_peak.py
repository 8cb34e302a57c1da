"""What a device can do at most, measured: a matrix product and a copy."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

EDGE = {"cpu": 2048, "cuda": 8192}  # of the matrices: large enough to be bound by arithmetic
COPIED_BYTES = 2**28  # beyond the caches
REPEATS = 8
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DevicePeak:
    """The best of several runs.

    Attributes
    ----------
    flop_per_second
        Of a product of square matrices, by precision.
    bytes_per_second
        Read and written in a copy.
    """

    flop_per_second: dict[str, float]
    bytes_per_second: float


def measure_peak(device: str, precisions: Iterable[str]) -> DevicePeak | None:
    """Measure what PyTorch reaches, on a CPU with as many threads as it may use.

    A library that convolves by another algorithm than products can be above it, and so can
    everything that runs while the machine is less busy than during this measurement.

    Parameters
    ----------
    device
        ``cpu`` or ``cuda:N``.
    precisions
        Of the products: ``fp32``, ``fp16`` or ``bf16``; others are left out.

    Returns
    -------
    DevicePeak or None
        ``None`` if PyTorch cannot use the device.
    """
    if device != "cpu" and not torch.cuda.is_available():
        return None
    edge = EDGE[device.split(":")[0]]
    rates = {}
    for name in sorted(set(precisions) & TYPES.keys()):
        left = torch.ones(edge, edge, dtype=TYPES[name], device=device)
        product = torch.empty_like(left)
        rates[name] = 2.0 * edge**3 / shortest(partial(torch.mm, left, left, out=product))
    source = torch.ones(COPIED_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return DevicePeak(rates, 2.0 * COPIED_BYTES / shortest(lambda: target.copy_(source)))


def shortest(run: Callable[[], object]) -> float:
    """Return the time of the fastest of several runs, after one to warm up [s]."""
    times = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
