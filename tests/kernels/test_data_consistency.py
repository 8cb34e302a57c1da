"""The step solves what it says: against the dense system, its limits, its objective."""

import itertools

import numpy as np
import pytest

from qsm_deploy.kernels.data_consistency import data_consistency, masked_data_consistency
from qsm_deploy.kernels.dipole import dipole_convolve, tikhonov
from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry

OBLIQUE = Geometry((7, 5, 9), (0.8, 1.0, 1.7), (0.3, 0.4, 0.8))
GRIDS = [OBLIQUE, Geometry((8, 7, 6), (1.0, 0.9, 1.3), (0.3, -0.4, 0.8))]


def volumes(geometry: Geometry):
    rng = np.random.default_rng(4)
    chi, field = 0.05 * rng.standard_normal((2, *geometry.shape), dtype=np.float32)
    return chi, field, rng.random(geometry.shape) > 0.3


def dense_dipole(geometry: Geometry, pad_voxels: int) -> np.ndarray:
    """Return D as a matrix, column by column."""
    size = int(np.prod(geometry.shape))
    unit = np.eye(size).reshape(size, *geometry.shape)
    columns = [dipole_convolve(u, geometry, pad_voxels=pad_voxels).ravel() for u in unit]
    return np.array(columns).T


@pytest.mark.parametrize("pad_voxels", [0, 3])
@pytest.mark.parametrize("geometry", GRIDS, ids=["odd", "even"])
def test_the_masked_step_solves_the_normal_equations(geometry, pad_voxels) -> None:
    chi, field, mask = volumes(geometry)
    d, m = dense_dipole(geometry, pad_voxels), np.diag(mask.ravel().astype(float))
    for lam in (0.01, 0.3):
        a = m @ d @ m
        expected = np.linalg.solve(
            a @ a + lam * np.eye(len(m)), a @ field.ravel() + lam * m @ chi.ravel()
        )
        seen = masked_data_consistency(
            chi, field, mask, geometry, lam=lam, iterations=40, pad_voxels=pad_voxels
        )
        np.testing.assert_allclose(seen.ravel(), expected, atol=1e-5 * np.abs(expected).max())


def test_the_closed_form_is_the_masked_one_with_everything_measured() -> None:
    chi, field, _ = volumes(OBLIQUE)
    seen = data_consistency(chi, field, OBLIQUE, lam=0.03)
    everything = np.ones(OBLIQUE.shape, dtype=bool)
    expected = masked_data_consistency(chi, field, everything, OBLIQUE, lam=0.03, iterations=40)
    np.testing.assert_allclose(seen, expected, atol=1e-6)


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
    seen = masked_data_consistency(chi, field, mask, OBLIQUE, lam=0.1, iterations=3)
    np.testing.assert_allclose(seen, chi, atol=1e-7)


def test_every_iteration_lowers_the_objective() -> None:
    chi, field, mask = volumes(GRIDS[1])

    def objective(x: np.ndarray) -> float:
        misfit = mask * (dipole_convolve(x.astype(np.float64), GRIDS[1]) - field)
        return float((misfit**2).sum() + 0.01 * ((x - mask * chi) ** 2).sum())

    steps = [
        objective(masked_data_consistency(chi, field, mask, GRIDS[1], lam=0.01, iterations=n))
        for n in range(1, 7)
    ]
    assert steps[0] < objective(mask * chi)
    assert all(later < earlier for earlier, later in itertools.pairwise(steps))


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
