"""Properties of the metrics, XSIM against a slow twin, and what degenerate input does."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_laplace

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import DataError, GeometryError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.metrics import metrics

SHAPE = (13, 10, 11)
SCORES = [
    metrics.nrmse,
    metrics.nrmse_detrended,
    metrics.correlation,
    metrics.psnr,
    metrics.mean_abs_error_ppb,
    metrics.p999_abs_error_ppb,
    metrics.xsim,
    metrics.hfen,
]
RELATIVE_SCORES = [s for s in SCORES if not s.__name__.endswith("ppb") and s is not metrics.xsim]


def volume(seed: int, std: float = 0.05) -> np.ndarray:
    return (std * np.random.default_rng(seed).standard_normal(SHAPE)).astype(np.float32)


@pytest.fixture
def mask() -> np.ndarray:
    """Return a ragged region that touches the grid's border on some sides."""
    inside = np.random.default_rng(3).random(SHAPE) < 0.7
    inside[:4] = inside[:, :, -2:] = False
    return inside


@pytest.fixture
def truth() -> np.ndarray:
    return volume(0)


@pytest.fixture
def chi(truth: np.ndarray) -> np.ndarray:
    return truth + volume(1, std=0.02)


def test_a_perfect_map_has_no_error(truth, mask):
    perfect = metrics.all_metrics(truth, truth, mask)
    for name in ("nrmse_percent", "nrmse_detrended_percent", "hfen_percent", "mean_abs_error_ppb"):
        assert perfect[name] == pytest.approx(0, abs=1e-10)
    assert perfect["p999_abs_error_ppb"] == 0
    assert perfect["xsim_uniform5"] == pytest.approx(1, abs=1e-12)
    assert perfect["correlation"] == pytest.approx(1, abs=1e-12)
    assert metrics.psnr(truth, truth, mask) == math.inf
    assert "psnr_db" not in perfect  # only finite numbers


def test_all_metrics_has_stable_names_and_finite_values(chi, truth, mask):
    scores = metrics.all_metrics(chi, truth, mask)
    assert list(scores) == [
        "nrmse_percent",
        "nrmse_detrended_percent",
        "xsim_uniform5",
        "hfen_percent",
        "psnr_db",
        "correlation",
        "mean_abs_error_ppb",
        "p999_abs_error_ppb",
    ]
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())


def test_nrmse_of_a_scaled_and_shifted_map(truth, mask):
    assert metrics.nrmse(0.75 * truth + 0.3, truth, mask) == pytest.approx(25, rel=1e-5)
    assert metrics.nrmse(np.zeros(SHAPE, np.float32), truth, mask) == pytest.approx(100)


@settings(max_examples=20, deadline=None)
@given(
    scale=st.floats(0.1, 10).flatmap(lambda s: st.sampled_from([s, -s])), offset=st.floats(-1, 1)
)
def test_detrended_nrmse_ignores_scale_and_offset(scale, offset):
    truth, everywhere = volume(0).astype(np.float64), np.ones(SHAPE, bool)
    chi = truth + volume(1, std=0.02)
    plain = metrics.nrmse_detrended(chi, truth, everywhere)
    assert metrics.nrmse_detrended(scale * chi + offset, truth, everywhere) == pytest.approx(plain)


def test_detrended_nrmse_follows_from_the_correlation(chi, truth, mask):
    rho = metrics.correlation(chi, truth, mask)
    expected = 100 * math.sqrt(1 - rho**2) / rho
    assert metrics.nrmse_detrended(chi, truth, mask) == pytest.approx(expected)
    assert rho == pytest.approx(np.corrcoef(chi[mask], truth[mask])[0, 1], rel=1e-6)


def test_a_known_offset_sets_psnr_and_absolute_errors(truth, mask):
    truth[mask.nonzero()[0][0], mask.nonzero()[1][0], mask.nonzero()[2][0]] = 0.5
    chi = truth + np.float32(0.01)
    peak = float(np.ptp(truth[mask]))
    assert metrics.psnr(chi, truth, mask) == pytest.approx(20 * math.log10(peak / 0.01), rel=1e-5)
    assert metrics.mean_abs_error_ppb(chi, truth, mask) == pytest.approx(10, rel=1e-4)
    assert metrics.p999_abs_error_ppb(chi, truth, mask) == pytest.approx(10, rel=1e-4)


def test_p999_sees_the_tail_and_the_mean_hardly_does():
    shape = (20, 20, 10)
    truth = np.zeros(shape, np.float32)
    chi = truth.copy()
    chi.ravel()[:8] = 0.1  # 0.2 % of the voxels
    everywhere = np.ones(shape, bool)
    assert metrics.p999_abs_error_ppb(chi, truth, everywhere) == pytest.approx(100, rel=1e-6)
    assert metrics.mean_abs_error_ppb(chi, truth, everywhere) == pytest.approx(0.2, rel=1e-6)


