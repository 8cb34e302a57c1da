"""The masked least squares solve what they say: against the dense system, with its symmetries."""

import numpy as np
import pytest

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import DataError, GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion.grid import grown, padded_box
from qsm_deploy.kernels.inversion.least_squares import (
    Orientations,
    conjugate_gradients,
    masked_least_squares,
)

GRIDS = {
    "odd": Geometry((7, 5, 9), (0.8, 1.0, 1.7), (0.3, 0.4, 0.8)),
    "even": Geometry((8, 6, 6), (1.0, 0.9, 1.3), (0.3, -0.4, 0.8)),
}
DIRECTIONS = [(0.0, 0.0, 1.0), (0.3, -0.5, 0.8)]
STEPS = 8
each_grid = pytest.mark.parametrize("geometry", GRIDS.values(), ids=GRIDS)


def measured(geometry: Geometry, count: int):
    rng = np.random.default_rng(4)
    fields = 0.05 * rng.standard_normal((count, *geometry.shape), dtype=np.float32)
    masks = rng.random((count, *geometry.shape)) > 0.3
    masks[0, 0] = masks[:, :, -1] = True  # to the border
    return list(fields), list(masks)


@each_grid
@pytest.mark.parametrize("support_mm", [0.0, 1.4])
@pytest.mark.parametrize("count", [1, 2])
def test_their_steps_are_those_on_the_normal_equations(geometry, support_mm, count) -> None:
    fields, masks = measured(geometry, count)
    weights = [masks[0], *(np.float32(1.5) * mask for mask in masks[1:])]
    start = fields[0][::-1]
    mask = np.any(masks, axis=0)
    grid = padded_box(mask, geometry, around_mm=support_mm)
    support = grown(grid.embed_mask(mask), grid.geometry, support_mm)
    units = np.zeros((np.count_nonzero(support), *grid.geometry.shape))
    units[(np.arange(len(units)), *np.nonzero(support))] = 1
    rows, right = [], []
    for field, weight, b0 in zip(fields, weights, DIRECTIONS, strict=False):
        padded = Geometry(grid.geometry.shape, geometry.voxel_size_mm, b0)
        dipole = np.array([dipole_convolve(u, padded)[grid.inner].ravel() for u in units]).T
        rows.append(weight.ravel()[:, None] * dipole)
        right.append(weight.ravel() * field.ravel())
    a, f = np.concatenate(rows), np.concatenate(right)
    inside = grid.embed_mask(mask)
    held = 0.02 * inside[support]  # sources outside are free
    x0 = (grid.embed(start) * inside)[support]
    normal = a.T @ a + np.diag(held)
    step, _, left = conjugate_gradients(lambda v: normal @ v, a.T @ (f - a @ x0), iterations=STEPS)
    solved = x0 + step
    expected = np.zeros(grid.geometry.shape)
    expected[support] = solved
    seen, fit = masked_least_squares(
        fields,
        weights,
        DIRECTIONS[:count],
        geometry,
        start_ppm=start,
        lam=0.02,
        iterations=STEPS,
        support_mm=support_mm,
    )
    np.testing.assert_allclose(
        seen, expected[grid.inner] * mask, atol=2e-4 * np.abs(expected).max()
    )
    residual = np.linalg.norm(a @ solved - f) / np.linalg.norm(f)
    assert fit.fitted_residual == pytest.approx(residual, rel=1e-4)
    assert fit.gradient == pytest.approx(left, rel=0.01)


@each_grid
def test_the_adjoint_is_one(geometry) -> None:
    _, masks = measured(geometry, 2)
    grid = padded_box(masks[0], geometry, around_mm=2)
    support = grown(grid.embed_mask(masks[0]), grid.geometry, 2)
    system = Orientations(grid, DIRECTIONS, masks, support)
    rng = np.random.default_rng(1)
    x, *y = rng.standard_normal((3, *grid.geometry.shape), dtype=np.float32)
    x *= support
    forward = sum(
        np.vdot(w * d, v) for w, d, v in zip(system.squared, system.fields(x), y, strict=True)
    )
    adjoint = np.vdot(x, system.adjoint(v.copy() for v in y))
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    assert abs(forward - adjoint) < 1e-6 * scale


def test_they_are_linear_and_blind_outside_the_masks() -> None:
    geometry = GRIDS["odd"]
    fields, masks = measured(geometry, 2)
    options = {"iterations": 6, "support_mm": 2.0}
    chi, fit = masked_least_squares(fields, masks, DIRECTIONS, geometry, **options)
    for field, mask in zip(fields, masks, strict=True):
        field *= 3
        field[~mask] = np.nan
    seen, again = masked_least_squares(fields, masks, DIRECTIONS, geometry, **options)
    np.testing.assert_allclose(seen, 3 * chi, atol=1e-5 * np.abs(chi).max())
    assert again.fitted_residual == pytest.approx(fit.fitted_residual, rel=1e-5)
    assert (seen[~np.any(masks, axis=0)] == 0).all()


def test_a_zero_field_has_a_zero_map() -> None:
    geometry = GRIDS["odd"]
    _, masks = measured(geometry, 1)
    zero = np.zeros(geometry.shape, dtype=np.float32)
    calls: list[int] = []
    chi, fit = masked_least_squares(
        [zero], masks, DIRECTIONS[:1], geometry, iterations=5, done=lambda: calls.append(1)
    )
    assert not chi.any()
    assert (fit.iterations, fit.gradient, fit.fitted_residual) == (0, 0, 0)
    assert not calls


def test_the_tolerance_ends_the_steps() -> None:
    geometry = GRIDS["even"]
    fields, masks = measured(geometry, 2)
    calls: list[int] = []
    _, fit = masked_least_squares(
        fields,
        masks,
        DIRECTIONS,
        geometry,
        iterations=50,
        tolerance=0.1,
        done=lambda: calls.append(1),
    )
    assert 1 < fit.iterations == len(calls) < 50
    assert fit.gradient <= 0.1


def test_conjugate_gradients_follow_the_inner_product() -> None:
    rng = np.random.default_rng(2)
    metric = rng.random(6) + 0.5
    half = rng.standard_normal((6, 6))
    matrix = (half @ half.T + np.eye(6)) / metric[:, None]  # symmetric in the metric alone
    b = rng.standard_normal(6)
    x, taken, left = conjugate_gradients(
        lambda v: matrix @ v, b.copy(), iterations=9, inner=lambda u, v: float(u @ (metric * v))
    )
    np.testing.assert_allclose(matrix @ x, b, atol=1e-5)
    assert taken <= 7
    assert left < 1e-5


def test_bad_input_is_refused() -> None:
    geometry = GRIDS["odd"]
    fields, masks = measured(geometry, 2)
    with pytest.raises(UsageError, match="iterations must be positive"):
        masked_least_squares(fields, masks, DIRECTIONS, geometry, iterations=0)
    with pytest.raises(UsageError, match="2, 1 and 2"):
        masked_least_squares(fields, masks[:1], DIRECTIONS, geometry, iterations=1)
    with pytest.raises(GeometryError, match="shape"):
        masked_least_squares([fields[0], fields[1][1:]], masks, DIRECTIONS, geometry, iterations=1)
    with pytest.raises(DataError, match="mask is empty"):
        masked_least_squares(fields[:1], [masks[0] & False], DIRECTIONS[:1], geometry, iterations=1)
