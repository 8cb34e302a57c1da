"""How near the way from echoes to the local field comes to the truth, on a phantom.

    python benchmarks/bench_local_field.py -o benchmarks/results/local_field.json

Heads are measured as ``qsm-phantom --background --echoes`` does. Unwrapping is judged on a single
echo alone, where nothing else helps.
"""

import os
import time
from typing import Any

import numpy as np
from common import parser, say, write
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from qsm_deploy.calibration.phantom.contrast import Contrast, draw_contrast
from qsm_deploy.calibration.phantom.gradient_echo import GradientEcho, acquire, excitation_phase
from qsm_deploy.calibration.phantom.phantom import Phantom, dipole_field, head_phantom
from qsm_deploy.calibration.phantom.surroundings import background_field, draw_surroundings
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.local_field.background_removal import remove_background
from qsm_deploy.runtime.local_field.field_mapping import map_field
from qsm_deploy.runtime.local_field.unwrapping import TURN, unwrap

GRIDS = (
    Geometry((160, 192, 160), (1.0, 1.0, 1.0), (0.2, 0.1, 1.0)),
    Geometry((128, 144, 64), (1.25, 1.25, 2.5), (0.0, 0.3, 1.0)),
)
SNR = 40.0
ECHO_TIMES_S = (0.005, 0.011, 0.017)
LONG_ECHOES_S = (0.01, 0.02, 0.04)
DEEP_MM = 6.0


def nrmse_percent(result: Volume, truth: Volume, where: NDArray[np.bool_]) -> float:
    """Return the error of a field, both without their means [%]."""
    error, reference = (result - truth)[where], truth[where]
    size = np.linalg.norm(reference - reference.mean())
    return round(float(100 * np.linalg.norm(error - error.mean()) / size), 1)


def unwrapping_rows(total: Volume, contrast: Contrast, head: Phantom) -> list[dict[str, float]]:
    """Return the share of voxels that single echoes leave a turn off."""
    rng = np.random.default_rng(9)
    rows = []
    for seconds in LONG_ECHOES_S:
        sequence = GradientEcho((seconds,), snr=SNR)
        echo = acquire(sequence, contrast, total, head.mask, head.geometry, rng)
        angle = excitation_phase(head.geometry) + sequence.rad_per_ppm(0) * total
        found = unwrap(echo.phase_rad[0], head.mask, echo.magnitude[0])
        turns = (found - angle)[head.mask] / TURN
        turns -= np.rint(np.median(turns))
        rows.append(
            {
                "echo_time_s": seconds,
                "range_turns": round(float(np.ptp(angle[head.mask]) / TURN), 1),
                "off_by_turns_percent": round(100 * float(np.mean(np.abs(turns) > 0.5)), 4),
            }
        )
    return rows


def row(grid: Geometry) -> dict[str, Any]:
    """Return the errors and times of all steps on one grid."""
    head = head_phantom(grid, seed=1, noise_ppm=0.0)
    around = draw_surroundings(head.mask, grid)
    truth, total = head.local_field_ppm, dipole_field(head.chi_ppm, grid)
    total += background_field(around, grid)
    deep = distance_transform_edt(head.mask, sampling=grid.voxel_size_mm) > DEEP_MM
    rng = np.random.default_rng(8)
    contrast = draw_contrast(np.where(head.mask, head.labels, around), grid, rng)
    echoes = acquire(GradientEcho(ECHO_TIMES_S, snr=SNR), contrast, total, head.mask, grid, rng)
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
        "unwrapping": unwrapping_rows(total, contrast, head),
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
    write(args.output, rows, load_before=load, snr=SNR)


if __name__ == "__main__":
    main()
