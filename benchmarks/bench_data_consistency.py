r"""What one data-consistency step makes of a network's map, whole and in patches.

    python benchmarks/bench_data_consistency.py ir2qsm.onnx tkd-unet.onnx --cosmos FOLDER \
        --in-vivo FOLDER -o benchmarks/results/data_consistency.json \
        --figure docs/data-consistency.png

Drift is how far patches are from the whole volume, NRMSE how far either is from the truth, both in
the mask; Tikhonov has the same lambda. lambda is chosen on the phantoms alone: the one with the
least NRMSE of patches and step, among those that halve the drift and do not raise the NRMSE of the
whole volume. Then COSMOS and the in-vivo field are looked at, once.
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
from qsm_deploy.kernels.data_consistency import data_consistency, masked_data_consistency
from qsm_deploy.kernels.dipole import tikhonov
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.metrics.metrics import field_residual, nrmse, xsim
from qsm_deploy.runtime.reconstruction.correction import PAD_VOXELS, Correction
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Session

LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0)
PATCHES = ((64, 16), (96, 16))  # edge and overlap, Hann windows
STEPS = {"closed form": None, "10 iterations": 10}
SEEDS = (601, 602)  # no network was trained on these


def phantoms() -> Iterator[Case]:
    """Yield the held-out heads."""
    for seed in SEEDS:
        h = head_phantom(Geometry((160, 192, 160)), seed=seed, noise_ppm=0.0)
        yield Case("phantom", f"seed {seed}", h.chi_ppm, h.local_field_ppm, h.mask, h.geometry)


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
        pad_voxels=PAD_VOXELS,
    )


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


def choose(rows: list[Row]) -> Row | None:
    """Return the lambda and form of the step that the phantoms favour, or None."""
    alone = {r["case"]: r for r in rows if r["lambda"] is None}
    allowed: list[Row] = []
    for lam in LAMBDAS:
        for step in STEPS:
            chosen = [r for r in rows if (r["lambda"], r.get("step")) == (lam, step)]
            halved = all(
                drift <= 0.5 * alone[r["case"]]["drift_percent"][name]
                for r in chosen
                for name, drift in r["drift_percent"].items()
            )
            no_worse = all(
                r["nrmse_percent"]["whole"] <= alone[r["case"]]["nrmse_percent"]["whole"]
                for r in chosen
            )
            if halved and no_worse:
                errors = [e for r in chosen for e in r["nrmse_percent"].values()]
                allowed.append({"lambda": lam, "step": step, "nrmse": float(np.mean(errors))})
    return min(allowed, key=lambda row: row["nrmse"], default=None)


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
    p.add_argument("tkd_unet", type=Path)
    p.add_argument("--cosmos", type=Path, required=True)
    p.add_argument("--in-vivo", type=Path, required=True)
    p.add_argument("--figure", type=Path, required=True)
    args = p.parse_args()
    session, bundled = (open_session(path, "openvino") for path in (args.ir2qsm, args.tkd_unet))
    rows: list[Row] = []
    for case in phantoms():
        rows += map(say, rows_of(case, session))
    chosen = choose(rows)
    say({"chosen": chosen})
    for case in cases([], args.cosmos):
        rows += map(say, rows_of(case, session))
    exact = say(exactness(bundled))
    best = chosen or min(
        (r for r in rows if r["lambda"]), key=lambda r: r["nrmse_percent"]["whole"]
    )
    step = Correction(best["lambda"], STEPS[best["step"]])
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
        chosen_on_phantoms=chosen,
        exact_patches=exact,
        in_vivo=seen,
    )
    draw(args.figure, maps, scan.mask, scan.geometry.voxel_size_mm)


if __name__ == "__main__":
    main()
