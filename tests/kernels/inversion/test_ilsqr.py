"""iLSQR: as far from the truth as published, and no farther, with the symmetries of its steps."""

import math

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion.ilsqr import ilsqr
from qsm_deploy.runtime.metrics.metrics import nrmse

TILT = math.sin(math.radians(35))
OBLIQUE = (TILT * 0.6, TILT * 0.8, math.cos(math.radians(35)))
SMALL = Geometry((31, 36, 27), (1.1, 1.0, 1.4), OBLIQUE)
FEW = 8  # iterations, where it is not accuracy that is looked at


@pytest.fixture(scope="module")
def small():
    return head_phantom(SMALL, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((96, 112, 96)),
        Geometry((96, 112, 96), b0_direction=OBLIQUE),
        Geometry((120, 144, 48), (0.8, 0.8, 2.0)),
    ],
    ids=["axial", "oblique", "0.8 x 0.8 x 2 mm"],
)
def test_its_error_is_the_published_method_s(geometry) -> None:
    head = head_phantom(geometry, seed=501)
    chi, fit = ilsqr(head.local_field_ppm, head.mask, geometry)
    assert 50 < nrmse(chi, head.chi_ppm, head.mask) < 62
    assert fit.iterations == 100
    assert 0.3 < fit.fitted_residual < 0.4


def test_weights_of_signed_values_would_lose_edges(small) -> None:
    chi, _ = ilsqr(small.local_field_ppm, small.mask, SMALL)
    assert nrmse(chi, small.chi_ppm, small.mask) < 62  # 303 with signed ones


def test_it_is_linear_and_blind_outside_the_mask(small) -> None:
    calls: list[int] = []
    chi, fit = ilsqr(
        small.local_field_ppm, small.mask, SMALL, iterations=FEW, done=lambda: calls.append(1)
    )
    assert len(calls) == fit.iterations == 2 * FEW
    field = np.where(small.mask, 3 * small.local_field_ppm, np.nan)
    again, _ = ilsqr(field, small.mask, SMALL, iterations=FEW)
    np.testing.assert_allclose(again, 3 * chi, atol=1e-4 * np.abs(chi).max())
    assert (again[~small.mask] == 0).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_field_has_a_mirrored_map(axis) -> None:
    """On a grid of odd lengths; of even ones, B0 oblique, the corners of k-space have no mirror."""
    shape, voxel_size_mm = (27, 27, 27), (1.1, 1.0, 1.4)
    mirror = [-1.0 if a == axis else 1.0 for a in range(3)]
    turned = Geometry(shape, voxel_size_mm, tuple(np.multiply(OBLIQUE, mirror)))
    rng = np.random.default_rng(5)
    field = rng.standard_normal(shape, dtype=np.float32)
    mask = rng.random(shape) > 0.1
    chi, _ = ilsqr(field, mask, Geometry(shape, voxel_size_mm, OBLIQUE), iterations=FEW)
    mirrored, _ = ilsqr(
        np.flip(field, axis).copy(), np.flip(mask, axis).copy(), turned, iterations=FEW
    )
    np.testing.assert_allclose(np.flip(mirrored, axis), chi, atol=1e-4 * np.abs(chi).max())


def test_a_zero_field_has_a_zero_map(small) -> None:
    chi, fit = ilsqr(np.zeros_like(small.local_field_ppm), small.mask, SMALL, iterations=FEW)
    assert not chi.any()
    assert fit.fitted_residual == 0


@pytest.mark.parametrize("where", [np.s_[:], np.s_[:, 17], np.s_[4, 4, 4]])
def test_any_mask_will_do_but_none(small, where) -> None:
    mask = np.zeros(SMALL.shape, dtype=bool)
    mask[where] = True
    field = np.random.default_rng(0).standard_normal(SMALL.shape, dtype=np.float32)
    chi, _ = ilsqr(field, mask, SMALL, iterations=FEW)
    assert np.isfinite(chi).all()
    assert (chi[~mask] == 0).all()
    with pytest.raises(DataError, match="mask is empty"):
        ilsqr(field, mask & False, SMALL)
