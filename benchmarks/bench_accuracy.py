"""Accuracy of every method and bundled network on the same volumes.

    python benchmarks/bench_accuracy.py --cosmos FOLDER -o benchmarks/results/accuracy.json

Heads that no training and no tuning saw, at 1 mm axial, at 1 mm with B0 tilted by 35 degrees, and
at 0.8 x 0.8 x 2 mm, and a real COSMOS map (chi_cosmos_ppm.nii.gz and mask.nii.gz in FOLDER), whose
field is simulated; at three noises, and with what background removal leaves. TKD and Tikhonov have
the setting that is best for each volume, which nobody knows of a scan. MEDI has a drawn magnitude,
so that it is not run on the COSMOS map. Networks run on what they were trained for, whole, and are
exported here.
"""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from common import Row, parser, say, write
from numpy.typing import NDArray

from qsm_deploy.calibration.phantom.contrast import draw_contrast
from qsm_deploy.calibration.phantom.phantom import head_phantom, local_field
from qsm_deploy.calibration.phantom.residual_background import residual_background
from qsm_deploy.kernels.dipole import tikhonov, tkd
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.job.request import Maker
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.metrics.metrics import all_metrics, nrmse
from qsm_deploy.runtime.reconstruction.correction import AUTO
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, open_reconstructor
from qsm_deploy.runtime.scan.nifti import load_on_grid, load_volume
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.bundled import BUNDLED

NOISE_PPM = 0.0025
THRESHOLDS = tuple(np.geomspace(0.05, 0.4, 7).round(4).tolist())
LAMBDAS = tuple(np.geomspace(0.0005, 0.05, 7).round(5).tolist())
PAD_VOXELS = 8
TILT = math.radians(35)
GRIDS = {
    "1 mm axial": Geometry((160, 192, 160)),
    "1 mm, B0 tilted 35 degrees": Geometry(
        (160, 192, 160), b0_direction=(math.sin(TILT) * 0.6, math.sin(TILT) * 0.8, math.cos(TILT))
    ),
    "0.8 x 0.8 x 2 mm": Geometry((200, 240, 80), (0.8, 0.8, 2.0)),
}
SEEDS = {"1 mm axial": 1, "1 mm, B0 tilted 35 degrees": 1, "0.8 x 0.8 x 2 mm": 1}
FIRST_SEED = 801
# noise, and what is left over [ppm]
CONDITIONS = ((0.0, 0.0), (NOISE_PPM, 0.0), (0.005, 0.0), (NOISE_PPM, 0.002), (NOISE_PPM, 0.005))
ECHO_TIME_S, SNR = 0.02, 40
FOUND = ("sigma_ppm", "alpha_ppm_mm", "last_change", "fitted_residual")
KEPT = {
    "nrmse_percent": 2,
    "xsim_uniform5": 3,
    "hfen_percent": 2,
    "dgm_linearity": 3,
    "calc_streak": 4,
}


@dataclass(frozen=True)
class Case:
    """One volume: a truth on its grid, with the field that it makes, and what else was drawn."""

    group: str
    name: str
    chi_ppm: Volume
    field_ppm: Volume
    mask: NDArray[np.bool_]
    geometry: Geometry
    labels: NDArray[np.integer] | None = None
    magnitude: Volume | None = None

    def noisy_field(self, noise_ppm: float, left_over_ppm: float = 0.0) -> Volume:
        """Return the field with noise and left-over background, the same in every call."""
        rng = np.random.default_rng(12345)
        noise = rng.standard_normal(self.field_ppm.shape, dtype=np.float32)
        field: Volume = self.field_ppm + np.float32(noise_ppm) * noise
        if left_over_ppm:
            field += residual_background(self.mask, self.geometry, rms_ppm=left_over_ppm, rng=rng)
        return field * self.mask

    def scan(self, noise_ppm: float, left_over_ppm: float = 0.0) -> Scan:
        """Return the acquisition."""
        field = self.noisy_field(noise_ppm, left_over_ppm)[None]
        return Scan(field, self.mask, self.geometry, nib.Nifti1Header(), np.eye(4))


def cases(seeds: dict[str, int], cosmos: Path | None) -> Iterator[Case]:
    """Yield so many heads of each group, then the COSMOS map."""
    for group, count in seeds.items():
        for seed in range(FIRST_SEED, FIRST_SEED + count):
            g = GRIDS[group]
            head = head_phantom(g, seed=seed, noise_ppm=0.0)
            magnitude = magnitude_of(head.labels, g, head.mask, seed)
            yield Case(
                group,
                f"seed {seed}",
                head.chi_ppm,
                head.local_field_ppm,
                head.mask,
                g,
                head.labels,
                magnitude,
            )
    if cosmos is not None:
        volume = load_volume(cosmos / "chi_cosmos_ppm.nii.gz")
        mask = load_on_grid(cosmos / "mask.nii.gz", volume).data > 0
        chi = volume.data * mask
        rng = np.random.default_rng(0)
        field = local_field(chi, mask, volume.geometry, noise_ppm=0.0, rng=rng)
        yield Case("COSMOS map", "cosmos2016", chi, field, mask, volume.geometry)


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


