"""The step solves what it says: against the dense system, its limits, its objective."""

import itertools

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.calibration.phantom.residual_background import residual_background
from qsm_deploy.kernels.data_consistency import data_consistency, masked_data_consistency
from qsm_deploy.kernels.dipole import dipole_convolve, tikhonov
from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion.grid import padded_box

OBLIQUE = Geometry((7, 5, 9), (0.8, 1.0, 1.7), (0.3, 0.4, 0.8))
GRIDS = [OBLIQUE, Geometry((8, 7, 6), (1.0, 0.9, 1.3), (0.3, -0.4, 0.8))]


def volumes(geometry: Geometry):
    rng = np.random.default_rng(4)
    chi, field = 0.05 * rng.standard_normal((2, *geometry.shape), dtype=np.float32)
    return chi, field, rng.random(geometry.shape) > 0.3


def on_padded_grid(chi: np.ndarray, mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return the field of a map on the grid that the masked step works on."""
    grid = padded_box(mask, geometry, around_mm=0)
    return grid.restore(dipole_convolve(grid.embed(chi), grid.geometry))


@pytest.mark.parametrize("pad_voxels", [0, 2])
def test_its_limits_are_the_network_and_tikhonov(pad_voxels) -> None:
    chi, field, _ = volumes(OBLIQUE)
    far = data_consistency(chi, field, OBLIQUE, lam=1e6, pad_voxels=pad_voxels)
    np.testing.assert_allclose(far, chi, atol=1e-6)
    near = data_consistency(np.zeros_like(chi), field, OBLIQUE, lam=0.02, pad_voxels=pad_voxels)
    expected = tikhonov(field, OBLIQUE, lam=0.02, pad_voxels=pad_voxels)
    np.testing.assert_array_equal(near, expected)


def test_a_map_that_explains_the_field_stays() -> None:
    chi, _, mask = volumes(OBLIQUE)
    chi *= mask
    field = dipole_convolve(chi, OBLIQUE)
    np.testing.assert_allclose(data_consistency(chi, field, OBLIQUE, lam=0.1), chi, atol=1e-7)
    field = on_padded_grid(chi, mask, OBLIQUE)
    seen, fit = masked_data_consistency(
        chi, field, mask, OBLIQUE, lam=0.1, iterations=3, support_mm=0
    )
    np.testing.assert_allclose(seen, chi, atol=1e-7)
    assert fit.fitted_residual < 1e-5


def test_every_iteration_lowers_the_objective() -> None:
    chi, field, mask = volumes(GRIDS[1])

    def objective(x: np.ndarray) -> float:
        misfit = mask * (on_padded_grid(x, mask, GRIDS[1]) - field)
        return float((misfit**2).sum() + 0.01 * ((x - mask * chi) ** 2).sum())

    def step(iterations: int) -> np.ndarray:
        options = {"lam": 0.01, "iterations": iterations, "support_mm": 0}
        return masked_data_consistency(chi, field, mask, GRIDS[1], **options)[0]

    steps = [objective(step(n)) for n in range(1, 7)]
    assert steps[0] < objective(mask * chi)
    assert all(later < earlier for earlier, later in itertools.pairwise(steps))


def test_sources_outside_take_up_what_background_removal_left() -> None:
    """A true map stays nearer to itself when those that spoil its field may be sought."""
    geometry = Geometry((36, 40, 32), (1.0, 1.0, 1.4), (0.2, 0.1, 0.9))
    head = head_phantom(geometry, seed=3)
    rng = np.random.default_rng(1)
    left = residual_background(head.mask, geometry, rms_ppm=0.01, rng=rng)
    errors, fits = [], []
    for support_mm in (0.0, 5.0):
        chi, fit = masked_data_consistency(
            head.chi_ppm,
            head.local_field_ppm + left,
            head.mask,
            geometry,
            lam=0.05,
            iterations=10,
            support_mm=support_mm,
        )
        errors.append(np.linalg.norm(chi - head.chi_ppm) / np.linalg.norm(head.chi_ppm))
        fits.append(fit.fitted_residual)
    assert errors[1] < 0.6 * errors[0]
    assert fits[1] < fits[0]


@pytest.mark.parametrize("lam", [0.0, -1.0, np.nan, np.inf])
def test_a_weight_that_cannot_be_is_refused(lam) -> None:
    chi, field, mask = volumes(OBLIQUE)
    with pytest.raises(UsageError, match="positive and finite"):
        data_consistency(chi, field, OBLIQUE, lam=lam)
    with pytest.raises(UsageError, match="positive and finite"):
        masked_data_consistency(chi, field, mask, OBLIQUE, lam=lam, iterations=1)


def test_other_bad_input_is_refused() -> None:
    chi, field, mask = volumes(OBLIQUE)
    with pytest.raises(UsageError, match="iterations"):
        masked_data_consistency(chi, field, mask, OBLIQUE, lam=0.1, iterations=0)
    with pytest.raises(GeometryError, match="shape"):
        data_consistency(chi, field[1:], OBLIQUE, lam=0.1)
