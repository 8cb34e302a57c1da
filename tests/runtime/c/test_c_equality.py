"""The C library computes what the Python runtime computes: plans, blending, corrections."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import GeometryLimits, ModelCard, ReceptiveField
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.memory import FLOAT, LIBRARIES_BYTES, Workload
from qsm_deploy.runtime.reconstruction.patches import PatchPlan, plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.reconstruction.planning import PatchOptions, decide
from qsm_deploy.runtime.scan.axes import axes_of
from qsm_deploy.runtime.scan.erosion import erode_mask
from qsm_deploy.runtime.scan.geometry_limits import deviations
from qsm_deploy.runtime.scan.params import load_params
from qsm_deploy.runtime.scan.scan import Reading, Scan, ScanFiles, load_scan
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Session

TOLERANCE_PPM = 1e-6
BLENDS = {"hann": 1, "gaussian": 2, "crop": 3}
AXIAL = ((1.0, 1.0, 1.0), (0.0, 0.0, 1.0))
OBLIQUE = ((0.8, 0.9, 2.0), (0.3, -0.2, 0.9))
each_grid = pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((32, 32, 32), AXIAL),
        ((33, 27, 30), OBLIQUE),
        ((40, 28, 17), ((1.0, 1.0, 1.0), (0.0, 0.6, 0.8))),
        ((1, 24, 31), AXIAL),
    ],
)


def scan_of(shape: tuple[int, int, int], grid: Any, seed: int = 0) -> Scan:
    """Return a made-up acquisition whose mask lies off the centre."""
    rng = np.random.default_rng(seed)
    geometry = Geometry(shape, *grid)
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    centre = np.array([0.2, -0.15, 0.1])[:, None, None, None]
    mask = ((at - centre) ** 2).sum(axis=0) < (0.75 if min(shape) > 1 else 2)
    chi = gaussian_filter(rng.standard_normal(shape), 1.2).astype(np.float32)
    chi *= np.float32(0.1) / chi.std()
    field = dipole_convolve(chi * mask, geometry) + 0.002 * rng.standard_normal(shape)
    measured = np.where(mask, field, 0).astype(np.float32)[None]
    return Scan(measured, mask, geometry, nib.Nifti1Header(), np.eye(4))


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(BUNDLED_MODEL, "openvino")


@dataclass(frozen=True)
class Twins:
    """One model in both runtimes."""

    engine: Any
    session: Session

    def difference(
        self, scan: Scan, plan: PatchPlan, correction: Correction | None = None, **params: Any
    ) -> float:
        """Return the largest difference of the maps [ppm]."""
        expected = reconstruct(self.session, scan, plan, Stages())
        if correction is not None:
            expected, _ = correction.apply(expected, scan, Stages())
        chi = self.engine.reconstruct(
            scan.measured[0],
            scan.mask,
            scan.geometry.voxel_size_mm,
            scan.geometry.b0_direction,
            **params,
        )
        assert np.abs(expected).max() > 0.05, "there is something to compare"
        return float(np.abs(chi - expected).max())


@pytest.fixture
def bundled(open_engine: Callable[..., Any], session: Session) -> Twins:
    return Twins(open_engine(BUNDLED_MODEL), session)


@each_grid
def test_the_whole_volume(bundled: Twins, shape: tuple[int, int, int], grid: Any) -> None:
    scan = scan_of(shape, grid)
    assert bundled.difference(scan, plan_whole(shape, 4)) < TOLERANCE_PPM
    assert bundled.difference(scan, plan_whole(shape, 4), memory_order=0) < TOLERANCE_PPM


@pytest.mark.parametrize("blend", BLENDS)
def test_patches(bundled: Twins, blend: Any) -> None:
    scan = scan_of((37, 41, 30), OBLIQUE)
    plan = plan_patches(scan.mask, 4, 20, 7, blend)
    assert plan.count > 4
    params = {"patch": 20, "overlap": 7, "blend": BLENDS[blend]}
    assert bundled.difference(scan, plan, **params) < TOLERANCE_PPM


@pytest.mark.parametrize("iterations", [None, 10])
@each_grid
def test_data_consistency(
    bundled: Twins, shape: tuple[int, int, int], grid: Any, iterations: int | None
) -> None:
    params = {
        "data_consistency_lambda": 0.01,
        "data_consistency_iterations": iterations or 0,
    }
    found = bundled.difference(
        scan_of(shape, grid), plan_whole(shape, 4), Correction(0.01, iterations), **params
    )
    assert found < TOLERANCE_PPM


def test_patches_are_chosen_by_the_same_rules(bundled: Twins) -> None:
    """Where inference needs the most memory, which both predict alike.

    But for what Python's libraries take, and the copy of the map inside the mask.
    """
    scan = scan_of((64, 61, 50), AXIAL)
    work = Workload(scan, bundled.session.card, "openvino", evaluates=False, draws=False)
    more = LIBRARIES_BYTES + FLOAT * scan.mask.size
    fixed = work.card.memory["openvino"].fixed_bytes
    whole = work.peak_bytes(plan_whole(scan.mask.shape, 4))["inference"] - more
    for share in (0.8, 0.5, 0.3):
        limit = fixed + share * (whole - fixed)
        decision = decide(work, PatchOptions(), limit + more)
        assert not decision.plan.whole
        seen = bundled.difference(scan, decision.plan, memory_limit_bytes=int(limit))
        assert seen < TOLERANCE_PPM


def test_a_network_that_takes_a_mask_and_an_eroded_mask(
    card: ModelCard, write_model: Callable[..., Path], open_engine: Callable[..., Any]
) -> None:
    mask = replace(card.inputs[0], name="mask", unit="1")
    path = write_model(
        replace(card, inputs=(*card.inputs, mask), constants={"mask_erosion_voxels": 2.3})
    )
    scan = scan_of((21, 18, 16), AXIAL)
    expected = reconstruct(
        open_session(path, "openvino"),
        erode_mask(scan, 2.3),
        plan_whole(scan.mask.shape, 4),
        Stages(),
    )
    chi = open_engine(path).reconstruct(scan.measured[0], scan.mask)
    assert 0 < np.count_nonzero(expected) < scan.mask.sum()
    np.testing.assert_array_equal(chi, expected)


@pytest.mark.slow
def test_a_patient(bundled: Twins, shared: Path) -> None:
    folder = shared / "data" / "invivo_haemorrhage"
    files = ScanFiles((folder / "tissue_phase_rad.nii.gz",), folder / "mask.nii.gz")
    params = load_params(folder / "params.json")
    scan = load_scan(files, Reading(units="rad", from_file=params))
    plan = plan_whole(scan.mask.shape, 4)
    assert bundled.difference(scan, plan, memory_order=0) < TOLERANCE_PPM


def random_cases(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(11)
    cases = []
    for _ in range(count):
        divisor = int(rng.choice([1, 2, 4, 8]))
        patch = divisor * int(rng.integers(1, 5))
        cases.append(
            {
                "shape": tuple(int(n) for n in rng.integers(1, 40, 3)),
                "divisor": divisor,
                "patch": patch,
                "overlap": int(rng.integers(0, patch - divisor + 1)),
                "blend": str(rng.choice(list(BLENDS))),
                "seed": int(rng.integers(1 << 30)),
            }
        )
    return cases


def test_windows_and_origins_are_those_of_the_python_runtime(
    fake: Any, card: ModelCard, tmp_path: Path
) -> None:
    """The network adds where in its patch a voxel lies, so that every weight shows."""
    for case in random_cases(60):
        rng = np.random.default_rng(case["seed"])
        shape, blend = case["shape"], case["blend"]
        mask = rng.random(shape) < rng.choice([0.02, 0.5])
        mask[tuple(int(rng.integers(n)) for n in shape)] = True
        field = np.where(mask, rng.uniform(0.01, 0.1, shape), 0).astype(np.float32)
        plan = plan_patches(mask, case["divisor"], case["patch"], case["overlap"], blend)
        x, y, z = np.indices(plan.patch_shape)
        position = (0.001 * (x + 2 * y + 3 * z)).astype(np.float32)
        expected = plan.run(lambda v, p=position: 2 * v[0] + p, [field[None]], mask)[0] * mask

        path = tmp_path / "position.onnx"
        made = replace(card, divisor=case["divisor"], options={"fake": "position"})
        path.write_text(made.to_json())
        engine = fake.open(path)
        wanted = {"patch": case["patch"], "overlap": case["overlap"], "blend": BLENDS[blend]}
        chi = engine.reconstruct(field, mask, **wanted)
        engine.close()
        np.testing.assert_allclose(chi, expected, atol=TOLERANCE_PPM, rtol=0, err_msg=str(case))


def test_overlap_and_blend_follow_the_receptive_field(
    fake: Any, card: ModelCard, tmp_path: Path, collect: Callable[..., Any]
) -> None:
    mask = np.zeros((40, 37, 50), bool)
    mask[3:38, 5:30, 2:] = True
    scan = replace(scan_of((40, 37, 50), AXIAL), mask=mask)
    path = tmp_path / "made.onnx"
    for theoretical, halo in ((3, 2), (9, 2), (9, 5), (100, 100)):
        made = replace(card, receptive_field=ReceptiveField(theoretical, halo, 0.99))
        path.write_text(made.to_json())
        engine = fake.open(path)
        for patch in (8, 12, 16, 24, 40):
            decision = decide(
                Workload(scan, made, "openvino", evaluates=False, draws=False),
                PatchOptions(patch),
                1e12,
            )
            plan, lines = decision.plan, []
            engine.reconstruct(
                np.full(mask.shape, 0.05), mask, patch=patch, log=collect(lines), threads=0
            )
            size = " x ".join(map(str, plan.patch_shape))
            exact = "exact" if decision.exact else "not exact"
            stated = f"share {plan.overlap} voxels, blend {plan.blend}, {exact},"
            assert lines[-1].startswith(f"{plan.count} patches of {size} that {stated}")
        engine.close()


def test_the_geometry_of_the_training_is_kept_to(
    fake: Any, card: ModelCard, tmp_path: Path, call_error: type[Exception], collect: Any
) -> None:
    limits = GeometryLimits((1.0, 1.0, 2.0), 0.1, (0.0, 0.1, 1.0), 3.0)
    path = tmp_path / "axial.onnx"
    path.write_text(replace(card, geometry=limits).to_json())
    engine = fake.open(path)
    field, mask = np.full((6, 5, 4), 0.05), np.ones((6, 5, 4), bool)
    right = ((1.05, 0.95, 1.9), (0.0, -0.2, -2.1))
    engine.reconstruct(field, mask, *right)
    for grid in (((1, 1, 1), right[1]), (right[0], (0.4, 0.1, 1)), ((1, 1, 1), (1, 0.3, 0))):
        with pytest.raises(call_error) as caught:
            engine.reconstruct(field, mask, *grid)
        assert caught.value.status == 3
        stored = Geometry(field.shape, *grid)
        canonical = axes_of(None, stored).geometry(stored)
        found = "; ".join(deviations(limits, canonical))
        assert str(caught.value).startswith(
            f"{found}; this library neither turns nor resamples, qsm-run does; or use a network"
        )
    lines: list[str] = []
    allowed = {"allow_geometry": 1, "log": collect(lines)}
    engine.reconstruct(field, mask, (1, 1, 1), (0, 0.5, 1), **allowed)
    found = "; ".join(deviations(limits, Geometry(field.shape, (1, 1, 1), (0, 0.5, 1))))
    assert lines[0] == f"outside the training: {found}"
    engine.close()