def oracle(invert: Callable[[float], Volume], grid: tuple[float, ...], case: Case) -> Row:
    """Return the setting of least NRMSE of a grid of them, and whether it lies on its edge."""
    errors = [nrmse(invert(value), case.chi_ppm, case.mask) for value in grid]
    best = int(np.argmin(errors))
    return {"setting": grid[best], "on_edge": best in (0, len(grid) - 1)}


def oracle_rows(case: Case, field_ppm: Volume) -> Iterator[Row]:
    """Yield TKD and Tikhonov with the setting that is best for the volume."""
    g = case.geometry
    inversions: dict[str, tuple[Callable[[float], Volume], tuple[float, ...]]] = {
        "best tkd": (
            lambda t: tkd(field_ppm, g, threshold=t, pad_voxels=PAD_VOXELS),
            THRESHOLDS,
        ),
        "best tikhonov": (
            lambda lam: tikhonov(field_ppm, g, lam=lam, pad_voxels=PAD_VOXELS),
            LAMBDAS,
        ),
    }
    for name, (invert, grid) in inversions.items():
        best = oracle(invert, grid, case)
        yield {"method": name, **scores(invert(best["setting"]) * case.mask, case), **best}


def scores(chi_ppm: Volume, case: Case) -> Row:
    """Return how near a map is to the truth."""
    metrics = all_metrics(chi_ppm, case.chi_ppm, case.mask, case.labels)
    return {key: round(metrics[key], digits) for key, digits in KEPT.items() if key in metrics}


def rows_of(name: str, maker: Maker, scan: Scan, case: Case) -> Iterator[Row]:
    """Yield how a method or network does, an IR2QSM after data consistency too.

    Nothing if it is not for that grid.
    """
    reconstructor = open_reconstructor(maker, Host())
    planned = reconstructor.plan(scan, Wants())
    if planned.prepared.facts:
        return  # resampled or turned
    began = time.perf_counter()
    made = reconstructor.run(planned, Stages())
    seconds = time.perf_counter() - began
    found = made.findings.get("inversion", {})
    told = {key: float(f"{found[key]:.4g}") for key in FOUND if key in found}
    yield {
        "method": name,
        **scores(made.map_ppm, case),
        **told,
        "seconds": round(seconds, 2),
    }
    if name == "ir2qsm":
        consistent, _ = AUTO.apply(made.map_ppm, scan, Stages())
        yield {"method": f"{name}, data consistency", **scores(consistent, case)}


def rows_of_case(case: Case, networks: dict[str, Path]) -> Iterator[Row]:
    """Yield what every method and network makes of every condition of a volume."""
    makers: dict[str, Maker] = {name: Method(name) for name in ("tkd", "tikhonov", "tv")}
    makers |= {name: [model] for name, model in networks.items()}
    for noise, left_over in CONDITIONS:
        scan = case.scan(noise, left_over)
        seen = {"group": case.group, "case": case.name, "noise_ppm": noise, "left_over": left_over}
        for row in oracle_rows(case, scan.measured[0]):
            yield say(seen | row)
        for name, maker in makers.items():
            for row in rows_of(name, maker, scan, case):
                yield say(seen | row)
        if case.magnitude is not None:
            with_edges = replace(scan, magnitude=case.magnitude)
            for row in rows_of("medi", Method("medi"), with_edges, case):
                yield say(seen | row)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return the mean of every group, condition and method."""
    keys = ("group", "noise_ppm", "left_over", "method")
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, group, strict=True))
        | {"volumes": len(found)}
        | {
            key: round(float(np.mean([row[key] for row in found])), digits)
            for key, digits in KEPT.items()
            if all(key in row for row in found)
        }
        for group, found in groups.items()
    ]


def exported(folder: Path) -> dict[str, Path]:
    """Return the networks that come along, one of which a user exports."""
    program, ir2qsm = Path(sys.executable).with_name("qsm-export"), folder / "ir2qsm.onnx"
    subprocess.run([program, "--model", "ir2qsm", "-o", ir2qsm, "-q"], check=True)
    return BUNDLED | {"ir2qsm": ir2qsm}


def main() -> None:
    """Evaluate, print and write."""
    p = parser(__doc__)
    p.add_argument("--cosmos", type=Path)
    args = p.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        networks = exported(Path(folder))
        for case in cases(SEEDS, args.cosmos):
            rows += rows_of_case(case, networks)
            write(args.output, rows, pad_voxels=PAD_VOXELS, summary=summary(rows))


if __name__ == "__main__":
    main()
