r"""What one data-consistency step makes of a network's map, whole and in patches.

    python benchmarks/bench_data_consistency.py ir2qsm.onnx tv-unet.onnx --cosmos FOLDER \
        --in-vivo FOLDER -o benchmarks/results/data_consistency.json \
        --figure docs/data-consistency.png

Drift is how far patches are from the whole volume, NRMSE how far either is from the truth, both in
the mask; Tikhonov has the same lambda. What background removal leaves behind is the field of
sources 1 to 5 voxels outside the mask. The lambda is chosen that has the least NRMSE among those
that cost no network more than a point on any small head or the COSMOS map, whatever was left
behind. Then the in-vivo field is looked at, once.
"""

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from bench_accuracy import NOISE_PPM, Case, cases
from bench_checkpoints import draw, network_map
from bench_in_vivo import load_patient
from common import Row, parser, say, write

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.calibration.phantom.residual_background import residual_background
from qsm_deploy.kernels.data_consistency import data_consistency, masked_data_consistency
from qsm_deploy.kernels.dipole import tikhonov
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.kernels.inversion.grid import SUPPORT_MM
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.metrics.metrics import field_residual, nrmse, xsim
from qsm_deploy.runtime.reconstruction.correction import AUTO, Correction
from qsm_deploy.runtime.reconstruction.memory import PAD_VOXELS
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Session

LAMBDAS = (0.03, 0.05, 0.1)
SUPPORTS_MM = (0, 2, 4, 5, 7)
LEFT_OVER_PPM = (0.0, 0.002, 0.005)
HARMLESS = 1.0  # NRMSE that may be lost [%]
PATCHES = ((64, 16), (96, 16))  # edge and overlap, Hann windows
STEPS = {"closed form": None, "10 iterations": 10}
SEEDS, SMALL_SEEDS = (601, 602), (501, 603)  # no network was trained on these
SMALL = Geometry((96, 112, 96))


def phantoms() -> Iterator[Case]:
    """Yield the held-out heads."""
    for seed in SEEDS:
        h = head_phantom(Geometry((160, 192, 160)), seed=seed, noise_ppm=0.0)
        yield Case("phantom", f"seed {seed}", h.chi_ppm, h.local_field_ppm, h.mask, h.geometry)


def small_heads() -> Iterator[Case]:
    """Yield held-out heads that are fast to invert."""
    for seed in SMALL_SEEDS:
        h = head_phantom(SMALL, seed=seed, noise_ppm=0.0)
        yield Case("small head", f"seed {seed}", h.chi_ppm, h.local_field_ppm, h.mask, SMALL)


def left_over_rows(case: Case, session: Session) -> Iterator[Row]:
    """Yield what steps make of a network's map where background removal left something behind."""
    rng = np.random.default_rng(9)
    left = residual_background(case.mask, case.geometry, rms_ppm=1.0, rng=rng)
    settings = dict.fromkeys(
        [(0.01, 0.0), *((lam, SUPPORT_MM) for lam in LAMBDAS)]
        + [(AUTO.lam, float(r)) for r in SUPPORTS_MM]
    )
    for rms in LEFT_OVER_PPM:
        field = case.noisy_field(NOISE_PPM) + np.float32(rms) * left
        chi = whole_map(session, field, case)
        head = {"network": session.card.network, "group": case.group, "case": case.name}
        head["left_over_ppm"] = rms
        yield {**head, "lambda": None, **score(chi, field, case)}
        for lam, support_mm in settings:
            stepped, fit = masked_data_consistency(
                chi,
                field,
                case.mask,
                case.geometry,
                lam=lam,
                iterations=10,
                support_mm=support_mm,
            )
            yield {
                **head,
                "lambda": lam,
                "support_mm": support_mm,
                **score(stepped, field, case),
                "fitted_residual": round(fit.fitted_residual, 4),
            }


def score(chi: Volume, field: Volume, case: Case) -> Row:
    """Return the error of a map, and how much of its field it leaves unexplained."""
    return {
        "nrmse_percent": round(nrmse(chi, case.chi_ppm, case.mask), 2),
        "xsim": round(xsim(chi, case.chi_ppm, case.mask), 4),
        "field_residual": round(field_residual(chi, field, case.mask, case.geometry), 4),
    }


def whole_map(session: Session, field: Volume, case: Case) -> Volume:
    """Return a network's map of a field, in one piece."""
    scan = Scan(field[None], case.mask, case.geometry, nib.Nifti1Header(), np.eye(4))
    return reconstruct(session, scan, plan_whole(field.shape, session.card.divisor), Stages())


def rows_of(case: Case, session: Session) -> Iterator[Row]:
    """Yield the row without the step, then one for each lambda and form of the step."""
    field = case.noisy_field(NOISE_PPM)
    scan = Scan(field[None], case.mask, case.geometry, nib.Nifti1Header(), np.eye(4))
    divisor = session.card.divisor
    maps = {"whole": reconstruct(session, scan, plan_whole(case.mask.shape, divisor), Stages())}
    for patch, overlap in PATCHES:
        plan = plan_patches(case.mask, divisor, patch, overlap, "hann")
        maps[f"{patch}/{overlap}"] = reconstruct(session, scan, plan, Stages())
    head = {"network": session.card.network, "group": case.group, "case": case.name}
    yield {**head, "lambda": None, **compare(maps, case)}
    for lam in LAMBDAS:
        plain = case.mask * tikhonov(field, case.geometry, lam=lam, pad_voxels=PAD_VOXELS)
        tikhonov_nrmse = round(nrmse(plain, case.chi_ppm, case.mask), 2)
        for how, iterations in STEPS.items():
            stepped = {
                name: after_step(chi, field, case, lam, iterations) for name, chi in maps.items()
            }
            yield {
                **head,
                "lambda": lam,
                "step": how,
                "tikhonov_nrmse_percent": tikhonov_nrmse,
                **compare(stepped, case),
            }


