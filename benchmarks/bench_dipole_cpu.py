"""The dipole operator on the CPU against a stored kernel between two transforms.

    python benchmarks/bench_dipole_cpu.py -o benchmarks/results/dipole_cpu.json

Both take and return float32 and use all cores for the transforms. What is compared with keeps D in
memory; ours makes it from the geometry at every call, which is why one engine serves every scan.
Interleaved, so that a busy machine slows both.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import scipy.fft
from common import parser, say, write

from qsm_deploy.kernels.dipole import dipole_convolve, dipole_kernel
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.console.peak_memory import (
    peak_rss_bytes,
    reset_peak,
    return_freed_memory,
    rss_bytes,
)

OBLIQUE = (0.36, 0.48, 0.8)
GRIDS = [
    Geometry((128, 128, 128)),
    Geometry((160, 192, 160)),
    Geometry((160, 192, 160), (0.8, 0.8, 2.0), OBLIQUE),
    Geometry((256, 256, 256)),
    Geometry((256, 256, 256), (0.8, 0.8, 2.0), OBLIQUE),
]
ROUNDS = 25


def main() -> None:
    """Measure, print and write."""
    args = parser(__doc__).parse_args()
    rows = []
    for geometry in GRIDS:
        x = np.random.default_rng(0).standard_normal(geometry.shape, dtype=np.float32)
        d = np.ascontiguousarray(dipole_kernel(geometry)[..., : geometry.shape[2] // 2 + 1])
        ours = partial(dipole_convolve, x, geometry)
        stored = partial(with_stored_kernel, x, d)
        seconds: dict[str, list[float]] = {"ours": [], "stored": []}
        for _ in range(ROUNDS):
            for name, run in (("stored", stored), ("ours", ours)):
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        ratios = np.divide(seconds["ours"], seconds["stored"])
        rows.append(
            {
                "shape": geometry.shape,
                "voxel_size_mm": geometry.voxel_size_mm,
                "b0_direction": geometry.b0_direction,
                "ours_seconds": round(statistics.median(seconds["ours"]), 4),
                "stored_kernel_seconds": round(statistics.median(seconds["stored"]), 4),
                "ratio": round(float(np.median(ratios)), 3),
                "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).round(3).tolist(),
                "ours_peak_bytes_per_voxel": peak_bytes(ours) / x.size,
                "stored_kernel_peak_bytes_per_voxel": (peak_bytes(stored) + d.nbytes) / x.size,
                "relative_error": relative_error(ours(), x, geometry),
            }
        )
        say(rows[-1])
    write(args.output, rows)


def with_stored_kernel(x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return what most scripts compute."""
    return scipy.fft.irfftn(scipy.fft.rfftn(x, workers=-1) * d, s=x.shape, workers=-1)


def relative_error(y: np.ndarray, x: np.ndarray, geometry: Geometry) -> float:
    """Return the error against the definition in double precision."""

    def dipole(sign: int) -> np.ndarray:
        k = [np.fft.fftfreq(n, d) for n, d in zip(x.shape, geometry.voxel_size_mm, strict=True)]
        kx, ky, kz = np.ix_(*(np.roll(f[::-1], 1) if sign < 0 else f for f in k))
        k_squared = kx**2 + ky**2 + kz**2
        k_squared[0, 0, 0] = 1
        bx, by, bz = geometry.b0_direction
        d: np.ndarray = 1 / 3 - (kx * bx + ky * by + kz * bz) ** 2 / k_squared
        d[0, 0, 0] = 0
        return d

    e = (dipole(1) + dipole(-1)) / 2
    exact = scipy.fft.ifftn(scipy.fft.fftn(x.astype(np.float64), workers=-1) * e, workers=-1).real
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the rise of the peak resident memory by one call."""
    gc.collect()
    return_freed_memory()
    reset_peak()
    before = rss_bytes()
    run()
    return peak_rss_bytes() - before


if __name__ == "__main__":
    main()
