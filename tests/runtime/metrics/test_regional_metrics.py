"""Regional metrics on volumes small enough to score by hand."""

import numpy as np
import pytest

from qsm_deploy.kernels.errors import GeometryError
from qsm_deploy.runtime.metrics.metrics import all_metrics, nrmse_detrended
from qsm_deploy.runtime.metrics.regional_metrics import dgm_slope, regional_metrics

SHAPE = (30, 28, 31)
CENTRE = (14, 13, 15)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def everywhere() -> np.ndarray:
    return np.ones(SHAPE, bool)


@pytest.fixture
def labels() -> np.ndarray:
    """Every label in a block of its own; labels 11 and 16 as small as they get."""
    image = np.zeros(SHAPE, np.int16)
    for label in range(1, 10):
        image[3 * label - 2 : 3 * label, 1:4, 1:5] = label
    image[CENTRE] = 16
    image[2, 24, 28] = 11
    return image


@pytest.fixture
def truth(rng) -> np.ndarray:
    return (0.05 * rng.standard_normal(SHAPE)).astype(np.float32)


@pytest.fixture
def chi(truth, rng) -> np.ndarray:
    return truth + (0.02 * rng.standard_normal(SHAPE)).astype(np.float32)


def test_names_of_all_regional_metrics(chi, truth, everywhere, labels):
    truth[CENTRE] = chi[CENTRE] = -3.3
    assert list(regional_metrics(chi, truth, everywhere, labels)) == [
        "nrmse_tissue_detrended_percent",
        "nrmse_deep_grey_detrended_percent",
        "nrmse_blood_detrended_percent",
        "dgm_linearity",
        "calc_moment_ppm_voxels",
        "calc_streak",
    ]


def test_a_perfect_map_is_perfect_everywhere(truth, everywhere, labels):
    truth[CENTRE] = -3.3
    perfect = regional_metrics(truth, truth, everywhere, labels)
    assert list(perfect.values()) == pytest.approx([0] * 6, abs=1e-6)


def test_regional_nrmse_is_the_detrended_one_over_the_region(chi, truth, everywhere, labels):
    scores = regional_metrics(chi, truth, everywhere, labels)
    blood = np.zeros(SHAPE, bool)
    blood[1:4, 23:26, 27:30] = True  # the blood voxel and all 26 neighbours
    regions = {
        "tissue": (labels >= 7) & (labels <= 9),
        "deep_grey": (labels >= 1) & (labels <= 6),
        "blood": blood,
    }
    for name, region in regions.items():
        expected = nrmse_detrended(chi, truth, region)
        assert scores[f"nrmse_{name}_detrended_percent"] == expected


def test_grown_blood_stays_in_the_mask(chi, truth, everywhere, labels):
    everywhere[:, :24] = False
    scores = regional_metrics(chi, truth, everywhere, labels)
    assert list(scores) == ["nrmse_blood_detrended_percent"]
    blood = np.zeros(SHAPE, bool)
    blood[1:4, 24:26, 27:30] = True
    assert scores["nrmse_blood_detrended_percent"] == nrmse_detrended(chi, truth, blood)


def test_dgm_linearity_is_the_slope_of_the_nuclei_means(truth, everywhere, labels, rng):
    for label in range(1, 7):
        nucleus = labels == label
        truth[nucleus] = 0.03 * label
        noise = rng.standard_normal(nucleus.sum())
        # noise inside a nucleus leaves its mean, and so the slope, alone
        truth[nucleus] += (0.01 * (noise - noise.mean())).astype(np.float32)
    chi = np.float32(0.7) * truth + np.float32(0.02)
    linearity = regional_metrics(chi, truth, everywhere, labels)["dgm_linearity"]
    assert linearity == pytest.approx(0.3, abs=1e-5)


def test_the_slope_of_the_nuclei_keeps_its_side_of_one(truth, labels):
    assert dgm_slope(0.9 * truth, truth, labels) == pytest.approx(0.9)
    assert dgm_slope(1.1 * truth + 0.02, truth, labels) == pytest.approx(1.1)
    assert dgm_slope(truth, truth, np.zeros_like(labels)) is None


