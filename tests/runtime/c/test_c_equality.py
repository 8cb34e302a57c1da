"""The C library computes what the Python runtime computes: plans, blending, corrections."""

import itertools
import math
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
from qsm_deploy.runtime.card.card import (
    TASKS,
    GeometryLimits,
    ModelCard,
    ReceptiveField,
    Task,
    Tiles,
)
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
                "front": ("ceil", "floor", "none")[len(cases) % 3],
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
        divisor, patch, front = case["divisor"], case["patch"], case["front"]
        cut = plan_patches(mask, divisor, patch, case["overlap"], blend, front)
        path = tmp_path / "position.onnx"
        made = replace(card, divisor=divisor, options={"fake": "position"}, pad_front=front)
        path.write_text(made.to_json())
        engine = fake.open(path)
        wanted = {"patch": patch, "overlap": case["overlap"], "blend": BLENDS[blend]}
        for plan, params in ((cut, wanted), (plan_whole(shape, divisor, front), {"patch": -1})):
            expected = plan.run(lambda v: 2 * v[0] + position_in(v[0]), [field[None]], mask)[0]
            chi = engine.reconstruct(field, mask, **params)
            told = {"atol": TOLERANCE_PPM, "rtol": 0, "err_msg": str(case)}
            np.testing.assert_allclose(chi, expected * mask, **told)
        engine.close()


def position_in(patch: np.ndarray) -> np.ndarray:
    """Return what the made-up network adds to tell where in its patch a voxel lies."""
    x, y, z = np.indices(patch.shape[-3:])
    return (0.001 * (x + 2 * y + 3 * z)).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "kept", "stride", "blend"), [(8, 4, 4, "none"), (8, 8, 8, "none"), (8, 8, 3, "mean")]
)
@pytest.mark.parametrize("shape", [(16, 9, 5), (8, 23, 12)])
def test_tiles_begin_where_the_card_says(
    size, kept, stride, blend, shape, fake: Any, card: ModelCard, tmp_path: Path, call_error: Any
) -> None:
    tiles = Tiles((size,) * 3, (kept,) * 3, (stride,) * 3, "zero", blend)
    whole = {"patchable": "no", "why_whole": "its authors run it in blocks"}
    made = replace(card, tiles=tiles, options={"fake": "position"}, **whole)
    (tmp_path / "tiles.onnx").write_text(made.to_json())
    rng = np.random.default_rng(0)
    field, mask = rng.uniform(0.01, 0.1, shape).astype(np.float32), rng.random(shape) < 0.6
    field *= mask
    margin = (size - kept) // 2
    starts = []
    for n in shape:
        firsts = [stride * i for i in range(1 + math.ceil(max(0, n - kept) / stride))]
        starts.append([*firsts[:-1], max(0, n - kept)] if blend == "mean" else firsts)
    beyond = np.pad(field, [(margin, size + stride)] * 3)
    total, counts = np.zeros((2, *(n + size for n in shape)))
    inside = (slice(margin, margin + kept),) * 3
    for x, y, z in itertools.product(*starts):
        tile = beyond[x : x + size, y : y + size, z : z + size]
        to = np.s_[x : x + kept, y : y + kept, z : z + kept]
        total[to] += (2 * tile + position_in(tile))[inside]
        counts[to] += 1
    x, y, z = shape
    assert counts[:x, :y, :z].min() == 1
    expected = np.where(mask, (total / np.maximum(counts, 1))[:x, :y, :z], 0)
    engine = fake.open(tmp_path / "tiles.onnx")
    np.testing.assert_allclose(engine.reconstruct(field, mask), expected, atol=1e-6, rtol=0)
    for asked in ({"patch": 8}, {"patch": -1}, {"overlap": 2}, {"blend": 1}):
        with pytest.raises(call_error, match="runs in tiles of its own: its authors run it in b"):
            engine.reconstruct(field, mask, **asked)
    engine.close()


@pytest.mark.parametrize("task", ["total_field->chi", "total_field->local_field"])
def test_a_total_field_goes_in_with_the_sign_that_the_card_says(
    task: Task, card: ModelCard, write_model: Any, open_engine: Any, call_error: Any
) -> None:
    _, _, (gives,) = TASKS[task]
    made = replace(
        card,
        task=task,
        inputs=(replace(card.inputs[0], name="total_field_ppm"),),
        output=replace(card.output, name=gives),
        constants={"field_sign": -1.0},
        pad_front="floor",
    )
    scan = scan_of((21, 18, 15), AXIAL)
    field = scan.measured[0] / scan.measured[0][scan.mask].std()  # more than any local field
    engine = open_engine(write_model(made))
    np.testing.assert_array_equal(engine.reconstruct(field, scan.mask), -2 * field)
    with pytest.raises(call_error, match=r"the total field varies by .* ppm, in a head"):
        engine.reconstruct(4 * field, scan.mask)
    with pytest.raises(call_error, match=f"for a map of a local field, twice is for {task}; leave"):
        engine.reconstruct(field, scan.mask, data_consistency_lambda=0.01)
    assert open_engine(write_model(replace(made, constants={}))).reconstruct(
        field, scan.mask
    ) == pytest.approx(2 * field)


def test_data_consistency_is_with_the_field_whatever_its_sign(
    tkd_card: ModelCard, write_model: Any, open_engine: Any
) -> None:
    """The model gives twice its last input, a prior map, which is made of the field itself."""
    scan, maps = scan_of((21, 18, 15), AXIAL), []
    for constants in ({}, {"field_sign": -1.0}):
        engine = open_engine(write_model(replace(tkd_card, constants=constants)))
        fitted = {"data_consistency_lambda": 0.01, "data_consistency_iterations": 2}
        maps += [engine.reconstruct(scan.measured[0], scan.mask, **p) for p in ({}, fitted)]
    for plain, signed in zip(maps[:2], maps[2:], strict=True):
        np.testing.assert_array_equal(plain, signed)
    assert not np.array_equal(maps[0], maps[1])


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
