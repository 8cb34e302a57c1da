"""Histograms count what was there; each collector finds the range that it promises."""

from typing import get_args

import numpy as np
import pytest

from qsm_deploy.calibration.int8.collectors import BINS, LEVELS, Collector, Histogram, collect_range
from qsm_deploy.kernels.errors import DataError

COLLECTORS = get_args(Collector)


def histogram_of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part.astype(np.float32))
    return histogram


def samples(kind: str, count: int = 200_000) -> np.ndarray:
    rng = np.random.default_rng(3)
    return {
        "normal": lambda: rng.normal(0, 2.5, count),
        "relu": lambda: np.maximum(rng.normal(0, 0.02, count), 0),
        "heavy": lambda: rng.standard_t(3, count),
        "uniform": lambda: rng.uniform(0, 5, count),
    }[kind]()


def test_a_histogram_counts_every_value_whatever_the_order() -> None:
    values = np.concatenate([np.zeros(5), np.geomspace(1e-4, 30, 1001)])
    up, down = histogram_of(*np.split(values, [3, 500])), histogram_of(values[::-1])
    for histogram in (up, down):
        assert histogram.total == values.size
        assert histogram.zeros == 5
        assert histogram.largest == pytest.approx(30)
        assert histogram.width * BINS >= 30 > histogram.width * BINS / 2 - 1e-3
        below = histogram.counts[: BINS // 4].sum()
        assert below == np.count_nonzero((values > 0) & (values < histogram.width * BINS / 4))


def test_signs_do_not_matter_and_nothing_is_no_value() -> None:
    assert histogram_of(np.array([-3.0, 2.0])).largest == 3
    assert histogram_of(np.zeros(0)).total == 0


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "uniform"])
@pytest.mark.parametrize("collector", COLLECTORS)
def test_a_range_is_positive_and_within_what_was_seen(collector: Collector, kind: str) -> None:
    histogram = histogram_of(samples(kind))
    assert 0 < collect_range(histogram, collector) <= histogram.largest


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy"])
def test_max_and_percentiles_are_numpys(kind: str) -> None:
    x = np.abs(samples(kind).astype(np.float32))
    histogram = histogram_of(x)
    assert collect_range(histogram, "max") == x.max()
    for percent in (99.9, 99.99):
        found = collect_range(histogram, f"percentile-{percent}")
        one_of_them = np.percentile(x, percent, method="inverted_cdf")
        assert 0 <= found - one_of_them <= histogram.width * 1.001


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "uniform"])
def test_mse_is_within_two_per_cent_of_the_best_of_all_ranges(kind: str) -> None:
    x = samples(kind)

    def error(amax: float) -> float:
        step = amax / (LEVELS - 1)
        return float(np.mean((np.clip(np.rint(x / step), -127, 127) * step - x) ** 2))

    histogram = histogram_of(x)
    best = min(error(a) for a in np.linspace(0.05, 1, 96) * histogram.largest)
    assert error(collect_range(histogram, "mse")) <= 1.02 * best


def test_entropy_clips_rare_outliers_and_keeps_what_is_even() -> None:
    outlier = np.concatenate([samples("normal"), [500.0]])
    assert collect_range(histogram_of(outlier), "entropy") < 50
    assert collect_range(histogram_of(samples("uniform")), "entropy") > 4.5


@pytest.mark.parametrize("collector", COLLECTORS)
def test_nothing_but_zeros_is_refused(collector: Collector) -> None:
    with pytest.raises(DataError, match="nothing but zeros"):
        collect_range(histogram_of(np.zeros(10)), collector)
