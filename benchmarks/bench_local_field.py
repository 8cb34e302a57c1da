"""How near the way from echoes to the local field comes to the truth, on a phantom.

    python benchmarks/bench_local_field.py -o benchmarks/results/local_field.json

The background is that of the air around a head and in a cavity, shimmed up to the second order.
Echoes have noise of 3 % of the signal and an initial phase that varies over the head. Unwrapping
is judged on a single echo alone, where nothing else helps.
"""

import math
import os
import time
from typing import Any

import numpy as np
from common import parser, say, write
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

from qsm_deploy.calibration.phantom.phantom import Phantom, head_phantom
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.local_field.background_removal import remove_background
from qsm_deploy.runtime.local_field.field_mapping import Echoes, map_field
from qsm_deploy.runtime.local_field.unwrapping import unwrap

GRIDS = (
    Geometry((160, 192, 160), (1.0, 1.0, 1.0), (0.2, 0.1, 1.0)),
    Geometry((128, 144, 64), (1.25, 1.25, 2.5), (0.0, 0.3, 1.0)),
)
TESLA, MEGAHERTZ_PER_TESLA = 3.0, 42.577
NOISE = 0.03
ECHO_TIMES_S = (0.005, 0.011, 0.017)
LONG_ECHOES_S = (0.01, 0.02, 0.04)
DEEP_MM = 6.0


def background_ppm(head: Phantom) -> Volume:
    """Return the field of everything outside the head, within the mask."""
    grid = head.geometry
    outside = distance_transform_edt(~head.mask, sampling=grid.voxel_size_mm)
    axes = np.meshgrid(
        *[
            (np.arange(n) - (n - 1) / 2) * v / 80
            for n, v in zip(grid.shape, grid.voxel_size_mm, strict=True)
        ],
        indexing="ij",
    )
    x, y, z = axes
    air = np.where(outside > 12, 9.4, 0).astype(np.float32)
    cavity = x * x + (y - 0.95) ** 2 + (z + 0.5) ** 2 < 0.15**2
    air[cavity & (outside > 4)] = 9.4
    air = gaussian_filter(air, 1.0) * (outside > 1.5)
    field = dipole_convolve(air, grid, pad_voxels=tuple(n // 2 for n in grid.shape))
    second = [x * y, x * z, y * z, x * x - y * y, 2 * z * z - x * x - y * y]
    shims = np.stack([np.ones_like(x), x, y, z, *second], axis=-1)[head.mask]
    shimmed = np.zeros_like(field)
    inside = field[head.mask]
    shimmed[head.mask] = inside - shims @ np.linalg.lstsq(shims, inside, rcond=None)[0]
    return shimmed


def echoes_of(field_ppm: Volume, head: Phantom) -> Echoes:
    """Return what a scanner would measure."""
    rng = np.random.default_rng(8)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in field_ppm.shape], indexing="ij")
    initial = 2.0 + 1.5 * x - y + x * z
    phase, magnitude = [], []
    for seconds in ECHO_TIMES_S:
        angle = initial + 2 * math.pi * MEGAHERTZ_PER_TESLA * TESLA * seconds * field_ppm
        signal = np.where(head.mask, math.exp(-seconds / 0.04), 0.02) * np.exp(1j * angle)
        noise = rng.standard_normal((2, *field_ppm.shape)) * NOISE / math.sqrt(2)
        signal += noise[0] + 1j * noise[1]
        phase.append(np.angle(signal).astype(np.float32))
        magnitude.append(np.abs(signal).astype(np.float32))
    return Echoes(
        np.stack(phase), np.stack(magnitude), ECHO_TIMES_S, TESLA, head.geometry.voxel_size_mm
    )


def nrmse_percent(result: Volume, truth: Volume, where: NDArray[np.bool_]) -> float:
    """Return the error of a field, both without their means [%]."""
    error, reference = (result - truth)[where], truth[where]
    size = np.linalg.norm(reference - reference.mean())
    return round(float(100 * np.linalg.norm(error - error.mean()) / size), 1)


def unwrapping_rows(total: Volume, head: Phantom) -> list[dict[str, float]]:
    """Return the share of voxels that single echoes leave a turn off."""
    rows = []
    rng = np.random.default_rng(9)
    for seconds in LONG_ECHOES_S:
        angle = 2 * math.pi * MEGAHERTZ_PER_TESLA * TESLA * seconds * total
        noise = rng.standard_normal((2, *total.shape)) * NOISE / math.sqrt(2)
        signal = np.where(head.mask, 1.0, 0.02) * np.exp(1j * angle) + noise[0] + 1j * noise[1]
        found = unwrap(
            np.angle(signal).astype(np.float32), head.mask, np.abs(signal).astype(np.float32)
        )
        turns = (found - angle)[head.mask] / (2 * math.pi)
        turns -= np.rint(np.median(turns))
        rows.append(
            {
                "echo_time_s": seconds,
                "range_turns": round(float(np.ptp(angle[head.mask])) / (2 * math.pi), 1),
                "off_by_turns_percent": round(100 * float(np.mean(np.abs(turns) > 0.5)), 4),
            }
        )
    return rows


def row(grid: Geometry) -> dict[str, Any]:
    """Return the errors and times of all steps on one grid."""
    head = head_phantom(grid, seed=1, noise_ppm=0.0)
    background = background_ppm(head)
    truth, total = head.local_field_ppm, head.local_field_ppm + background
    deep = distance_transform_edt(head.mask, sampling=grid.voxel_size_mm) > DEEP_MM
    echoes = echoes_of(total, head)
    began = time.perf_counter()
    field, _ = map_field(echoes, head.mask)
    mapped = time.perf_counter()
    local, _ = remove_background(field, head.mask, grid)
    removed = time.perf_counter()
    exact, _ = remove_background(total, head.mask, grid)
    error = np.abs((field - total)[deep] - np.median((field - total)[deep]))
    return {
        "shape": grid.shape,
        "voxel_size_mm": grid.voxel_size_mm,
        "background_over_local": round(
            float(np.std(total[head.mask]) / np.std(truth[head.mask])), 1
        ),
        "unwrapping": unwrapping_rows(total, head),
        "field_error_median_ppb": round(1000 * float(np.median(error)), 2),
        "field_error_p99_ppb": round(1000 * float(np.percentile(error, 99)), 2),
        "removal_nrmse_percent": nrmse_percent(exact, truth, head.mask),
        "removal_deep_nrmse_percent": nrmse_percent(exact, truth, deep),
        "both_nrmse_percent": nrmse_percent(local, truth, head.mask),
        "both_deep_nrmse_percent": nrmse_percent(local, truth, deep),
        "field_mapping_s": round(mapped - began, 2),
        "background_removal_s": round(removed - mapped, 2),
    }


def main() -> None:
    """Measure, print and write."""
    args = parser(__doc__).parse_args()
    load = round(os.getloadavg()[0], 2)
    rows = [say(row(grid)) for grid in GRIDS]
    write(args.output, rows, load_before=load, noise=NOISE)


if __name__ == "__main__":
    main()
