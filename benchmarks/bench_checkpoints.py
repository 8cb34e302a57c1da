r"""The authors' own MoDL-QSM and SpiNet-QSM weights beside TKD and Tikhonov, with pictures.

    python benchmarks/bench_checkpoints.py cosmos FOLDER MODEL.onnx ... \
        -o benchmarks/results/checkpoints_cosmos.json --figure docs/checkpoints-cosmos.png
    python benchmarks/bench_checkpoints.py in-vivo FOLDER MODEL.onnx ... \
        -o benchmarks/results/checkpoints_in_vivo.json --figure docs/checkpoints-in-vivo.png

The first is a real COSMOS map, its field simulated, without noise and with 0.0025 ppm; TKD and
Tikhonov have the setting of least NRMSE. The second is a real field, without a truth, at TKD 0.15
and Tikhonov 0.005; a network that wants another voxel size gets the field resampled, as
``qsm-run`` does. Models are in the split form, so that the loop can be watched.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from bench_accuracy import LAMBDAS, NOISE_PPM, PAD_VOXELS, THRESHOLDS, Case, cases, oracle
from bench_in_vivo import load_patient, scores
from common import Row, parser, say, write
from numpy.typing import NDArray

from qsm_deploy.kernels.dipole import dipole_convolve, tikhonov, tkd
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.metrics.metrics import correlation, field_residual, nrmse, xsim
from qsm_deploy.runtime.page import rows
from qsm_deploy.runtime.page.figure import png_of, rows_figure
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstruction.planning import PatchOptions
from qsm_deploy.runtime.reconstruction.unrolled import reconstruct_unrolled
from qsm_deploy.runtime.reconstructor import reconstructor_of
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Session

THRESHOLD, LAMBDA = 0.15, 0.005  # where there is no truth


def slope(y: Volume, x: Volume, mask: NDArray[np.bool_]) -> float:
    """Return the slope of the regression of y on x in a mask."""
    a, b = (v[mask].astype(np.float64) - v[mask].mean() for v in (y, x))
    return round(float(a @ b / (b @ b)), 3)


def network_map(session: Session, scan: Scan) -> tuple[Volume, Row]:
    """Return a network's map on the grid of the scan, and how it was made."""
    card = session.card
    reconstructor = reconstructor_of(session, Path(card.network))
    planned = reconstructor.plan(scan, Wants(PatchOptions("off")))
    chi = reconstructor.run(planned, Stages()).map_ppm
    return chi, {"resampled": "resampled" in planned.prepared.facts}


def loop_rows(session: Session, case: Case) -> list[Row]:
    """Return what each call of MoDL-QSM's prior makes of a field that is isotropic by simulation.

    Its second channel stands for the field that no isotropic susceptibility explains; there is
    none here, so all that it takes is missing from the first.
    """
    scan = Scan(case.field_ppm[None], case.mask, case.geometry, nib.Nifti1Header(), np.eye(4))
    numbers, mask = session.card.normalisation, case.mask
    mean, std = (
        np.array([numbers[f"{c}_{what}"] for c in ("chi", "field")], dtype=np.float32)
        for what in ("mean", "std")
    )
    rows: list[Row] = []

    def prior(x: Volume) -> Volume:
        y = session.run({"prior_input": x[None]})[0]
        before, after = (
            (v * std[:, None, None, None] + mean[:, None, None, None]) * mask for v in (x, y)
        )
        isotropic = dipole_convolve(after[0], case.geometry)
        rows.append(
            {
                "iteration": len(rows) + 1,
                "chi_slope_before": slope(before[0], case.chi_ppm, mask),
                "chi_slope_after": slope(after[0], case.chi_ppm, mask),
                "second_channel_on_field": slope(after[1], case.field_ppm, mask),
                "field_of_chi_on_field": slope(isotropic, case.field_ppm, mask),
            }
        )
        return y

    reconstruct_unrolled(session.card, scan, prior)
    truth = np.stack([case.chi_ppm, np.zeros_like(case.chi_ppm)])
    prior((truth - mean[:, None, None, None]) / std[:, None, None, None] * mask)
    rows[-1]["iteration"] = "the true map alone"
    return rows


