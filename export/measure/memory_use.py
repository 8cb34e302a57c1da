"""Measuring what one inference takes, for the card: a fixed part and a part for every voxel.

Each measurement is a fresh process (``python -m qsm_deploy.export.measure.memory_use MODEL BACKEND
X Y Z``), because what a process has freed before would hide what the next session takes.
"""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.kernels.geometry import Shape
from qsm_deploy.runtime.card.card import MemoryUse
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.console.peak_memory import peak_rss_bytes, reset_peak, rss_bytes
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import BACKENDS, Backend

# far enough apart for a slope, the smaller one little but the fixed part, multiples of every power
# of two up to 16, and not slow; rounded up to the divisor
SHAPES: tuple[Shape, Shape] = ((32, 32, 32), (112, 96, 96))


def measure_memory(path: Path, backend: Backend, shapes: tuple[Shape, Shape] = SHAPES) -> MemoryUse:
    """Return the line through the peaks at two shapes, or that of a tile where there are tiles.

    Parameters
    ----------
    path
        An ONNX file.
    backend
        One that is installed.
    shapes
        Two sizes, the smaller first; rounded up to multiples of the divisor.

    Raises
    ------
    ExportError
        If a measurement fails.
    """
    card = load_card(path)
    if card.tiles is not None:  # nothing else is ever run
        peak = _peak_in_new_process(path, backend, card.tiles.size)
        return MemoryUse(max(0, peak - math.prod(card.tiles.size)), 1)
    fitting = [shape_for(card.divisor, shape) for shape in shapes]
    (small, large), (low, high) = (
        [math.prod(shape) for shape in fitting],
        [_peak_in_new_process(path, backend, shape) for shape in fitting],
    )
    slope = max(0.0, (high - low) / (large - small))
    return MemoryUse(max(0, round(low - slope * small)), math.ceil(slope))


def shape_for(divisor: int, shape: Shape) -> Shape:
    """Return a shape rounded up to multiples of a divisor."""
    x, y, z = (divisor * math.ceil(n / divisor) for n in shape)
    return x, y, z


def peak_bytes(path: Path, backend: Backend, shape: Shape) -> int:
    """Return the rise of this process's peak by a session and two runs [bytes].

    Counts from just before the session opens, with the backend imported and the inputs in
    place; the second run is there because the first output is still held while it works.
    """
    importlib.import_module(f"qsm_deploy.runtime.sessions.{backend}")
    rng = np.random.default_rng(0)
    sizes: dict[int | str, int] = dict(zip("nxyz", (1, *shape), strict=True))
    inputs = {
        tensor.name: rng.random([sizes.get(n, 0) or int(n) for n in tensor.shape], dtype=np.float32)
        for tensor in load_card(path).inputs
    }
    reset_peak()
    before = rss_bytes()
    session = open_session(path, backend)
    for _ in range(2):
        output = session.run(inputs)
    rise = peak_rss_bytes() - before
    del output
    return rise


def _peak_in_new_process(path: Path, backend: Backend, shape: Shape) -> int:
    command = [sys.executable, "-m", "qsm_deploy.export.measure.memory_use", str(path), backend]
    done = subprocess.run(
        command + [str(n) for n in shape],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ExportError(f"measuring the memory of {backend} at {shape} failed: {reason}")
    return int(done.stdout)


if __name__ == "__main__":
    backend = next(b for b in BACKENDS if b == sys.argv[2])
    x, y, z = (int(n) for n in sys.argv[3:6])
    sys.stdout.write(f"{peak_bytes(Path(sys.argv[1]), backend, (x, y, z))}\n")
