"""Accuracy of the networks beside TKD and Tikhonov, each tuned by an oracle on every volume.

    python benchmarks/bench_accuracy.py MODEL.onnx ... -o benchmarks/results/accuracy.json

Heads no network was trained on: at 1 mm axial, at 1 mm with B0 tilted by 35 degrees, and at
0.8 x 0.8 x 2 mm; with ``--cosmos FOLDER`` also a real COSMOS map (chi_cosmos_ppm.nii.gz and
mask.nii.gz), whose field is simulated. Every volume without noise and with 0.0025 ppm.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from common import Row, parser, say, write
from numpy.typing import NDArray

from qsm_deploy.calibration.phantom.phantom import head_phantom, local_field
from qsm_deploy.kernels.dipole import tikhonov, tkd
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.metrics.metrics import nrmse, xsim
from qsm_deploy.runtime.reconstruction.patches import plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.scan.geometry_limits import deviations
from qsm_deploy.runtime.scan.nifti import load_on_grid, load_volume
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.open import choose_backend, open_session
from qsm_deploy.runtime.sessions.session import Session

NOISE_PPM = 0.0025
THRESHOLDS = tuple(np.geomspace(0.05, 0.4, 13).round(4).tolist())
LAMBDAS = tuple(np.geomspace(0.0005, 0.05, 13).round(5).tolist())
PAD_VOXELS = 8
TILT = math.radians(35)
GRIDS = {
    "1 mm axial": Geometry((160, 192, 160)),
    "1 mm, B0 tilted 35 degrees": Geometry(
        (160, 192, 160), b0_direction=(math.sin(TILT) * 0.6, math.sin(TILT) * 0.8, math.cos(TILT))
    ),
    "0.8 x 0.8 x 2 mm": Geometry((200, 240, 80), (0.8, 0.8, 2.0)),
}


@dataclass(frozen=True)
class Case:
    """One volume: a truth on its grid, with the field that it makes."""

    group: str
    name: str
    chi_ppm: Volume
    field_ppm: Volume
    mask: NDArray[np.bool_]
    geometry: Geometry

    def noisy_field(self, noise_ppm: float) -> Volume:
        """Return the field with Gaussian noise, the same in every call."""
        rng = np.random.default_rng(12345)
        noise = rng.standard_normal(self.field_ppm.shape, dtype=np.float32)
        field: Volume = (self.field_ppm + np.float32(noise_ppm) * noise) * self.mask
        return field


def cases(seeds: list[int], cosmos: Path | None) -> Iterator[Case]:
    """Yield the held-out heads, then the COSMOS map."""
    for group, geometry in GRIDS.items():
        for seed in seeds:
            head = head_phantom(geometry, seed=seed, noise_ppm=0.0)
            yield Case(
                group, f"seed {seed}", head.chi_ppm, head.local_field_ppm, head.mask, geometry
            )
    if cosmos is not None:
        volume = load_volume(cosmos / "chi_cosmos_ppm.nii.gz")
        mask = load_on_grid(cosmos / "mask.nii.gz", volume).data > 0
        chi = volume.data * mask
        rng = np.random.default_rng(0)
        field = local_field(chi, mask, volume.geometry, noise_ppm=0.0, rng=rng)
        yield Case("COSMOS map", "cosmos2016", chi, field, mask, volume.geometry)


def oracle(invert: Callable[[float], Volume], grid: tuple[float, ...], case: Case) -> Row:
    """Return the best NRMSE over a grid of settings, and whether it lies on the grid's edge."""
    errors = [nrmse(invert(value), case.chi_ppm, case.mask) for value in grid]
    best = int(np.argmin(errors))
    return {
        "nrmse_percent": round(errors[best], 2),
        "setting": grid[best],
        "on_edge": best in (0, len(grid) - 1),
        "xsim": round(xsim(invert(grid[best]), case.chi_ppm, case.mask), 4),
    }


def oracles(case: Case, noise_ppm: float) -> Row:
    """Return TKD and Tikhonov with the setting that is best for the volume."""
    field, g = case.noisy_field(noise_ppm), case.geometry
    row: Row = {}
    row["tkd"] = oracle(
        lambda t: tkd(field, g, threshold=t, pad_voxels=PAD_VOXELS), THRESHOLDS, case
    )
    row["tikhonov"] = oracle(
        lambda lam: tikhonov(field, g, lam=lam, pad_voxels=PAD_VOXELS), LAMBDAS, case
    )
    return row


def evaluate(case: Case, noise_ppm: float, sessions: dict[str, Session]) -> Row:
    """Return a row of every network that may be used on the grid."""
    field, g = case.noisy_field(noise_ppm), case.geometry
    row: Row = {"group": case.group, "case": case.name, "noise_ppm": noise_ppm}
    scan = Scan(field[None], case.mask, g, nib.Nifti1Header(), np.eye(4))
    for name, session in sessions.items():
        if deviations(session.card.geometry, g):
            continue
        plan = plan_whole(g.shape, session.card.divisor)
        chi = reconstruct(session, scan, plan, Stages())
        row[name] = {
            "nrmse_percent": round(nrmse(chi, case.chi_ppm, case.mask), 2),
            "xsim": round(xsim(chi, case.chi_ppm, case.mask), 4),
        }
    return row


def summary(rows: list[Row], name: str) -> list[Row]:
    """Return the mean of every group and noise beside the better oracle's."""
    found = []
    for group, noise in dict.fromkeys((row["group"], row["noise_ppm"]) for row in rows):
        chosen = [r for r in rows if (r["group"], r["noise_ppm"]) == (group, noise) and name in r]
        if not chosen:
            continue
        means = {
            k: float(np.mean([r[k]["nrmse_percent"] for r in chosen]))
            for k in ("tkd", "tikhonov", name)
        }
        better = min(means["tkd"], means["tikhonov"])
        found.append(
            {
                "network": name,
                "group": group,
                "noise_ppm": noise,
                "volumes": len(chosen),
                "network_nrmse_percent": round(means[name], 2),
                "tkd_nrmse_percent": round(means["tkd"], 2),
                "tikhonov_nrmse_percent": round(means["tikhonov"], 2),
                "below_better_oracle_percent": round(100 * (1 - means[name] / better), 1),
            }
        )
    return found


def main() -> None:
    """Evaluate, print and write."""
    p = parser(__doc__)
    p.add_argument("models", type=Path, nargs="+", help="exported networks")
    p.add_argument("--seeds", type=int, nargs="+", default=[501, 502, 503, 504])
    p.add_argument("--cosmos", type=Path)
    p.add_argument("--networks-only", action="store_true", help="no oracles, which take longest")
    args = p.parse_args()
    backend, _ = choose_backend("auto", "fp32")
    opened = [open_session(model, backend) for model in args.models]
    sessions = {session.card.network: session for session in opened}
    rows = []
    for case in cases(args.seeds, args.cosmos):
        for noise in (0.0, NOISE_PPM):
            row = evaluate(case, noise, sessions)
            if not args.networks_only:
                row |= oracles(case, noise)
            elif not row.keys() & sessions.keys():
                continue
            rows.append(say(row))
    write(
        args.output,
        rows,
        backend=f"{backend} {opened[0].version}",
        weights_sha256={name: s.card.weights_sha256 for name, s in sessions.items()},
        pad_voxels=PAD_VOXELS,
        summary=[]
        if args.networks_only
        else [say(line) for name in sessions for line in summary(rows, name)],
    )


if __name__ == "__main__":
    main()
