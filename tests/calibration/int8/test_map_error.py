"""The error of a map, and when it is within a budget."""

from dataclasses import astuple, replace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.calibration.int8.map_error import MapError, map_error, worst
from qsm_deploy.calibration.int8.search import sqnr_db
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.metrics.metrics import xsim
from qsm_deploy.runtime.scan.scan import Scan

SHAPE = (12, 12, 12)


@pytest.fixture
def scan() -> Scan:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2:10, 2:10, 2:10] = True
    truth = np.random.default_rng(0).normal(0, 0.03, SHAPE).astype(np.float32)
    field = np.zeros((1, *SHAPE), dtype=np.float32)
    return Scan(field, mask, Geometry(SHAPE), nib.Nifti1Header(), np.eye(4), truth_ppm=truth)


def test_errors_are_in_ppb_and_of_the_mask(scan: Scan) -> None:
    exact = scan.truth_ppm * np.float32(0.9)
    got = exact + np.where(scan.mask, np.float32(0.002), np.float32(7))
    got[5, 5, 5] += np.float32(0.1)
    error = map_error(got, exact, scan)
    assert error.median_ppb == pytest.approx(2, rel=1e-4)
    assert error.max_ppb == pytest.approx(102, rel=1e-4)
    assert 2 < error.mean_ppb < 2.3
    expected = xsim(exact, scan.truth_ppm, scan.mask) - xsim(got, scan.truth_ppm, scan.mask)
    assert error.xsim_change == pytest.approx(abs(expected))
    without = map_error(got, exact, replace(scan, truth_ppm=None))
    assert without.xsim_change == pytest.approx(1 - xsim(got, exact, scan.mask))


def test_a_map_that_is_not_finite_has_no_error_that_is_a_number(scan: Scan) -> None:
    got = scan.truth_ppm.copy()
    got[4, 4, 4] = np.inf
    error = map_error(got, scan.truth_ppm, scan)
    assert np.isnan(astuple(error)).all()
    fine = MapError(1, 1, 1, 1, 0.1)
    assert np.isnan(worst([fine, error]).median_ppb)
    assert worst([fine, MapError(0.5, 2, 0.5, 0.5, 0.2)]) == MapError(1, 2, 1, 1, 0.2)


def test_sqnr_of_a_known_error() -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert sqnr_db(x, x * np.float32(1.01)) == pytest.approx(40, abs=0.01)
    assert sqnr_db(x, x) == np.inf