def cosmos(args: argparse.Namespace) -> tuple[list[Row], dict[str, Volume], Any]:
    """Return the rows, the maps to draw and what they are drawn on."""
    (case,) = cases({}, args.folder)
    sessions = [open_session(model, "openvino") for model in args.models]
    rows: list[Row] = []
    maps = {"truth (COSMOS)": case.chi_ppm}
    for noise in (0.0, NOISE_PPM):
        field, g = case.noisy_field(noise), case.geometry
        inverses: dict[str, tuple[Callable[[float], Volume], tuple[float, ...]]] = {
            "TKD": (
                lambda t, f=field, g=g: tkd(f, g, threshold=t, pad_voxels=PAD_VOXELS),
                THRESHOLDS,
            ),
            "Tikhonov": (
                lambda lam, f=field, g=g: tikhonov(f, g, lam=lam, pad_voxels=PAD_VOXELS),
                LAMBDAS,
            ),
        }
        found: dict[str, tuple[Volume, Row]] = {}
        for name, (invert, settings) in inverses.items():
            best = oracle(invert, settings, case)["setting"]
            found[f"{name}"] = invert(best) * case.mask, {"setting": best}
        scan = Scan(field[None], case.mask, g, nib.Nifti1Header(), np.eye(4))
        for session in sessions:
            found[session.card.network] = network_map(session, scan)
        for name, (chi, how) in found.items():
            rows.append(
                {
                    "map": name,
                    "noise_ppm": noise,
                    "nrmse_percent": round(nrmse(chi, case.chi_ppm, case.mask), 2),
                    "xsim": round(xsim(chi, case.chi_ppm, case.mask), 3),
                    "correlation": round(correlation(chi, case.chi_ppm, case.mask), 3),
                    "slope": slope(chi, case.chi_ppm, case.mask),
                    "field_residual": round(field_residual(chi, field, case.mask, g), 3),
                    **how,
                }
            )
            say(rows[-1])
            if noise:
                maps[name] = chi
    for session in sessions:
        if session.card.pipeline == "modl":
            rows.append({"map": session.card.network, "loop": loop_rows(session, case)})
    return rows, maps, case


def in_vivo(args: argparse.Namespace) -> tuple[list[Row], dict[str, Volume], Any]:
    """Return the rows, the maps to draw and what they are drawn on."""
    scan = load_patient(args.folder)
    assert scan.truth_ppm is not None
    field, g = scan.measured[0], scan.geometry
    pad = PAD_VOXELS
    found: dict[str, tuple[Volume, Row]] = {
        "msQSM (published map)": (scan.truth_ppm, {}),
        "TKD": (scan.mask * tkd(field, g, threshold=THRESHOLD, pad_voxels=pad), {}),
        "Tikhonov": (scan.mask * tikhonov(field, g, lam=LAMBDA, pad_voxels=pad), {}),
    }
    for model in args.models:
        session = open_session(model, "openvino")
        found[session.card.network] = network_map(session, scan)
    maps = {name: chi for name, (chi, _) in found.items()}
    rows = []
    for name, row in scores(maps, scan).items():
        on_tkd = slope(maps[name], maps["TKD"], scan.mask)
        rows.append({"map": name, "slope_on_tkd": on_tkd, **row, **found[name][1]})
        say(rows[-1])
    return rows, maps, scan


def draw(path: Path, maps: dict[str, Volume], grid: Scan | Case) -> None:
    """Draw three planes of every map, without letters: no header here tells where its axes run."""
    drawn = [rows.Row(name, chi, rows.CHI_WINDOW_PPM) for name, chi in maps.items()]
    path.write_bytes(png_of(rows_figure(drawn, grid.mask, grid.geometry, None)))


def main() -> None:
    """Evaluate, print, write and draw."""
    p = parser(__doc__)
    p.add_argument("data", choices=("cosmos", "in-vivo"))
    p.add_argument("folder", type=Path)
    p.add_argument("models", type=Path, nargs="+")
    p.add_argument("--figure", type=Path)
    args = p.parse_args()
    rows, maps, case = (cosmos if args.data == "cosmos" else in_vivo)(args)
    write(args.output, rows)
    if args.figure:
        draw(args.figure, maps, case)


if __name__ == "__main__":
    main()
