"""What the methods and the bundled network take: time and memory; and COSMOS.

    python benchmarks/bench_methods.py -o benchmarks/results/methods.json

All of them on a head at 1 mm, axial, in processes of their own; total variation beside its bare
transforms; COSMOS of two and three orientations of that head, turned by 25 degrees. How accurate
the others are is in accuracy.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy.fft
from bench_accuracy import CONDITIONS, Case, cases, rows_of
from common import Row, parser, say, write

from qsm_deploy.calibration.phantom.orientation import tilted
from qsm_deploy.calibration.phantom.phantom import local_field
from qsm_deploy.kernels.inversion.field_noise import alpha_of_noise, field_noise
from qsm_deploy.kernels.inversion.grid import padded_box
from qsm_deploy.kernels.inversion.total_variation import ITERATIONS, total_variation
from qsm_deploy.runtime.methods.method import Method

REPEATS = 5
TIMED = (
    "tv",
    "tv --iterations 6",
    "tv --robust",
    "medi --magnitude magnitude.nii.gz",
    "tkd",
    "ilsqr",
    "tv-unet",
    "tv-unet --patch 96",
)
PROGRAM = f"{Path(sys.executable).parent}/qsm-run"


def rows_of_cosmos(case: Case) -> Iterator[Row]:
    """Yield COSMOS of two and of three orientations, with what removal leaves in each field."""
    for noise, left_over in CONDITIONS[1], CONDITIONS[3]:
        grids = tilted(case.geometry, 3, 25)
        turned = [
            replace(
                case,
                geometry=grid,
                field_ppm=local_field(
                    case.chi_ppm, case.mask, grid, noise_ppm=0.0, rng=np.random.default_rng(0)
                ),
            ).scan(noise, left_over)
            for grid in grids
        ]
        for count in (2, 3):
            scan = replace(
                turned[0],
                measured=np.concatenate([t.measured for t in turned[:count]]),
                more_b0_directions=tuple(grid.b0_direction for grid in grids[1:count]),
            )
            (row,) = rows_of("cosmos", Method("cosmos"), scan, case)
            seen = {"group": case.group, "case": case.name, "orientations": count}
            yield say(seen | {"noise_ppm": noise, "left_over": left_over} | row)


def memory_rows(case: Case, folder: Path) -> Iterator[Row]:
    """Yield time and memory of qsm-run with each method, each in a process of its own."""
    scan = replace(case.scan(*CONDITIONS[1]), magnitude=case.magnitude)
    volumes = {"field": scan.measured[0], "mask": scan.mask, "magnitude": scan.magnitude}
    volumes["chi"] = case.chi_ppm
    affine = np.diag([*case.geometry.voxel_size_mm, 1.0])
    for name, volume in volumes.items():
        image = nib.Nifti1Image(np.asarray(volume, dtype=np.float32), affine)
        image.to_filename(folder / f"{name}.nii.gz")
    for name in TIMED:
        line = f"{PROGRAM} field.nii.gz -m mask.nii.gz -o map.nii.gz --method {name}"
        more = ["--truth", "chi.nii.gz", "--report", "report.json", "--force", "-q"]
        command = [*line.split(), *more]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        report = json.loads((folder / "report.json").read_text())
        stages = [s for s in ("prepare", "inference", "inversion") if s in report["seconds"]]
        peak = max(report["memory"]["stage_peak_bytes"][s] for s in stages)
        predicted = max(report["plan"]["predicted_stage_bytes"][s] for s in stages)
        yield say(
            {
                "group": case.group,
                "case": case.name,
                "qsm_run": name,
                "nrmse_percent": round(report["metrics"]["nrmse_percent"], 2),
                "field_residual": round(report["field_residual"], 3),
                "seconds": round(sum(report["seconds"][s] for s in stages), 2),
                "total_seconds": report["total_seconds"],
                "peak_mib": round(peak / 2**20),
                "predicted_mib": round(predicted / 2**20),
            }
        )


def transforms_row(case: Case) -> Row:
    """Return how long TV takes beside its bare transforms, in turns."""
    scan = case.scan(*CONDITIONS[1])
    grid = padded_box(case.mask, case.geometry)
    shape, x = grid.geometry.shape, grid.embed(scan.measured[0])
    x += np.float32(1e-3)  # or pages of zeros would be one page in the cache
    ratios, seconds = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(2 * ITERATIONS + 2):
            scipy.fft.irfftn(scipy.fft.rfftn(x, workers=-1), s=shape, workers=-1)
        between = time.perf_counter()
        sigma = field_noise(scan.measured[0], case.mask, case.geometry)
        total_variation(
            scan.measured[0],
            case.mask,
            case.geometry,
            alpha_ppm_mm=alpha_of_noise(sigma, case.geometry),
            sigma_ppm=sigma,
        )
        ended = time.perf_counter()
        ratios.append((ended - between) / (between - began))
        seconds.append(ended - between)
    return say(
        {
            "group": case.group,
            "case": case.name,
            "padded_shape": shape,
            "method": "tv beside as many bare pairs of scipy.fft",
            "seconds": round(float(np.median(seconds)), 2),
            "ratio": round(float(np.median(ratios)), 2),
            "ratios": [round(ratio, 2) for ratio in ratios],
        }
    )


def main() -> None:
    """Measure, print a line each, and write them."""
    args = parser(__doc__).parse_args()
    (case,) = cases({"1 mm axial": 1}, None)
    with tempfile.TemporaryDirectory() as folder:
        rows = [transforms_row(case), *memory_rows(case, Path(folder))]
    write(args.output, [*rows, *rows_of_cosmos(case)])


if __name__ == "__main__":
    main()