def after_step(
    chi: Volume, field: Volume, case: Case, lam: float, iterations: int | None
) -> Volume:
    """Return the map after the step, 0 outside the mask."""
    if iterations is None:
        return case.mask * data_consistency(
            chi, field, case.geometry, lam=lam, pad_voxels=PAD_VOXELS
        )
    return masked_data_consistency(
        chi,
        field,
        case.mask,
        case.geometry,
        lam=lam,
        iterations=iterations,
    )[0]


def compare(maps: dict[str, Volume], case: Case) -> Row:
    """Return drift, and error against the truth."""
    whole = maps["whole"]
    return {
        "drift_percent": {
            name: round(nrmse(chi, whole, case.mask), 2)
            for name, chi in maps.items()
            if name != "whole"
        },
        "nrmse_percent": {
            name: round(nrmse(chi, case.chi_ppm, case.mask), 2) for name, chi in maps.items()
        },
        "xsim_whole": round(xsim(whole, case.chi_ppm, case.mask), 4),
    }


def choose(left: list[Row]) -> Row | None:
    """Return the lambda that the rule favours, in 10 iterations, or None."""
    before = {harm_of(r): r["nrmse_percent"] for r in left if r["lambda"] is None}
    allowed: list[Row] = []
    for lam in LAMBDAS:
        stepped = [r for r in left if (r["lambda"], r.get("support_mm")) == (lam, SUPPORT_MM)]
        lost = max(r["nrmse_percent"] - before[harm_of(r)] for r in stepped)
        if lost <= HARMLESS:
            error = float(np.mean([r["nrmse_percent"] for r in stepped]))
            allowed.append({"lambda": lam, "nrmse": round(error, 2), "most_lost": round(lost, 2)})
    return min(allowed, key=lambda row: row["nrmse"], default=None)


def harm_of(row: Row) -> tuple[str, str, float]:
    """Return what a row with a step is compared with."""
    return row["network"], row["case"], row["left_over_ppm"]


def exactness(session: Session) -> Row:
    """Return how far patches with twice the receptive field are from the whole volume."""
    (case,) = list(phantoms())[:1]
    scan = Scan(
        case.noisy_field(NOISE_PPM)[None], case.mask, case.geometry, nib.Nifti1Header(), np.eye(4)
    )
    card = session.card
    assert card.receptive_field.theoretical is not None
    overlap = 2 * card.receptive_field.theoretical
    whole = reconstruct(session, scan, plan_whole(case.mask.shape, card.divisor), Stages())
    plan = plan_patches(case.mask, card.divisor, 96, overlap, "crop")
    chi = reconstruct(session, scan, plan, Stages())
    drift = nrmse(chi, whole, case.mask)
    return {"network": card.network, "patch": 96, "overlap": overlap, "drift_percent": drift}


def in_vivo(
    folder: Path, session: Session, step: Correction
) -> tuple[Row, dict[str, Volume], Scan]:
    """Return the field residual without and with the step, and the maps."""
    scan = load_patient(folder)
    chi, how = network_map(session, scan)
    corrected, report = step.apply(chi, scan, Stages())
    plain = scan.mask * tikhonov(
        scan.measured[0], scan.geometry, lam=step.lam, pad_voxels=PAD_VOXELS
    )
    residual = field_residual(plain, scan.measured[0], scan.mask, scan.geometry)
    row = {"network": session.card.network, **how, **report, "tikhonov": round(residual, 4)}
    name = session.card.network
    return row, {f"Tikhonov {step.lam:g}": plain, name: chi, f"{name} + step": corrected}, scan


def main() -> None:
    """Measure, choose, look, write."""
    p = parser(__doc__)
    p.add_argument("ir2qsm", type=Path)
    p.add_argument("tv_unet", type=Path)
    p.add_argument("--cosmos", type=Path, required=True)
    p.add_argument("--in-vivo", type=Path, required=True)
    p.add_argument("--figure", type=Path, required=True)
    args = p.parse_args()
    session, bundled = (open_session(path, "openvino") for path in (args.ir2qsm, args.tv_unet))
    (cosmos,) = cases([], args.cosmos)
    left: list[Row] = []
    for case in (*small_heads(), cosmos):
        for network in (bundled, session):
            left += map(say, left_over_rows(case, network))
    chosen = say(choose(left))
    rows: list[Row] = []
    for case in (*phantoms(), cosmos):
        rows += map(say, rows_of(case, session))
    exact = say(exactness(bundled))
    step = Correction(chosen["lambda"], 10) if chosen else AUTO
    seen, maps = [], {}
    for network in (session, bundled):
        row, more, scan = in_vivo(args.in_vivo, network, step)
        seen.append(say(row))
        maps |= more
    write(
        args.output,
        rows,
        noise_ppm=NOISE_PPM,
        weights_sha256=session.card.weights_sha256[:8],
        chosen=chosen,
        left_over=left,
        exact_patches=exact,
        in_vivo=seen,
    )
    draw(args.figure, maps, scan)


if __name__ == "__main__":
    main()
