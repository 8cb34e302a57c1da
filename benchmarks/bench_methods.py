"""Every method and bundled network on the same volumes: error, residual, time and memory.

    python benchmarks/bench_methods.py --cosmos FOLDER [MODEL.onnx ...] \
        -o benchmarks/results/methods.json

Heads that nothing was chosen on, at 1 mm axial, with B0 tilted by 35 degrees, and at
0.8 x 0.8 x 2 mm, and a real COSMOS map (chi_cosmos_ppm.nii.gz and mask.nii.gz in FOLDER) whose
field is simulated, without noise, with 0.0025 and 0.005 ppm, and with 0.0025 ppm and 0.002 ppm of
what background removal leaves. MEDI has a drawn magnitude, so that it is not run on the COSMOS map;
COSMOS has three fields of the first head, which is turned by 25 degrees. Networks run on what they
were trained for.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import bench_accuracy
import nibabel as nib
import numpy as np
import scipy.fft
from common import Row, parser, say, write
from numpy.typing import NDArray

from qsm_deploy.calibration.phantom.contrast import draw_contrast
from qsm_deploy.calibration.phantom.orientation import tilted
from qsm_deploy.calibration.phantom.phantom import head_phantom, local_field
from qsm_deploy.calibration.phantom.residual_background import residual_background
from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.kernels.inversion.field_noise import alpha_of_noise, field_noise
from qsm_deploy.kernels.inversion.grid import padded_box
from qsm_deploy.kernels.inversion.total_variation import ITERATIONS, total_variation
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.job.request import Maker, maker_from
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.metrics.metrics import all_metrics, field_residual
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, open_reconstructor
from qsm_deploy.runtime.scan.scan import Scan

SEEDS = {"1 mm axial": 4, "1 mm, B0 tilted 35 degrees": 1, "0.8 x 0.8 x 2 mm": 1}
FIRST_SEED = 801
CONDITIONS = ((0.0, 0.0), (0.0025, 0.0), (0.005, 0.0), (0.0025, 0.002))  # noise, left-over [ppm]
ECHO_TIME_S, SNR = 0.02, 40
REPEATS = 5
TIMED = ("tv", "tv --robust", "medi --magnitude magnitude.nii.gz", "tkd", "ilsqr", "tkd-unet")
PROGRAM = f"{Path(sys.executable).parent}/qsm-run"
FOUND = ("sigma_ppm", "alpha_ppm_mm", "last_change", "fitted_residual", "unseen")
KEPT = {
    "nrmse_percent": 2,
    "xsim_uniform5": 3,
    "hfen_percent": 2,
    "dgm_linearity": 3,
    "calc_streak": 4,
}


@dataclass(frozen=True)
class Case(bench_accuracy.Case):
    """A volume, and what else was drawn."""

    labels: NDArray[np.integer] | None = None
    magnitude: Volume | None = None

    def scan(self, noise_ppm: float, left_over_ppm: float) -> Scan:
        """Return the acquisition, the same in every call."""
        rng = np.random.default_rng(12345)
        noise = rng.standard_normal(self.field_ppm.shape, dtype=np.float32)
        field = self.field_ppm + np.float32(noise_ppm) * noise
        if left_over_ppm:
            field += residual_background(self.mask, self.geometry, rms_ppm=left_over_ppm, rng=rng)
        return Scan(
            (field * self.mask)[None], self.mask, self.geometry, nib.Nifti1Header(), np.eye(4)
        )


def cases(cosmos: Path | None) -> Iterator[Case]:
    """Yield the heads, then the COSMOS map."""
    for group, geometry in bench_accuracy.GRIDS.items():
        for seed in range(FIRST_SEED, FIRST_SEED + SEEDS[group]):
            head = head_phantom(geometry, seed=seed, noise_ppm=0.0)
            yield Case(
                group,
                f"seed {seed}",
                head.chi_ppm,
                head.local_field_ppm,
                head.mask,
                geometry,
                head.labels,
                magnitude_of(head.labels, geometry, head.mask, seed),
            )
    for case in bench_accuracy.cases([], cosmos):
        yield Case(**vars(case))


def magnitude_of(
    labels: NDArray[np.integer], geometry: Geometry, mask: NDArray[np.bool_], seed: int
) -> Volume:
    """Return a magnitude of the head, at 20 ms and 3 T, of an SNR of 40."""
    rng = np.random.default_rng(seed)
    contrast = draw_contrast(labels, geometry, rng)
    signal = contrast.m0 * np.exp(-ECHO_TIME_S * contrast.r2_star_3t)
    noise = rng.standard_normal((2, *mask.shape), dtype=np.float32) * (signal[mask].mean() / SNR)
    magnitude: Volume = np.hypot(signal + noise[0], noise[1]) * mask
    return magnitude


def row_of(maker: Maker, scan: Scan, case: Case) -> Row | None:
    """Return how a method or network does, or nothing if it is not for that grid."""
    name = maker.name if isinstance(maker, Method) else maker[0].stem
    reconstructor = open_reconstructor(maker, Host())
    try:
        planned = reconstructor.plan(scan, Wants())
    except GeometryError:
        return None
    began = time.perf_counter()
    made = reconstructor.run(planned, Stages())
    seconds = time.perf_counter() - began
    metrics = all_metrics(made.chi_ppm, case.chi_ppm, case.mask, case.labels)
    residual = field_residual(made.chi_ppm, scan.measured[0], case.mask, case.geometry)
    found = made.findings.get("inversion", {})
    return {
        "method": name,
        **{key: round(metrics[key], digits) for key, digits in KEPT.items() if key in metrics},
        "field_residual": round(residual, 3),
        **{key: float(f"{found[key]:.4g}") for key in FOUND if key in found},
        "seconds": round(seconds, 2),
    }


def rows_of_case(case: Case, models: Sequence[Path], *, first: bool) -> Iterator[Row]:
    """Yield what every method and network makes of every condition of a volume."""
    for noise, left_over in CONDITIONS:
        scan = case.scan(noise, left_over)
        seen = {"group": case.group, "case": case.name, "noise_ppm": noise, "left_over": left_over}
        makers: list[Maker] = [maker_from([model]) for model in models]
        makers += [maker_from([], method=name) for name in ("tkd-unet", "tkd", "tikhonov", "tv")]
        if first and (noise, left_over) == CONDITIONS[1]:
            makers.append(Method("ilsqr"))
        for maker in makers:
            if (row := row_of(maker, scan, case)) is not None:
                yield say(seen | row)
        if case.magnitude is not None:
            with_edges = replace(scan, magnitude=case.magnitude)
            if (row := row_of(Method("medi"), with_edges, case)) is not None:
                yield say(seen | row)


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
            row = row_of(Method("cosmos"), scan, case)
            assert row is not None
            seen = {"group": case.group, "case": case.name, "orientations": count}
            yield say(seen | {"noise_ppm": noise, "left_over": left_over} | row)


def memory_rows(case: Case, folder: Path) -> Iterator[Row]:
    """Yield time and memory of qsm-run with each method, each in a process of its own."""
    scan = replace(case.scan(*CONDITIONS[1]), magnitude=case.magnitude)
    volumes = {"field": scan.measured[0], "mask": scan.mask, "magnitude": scan.magnitude}
    affine = np.diag([*case.geometry.voxel_size_mm, 1.0])
    for name, volume in volumes.items():
        image = nib.Nifti1Image(np.asarray(volume, dtype=np.float32), affine)
        image.to_filename(folder / f"{name}.nii.gz")
    for name in (
        "tv",
        "tv --robust",
        "medi --magnitude magnitude.nii.gz",
        "tkd",
        "ilsqr",
        "tkd-unet",
    ):
        line = f"{PROGRAM} --method {name} field.nii.gz -m mask.nii.gz -o chi.nii.gz"
        command = [*line.split(), "--report", "report.json", "--force", "-q"]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        report = json.loads((folder / "report.json").read_text())
        stage = "inversion" if "inversion" in report["seconds"] else "inference"
        peak = report["memory"]["stage_peak_bytes"][stage]
        predicted = report["plan"]["predicted_stage_bytes"][stage]
        yield say(
            {
                "group": case.group,
                "case": case.name,
                "qsm_run": name,
                "seconds": report["seconds"][stage],
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
    p = parser(__doc__)
    p.add_argument("models", type=Path, nargs="*")
    p.add_argument("--cosmos", type=Path)
    args = p.parse_args()
    rows: list[Row] = []
    groups: set[str] = set()
    for case in cases(args.cosmos):
        if not groups:
            with tempfile.TemporaryDirectory() as folder:
                rows += [transforms_row(case), *memory_rows(case, Path(folder))]
            rows += rows_of_cosmos(case)
        rows += rows_of_case(case, args.models, first=case.group not in groups)
        groups.add(case.group)
        write(args.output, rows)


if __name__ == "__main__":
    main()