class TestCalcification:
    """A calcification of one voxel: cube 7^3, rim to 15^3, surroundings to 23^3."""

    @pytest.fixture
    def truth(self):
        volume = np.zeros(SHAPE, np.float32)
        volume[CENTRE] = -3.0
        return volume

    @pytest.fixture
    def only(self, labels):
        return np.where(labels == 16, labels, 0)

    @staticmethod
    def at(*offset: int) -> tuple[int, ...]:
        return tuple(c + o for c, o in zip(CENTRE, offset, strict=True))

    def test_moment_by_hand(self, truth, everywhere, only):
        chi = np.zeros(SHAPE, np.float32)
        chi[self.at(0, 0, 0)] = -2.0
        chi[self.at(3, 0, 0)] = -0.5  # on the cube's face: counted
        chi[self.at(0, 2, -3)] = -0.125  # above the threshold: not counted
        chi[self.at(0, 0, 8)] = -0.123  # in the surroundings: threshold -0.13
        scores = regional_metrics(chi, truth, everywhere, only)
        assert scores["calc_moment_ppm_voxels"] == pytest.approx(abs(-3.0 - (-2.0 - 0.5)))

    def test_threshold_is_zero_when_nothing_around_is_negative(self, truth, everywhere, only):
        chi = np.full(SHAPE, 0.02, np.float32)
        chi[self.at(0, 0, 0)] = -2.0
        chi[self.at(1, 1, 1)] = -0.001
        scores = regional_metrics(chi, truth, everywhere, only)
        assert scores["calc_moment_ppm_voxels"] == pytest.approx(3.0 - 2.001)

    @pytest.mark.parametrize(("lowest", "counted"), [(-0.07, True), (-0.0701, False)])
    def test_threshold_is_a_multiple_of_ten_ppb(self, truth, everywhere, only, lowest, counted):
        chi = np.zeros(SHAPE, np.float64)
        chi[self.at(0, 0, 0)] = -2.0
        chi[self.at(0, 4, 0)] = lowest
        chi[self.at(0, 1, 0)] = -0.075
        scores = regional_metrics(chi, truth, everywhere, only)
        missed = 3.0 - 2.0 - 0.075 * counted
        assert scores["calc_moment_ppm_voxels"] == pytest.approx(missed)

    def test_surroundings_end_eight_voxels_from_the_cube(self, truth, everywhere, only):
        chi = np.zeros(SHAPE, np.float32)
        chi[self.at(0, 0, 0)] = -2.0
        chi[self.at(12, 0, 0)] = chi[self.at(0, -12, 0)] = -5.0
        scores = regional_metrics(chi, truth, everywhere, only)
        assert scores["calc_moment_ppm_voxels"] == pytest.approx(1.0)
        chi[self.at(11, 0, 0)] = -5.0
        scores = regional_metrics(chi, truth, everywhere, only)
        assert scores["calc_moment_ppm_voxels"] == pytest.approx(3.0)

    def test_streaks_are_the_rim_residual_over_the_calcification(
        self, truth, everywhere, only, rng
    ):
        rim = np.zeros(SHAPE, bool)
        rim[tuple(slice(c - 7, c + 8) for c in CENTRE)] = True
        rim[tuple(slice(c - 3, c + 4) for c in CENTRE)] = False
        truth[rim] = 0.05 * rng.standard_normal(rim.sum())
        chi = 0.8 * truth + 0.1
        streak = 0.04 * np.where(np.indices(SHAPE).sum(axis=0) % 2, 1, -1)
        chi += np.where(rim, streak, 0)
        chi[CENTRE] = -2.0
        scores = regional_metrics(chi, truth, everywhere, only)
        assert scores["calc_streak"] == pytest.approx(0.04 / 2.0, rel=0.01)

    def test_a_map_without_calcification_misses_all_of_it(self, truth, everywhere, only):
        scores = regional_metrics(np.zeros(SHAPE, np.float32), truth, everywhere, only)
        assert scores == {"calc_moment_ppm_voxels": pytest.approx(3.0)}

    def test_a_mask_that_ends_at_the_calcification_leaves_no_rim(self, truth, only):
        scores = regional_metrics(truth, truth, truth < 0, only)
        assert scores == {"calc_moment_ppm_voxels": pytest.approx(0.0)}


def test_voxels_outside_the_mask_do_not_count(chi, truth, everywhere, labels, rng):
    mask = everywhere
    mask[rng.random(SHAPE) < 0.3] = False
    mask[CENTRE] = mask[2, 24, 28] = True
    truth[CENTRE] = chi[CENTRE] = -3.3
    before = all_metrics(chi, truth, mask, labels)
    assert len(before) == 14
    for volume in (chi, truth, labels):
        volume[~mask] = rng.permutation(volume[~mask])
    assert all_metrics(chi, truth, mask, labels) == before
    chi[~mask], truth[~mask], labels[~mask] = np.nan, np.inf, 16
    assert all_metrics(chi, truth, mask, labels) == before


def test_absent_labels_leave_their_metrics_out(chi, truth, everywhere, labels):
    assert regional_metrics(chi, truth, everywhere, np.zeros_like(labels)) == {}
    tissue_only = np.where((labels >= 7) & (labels <= 9), labels, 0)
    assert list(regional_metrics(chi, truth, everywhere, tissue_only)) == [
        "nrmse_tissue_detrended_percent"
    ]
    one_nucleus = np.where(labels == 3, labels, 0)
    assert list(regional_metrics(chi, truth, everywhere, one_nucleus)) == [
        "nrmse_deep_grey_detrended_percent"
    ]


def test_a_region_of_constant_truth_is_left_out(chi, everywhere, labels):
    truth = np.full(SHAPE, 0.03, np.float32)
    assert list(regional_metrics(chi, truth, everywhere, np.where(labels < 10, labels, 0))) == []


def test_labels_on_another_grid_are_refused(chi, truth, everywhere, labels):
    with pytest.raises(GeometryError, match=r"labels have shape \(30, 28, 30\)"):
        regional_metrics(chi, truth, everywhere, labels[..., 1:])