def xsim_ref(chi: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Voxel by voxel: population moments over the part of the 5^3 window inside the grid."""
    r, t = (np.where(mask, v, 0).astype(np.float64) for v in (chi, truth))
    values = []
    for centre in np.argwhere(mask):
        window = tuple(slice(max(0, c - 2), c + 3) for c in centre)
        a, b = r[window].ravel(), t[window].ravel()
        (var_a, cov), (_, var_b) = np.cov(a, b, bias=True)
        luminance = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
        values.append(luminance * (2 * cov + 1e-6) / (var_a + var_b + 1e-6))
    return float(np.mean(values))


def test_xsim_equals_its_loop_twin(chi, truth, mask):
    everywhere = np.ones(SHAPE, bool)
    corner = np.zeros(SHAPE, bool)
    corner[0, -1, 3:5] = True
    for region in (mask, everywhere, corner):
        value = metrics.xsim(chi, truth, region)
        assert value == pytest.approx(xsim_ref(chi, truth, region), abs=1e-12)
    assert metrics.xsim(chi, truth, mask) == metrics.xsim(truth, chi, mask)


def test_hfen_equals_the_filter_on_the_whole_masked_grid(chi, truth, mask):
    masked = [np.pad(np.where(mask, v, 0).astype(np.float64), 8) for v in (chi, truth)]
    r, t = (gaussian_laplace(v, 1.5, truncate=5)[8:-8, 8:-8, 8:-8][mask] for v in masked)
    expected = 100 * np.linalg.norm(r - t) / np.linalg.norm(t)
    assert metrics.hfen(chi, truth, mask) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_voxels_outside_the_mask_do_not_count(score, chi, truth, mask):
    before = score(chi, truth, mask)
    rng = np.random.default_rng(9)
    for v in (chi, truth):
        v[~mask] = rng.permutation(v[~mask])
    assert score(chi, truth, mask) == before
    chi[~mask], truth[~mask] = np.nan, np.inf
    assert score(chi, truth, mask) == before


@pytest.mark.parametrize("score", SCORES)
def test_zeros_around_the_grid_do_not_count(score, chi, truth):
    inner = np.pad(np.ones(tuple(n - 6 for n in SHAPE), bool), 3)
    padded = [np.pad(np.where(inner, v, 0), 9) for v in (chi, truth)]
    tight = score(chi, truth, inner)
    assert score(*padded, np.pad(inner, 9)) == pytest.approx(tight, rel=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_an_empty_mask_is_refused(score, chi, truth):
    with pytest.raises(DataError, match="mask is empty"):
        score(chi, truth, np.zeros(SHAPE, bool))


@pytest.mark.parametrize("score", SCORES)
def test_values_that_are_not_finite_are_counted(score, chi, truth, mask):
    i, j = np.argwhere(mask)[:2]
    chi[tuple(i)], truth[tuple(j)] = np.nan, np.inf
    with pytest.raises(DataError, match="2 values are NaN or Inf"):
        score(chi, truth, mask)


@pytest.mark.parametrize("score", SCORES)
def test_another_grid_is_refused(score, chi, truth, mask):
    with pytest.raises(GeometryError, match=r"\(13, 10, 10\)"):
        score(chi[..., 1:], truth, mask)


@pytest.mark.parametrize("score", RELATIVE_SCORES)
@pytest.mark.parametrize("single_voxel", [False, True])
def test_a_constant_truth_is_refused(score, single_voxel, chi, mask):
    if single_voxel:
        mask = np.zeros(SHAPE, bool)
        mask[4, 5, 6] = True
    truth = np.full(SHAPE, 0.02, np.float32)
    with pytest.raises(DataError, match=rf"constant \(0.02 ppm, {mask.sum()} voxels\)"):
        score(chi, truth, mask)


def test_scores_of_a_constant_map(truth, mask):
    flat = metrics.all_metrics(np.full(SHAPE, 0.1, np.float32), truth, mask)
    assert flat["nrmse_percent"] == flat["nrmse_detrended_percent"] == pytest.approx(100)
    assert flat["correlation"] == 0
    assert 0 <= flat["xsim_uniform5"] < 0.1


def test_xsim_and_absolute_errors_exist_for_a_single_voxel(chi, truth):
    mask = np.zeros(SHAPE, bool)
    mask[0, 0, 0] = True
    error = abs(float(chi[0, 0, 0]) - float(truth[0, 0, 0])) * 1000
    assert metrics.mean_abs_error_ppb(chi, truth, mask) == pytest.approx(error)
    assert metrics.p999_abs_error_ppb(chi, truth, mask) == pytest.approx(error)
    assert metrics.xsim(chi, truth, mask) == pytest.approx(xsim_ref(chi, truth, mask), abs=1e-12)


class TestFieldResidual:
    geometry = Geometry(SHAPE, (1.0, 1.2, 2.0), (0.0, 0.6, 0.8))

    @pytest.fixture
    def chi(self, truth, mask):
        return np.where(mask, truth, np.float32(0))

    @pytest.fixture
    def field(self, chi):
        return dipole_convolve(chi, self.geometry, pad_voxels=(7, 5, 6))

    def test_is_zero_for_the_source_of_the_field(self, chi, field, mask):
        assert metrics.field_residual(chi, field, mask, self.geometry) < 1e-6

    def test_grows_with_the_part_of_the_field_left_unexplained(self, chi, field, mask):
        for share in (0.0, 0.4, 1.0):
            left = metrics.field_residual(np.float32(share) * chi, field, mask, self.geometry)
            assert left == pytest.approx(1 - share, abs=1e-6)

    def test_does_not_see_outside_the_mask(self, chi, field, mask):
        chi, field = (np.where(mask, v, np.float32(np.nan)) for v in (chi, field))
        assert metrics.field_residual(chi, field, mask, self.geometry) < 1e-6

    def test_refuses_a_field_of_zeros(self, chi, mask):
        with pytest.raises(DataError, match="field is zero"):
            metrics.field_residual(chi, np.zeros(SHAPE, np.float32), mask, self.geometry)
