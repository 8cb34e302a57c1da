"""The map of least total variation, against a plain float64 twin, its properties, and a head."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.dipole import dipole_convolve, dipole_kernel, tkd
from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion.edges import edges_of_magnitude
from qsm_deploy.kernels.inversion.field_noise import (
    AXES,
    alpha_of_noise,
    b0_contradicted,
    field_noise,
    noise_of_most,
)
from qsm_deploy.kernels.inversion.gradients import (
    gradient,
    gradient_adjoint,
    laplacian_eigenvalues,
)
from qsm_deploy.kernels.inversion.grid import grown, padded_box
from qsm_deploy.kernels.inversion.total_variation import (
    EvenTerm,
    Solver,
    WeightedTerm,
    total_variation,
    without_outliers,
)
from qsm_deploy.runtime.metrics.metrics import hfen, nrmse, xsim

OBLIQUE = (0.3, -0.4, 0.87)
GRIDS = [
    Geometry((31, 40, 27)),
    Geometry((33, 35, 37), (0.8, 0.8, 2.0)),
    Geometry((24, 30, 29), (1.0, 1.2, 0.9), OBLIQUE),
]
ALPHA = 2e-4


def ball_mask(shape, radius=0.42):
    axes = [(np.arange(n) - (n - 1) / 2) / (radius * n) for n in shape]
    x, y, z = np.ix_(*axes)
    return x * x + y * y + z * z < 1


def blocks(geometry, seed=0):
    """Return a map of some boxes inside a ball, its field and the ball."""
    rng = np.random.default_rng(seed)
    mask = ball_mask(geometry.shape)
    chi = np.zeros(geometry.shape, dtype=np.float32)
    for _ in range(6):
        low = [int(rng.integers(n // 4, n // 2)) for n in geometry.shape]
        box = tuple(
            slice(at, at + int(rng.integers(3, n // 4)))
            for at, n in zip(low, geometry.shape, strict=True)
        )
        chi[box] = rng.uniform(-0.1, 0.2)
    chi *= mask
    field = dipole_convolve(chi, geometry, pad_voxels=tuple(n // 2 for n in geometry.shape)) * mask
    return chi, field.astype(np.float32), mask


def twin(field, mask, geometry, alpha, iterations, weight=None, huber=None):
    """Return the map by the published iteration, every dual kept, complex transforms, float64."""
    grid = padded_box(mask, geometry)
    inside, g = grid.embed_mask(mask), grid.geometry
    f = grid.embed(field).astype(np.float64) * inside
    w = inside.astype(np.float64) if weight is None else grid.embed(weight) * inside
    w = np.minimum(w / np.median(w[w > 0]), 10)
    support = grown(inside, g, 5.0)
    d = dipole_kernel(g).astype(np.float64)
    h = g.voxel_size_mm
    k = np.ix_(*(2 * np.pi * np.arange(n) / n for n in g.shape))
    lap = sum((2 - 2 * np.cos(k[a])) / h[a] ** 2 for a in range(3))
    mu1, mu2, mu3 = alpha / np.sqrt((f[inside] ** 2).mean()), 1.0, 0.01

    def apply(multiplier, x):
        return np.fft.ifftn(multiplier * np.fft.fftn(x)).real

    def grad(x):
        return [(np.roll(x, -1, a) - x) / h[a] for a in range(3)]

    def adjoint(v):
        return sum((np.roll(v[a], 1, a) - v[a]) / h[a] for a in range(3))

    def prox(v):
        r = v - f
        q = mu2 * r / (w * w + mu2)
        if huber is not None:
            limit = w * huber  # of W r
            q = np.where(w * np.abs(q) <= huber, q, r - np.sign(r) * limit / mu2)
        return f + q

    x = inside * tkd(f, g, threshold=0.2)
    z1, s1 = grad(x), [np.zeros_like(x)] * 3
    z2 = prox(apply(d, x))
    s2 = apply(d, x) - z2
    z3, s3 = support * x, (1 - support) * x
    for _ in range(iterations):
        b = mu3 * (z3 - s3) + mu1 * adjoint([z - s for z, s in zip(z1, s1, strict=True)])
        big = np.fft.fftn(b) + mu2 * d * np.fft.fftn(z2 - s2)
        big /= mu2 * d * d + mu1 * lap + mu3
        x, dx = np.fft.ifftn(big).real, np.fft.ifftn(d * big).real
        v1 = [a + s for a, s in zip(grad(x), s1, strict=True)]
        s1 = [np.clip(v, -alpha / mu1, alpha / mu1) for v in v1]
        z1 = [v - s for v, s in zip(v1, s1, strict=True)]
        z2 = prox(dx + s2)
        s2 = dx + s2 - z2
        z3, s3 = support * (x + s3), (1 - support) * (x + s3)
    return grid.restore((x * inside).astype(np.float32))


@pytest.mark.parametrize("geometry", GRIDS, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_equals_the_plain_iteration(geometry, weighted):
    _, field, mask = blocks(geometry)
    weight = None
    if weighted:
        weight = np.random.default_rng(3).uniform(0.2, 2, geometry.shape).astype(np.float32)
    chi, facts = total_variation(
        field, mask, geometry, alpha_ppm_mm=ALPHA, sigma_ppm=1, weight=weight, iterations=8
    )
    expected = twin(field, mask, geometry, ALPHA, 8, weight)
    assert np.abs(chi - expected).max() < 2e-5 * np.abs(expected).max()
    assert facts.iterations == 8
    assert not chi[~mask].any()


def test_huber_is_that_of_the_plain_iteration():
    """With outliers that make it bite; the limit of a voxel goes with its noise."""
    geometry = GRIDS[0]
    _, field, mask = blocks(geometry)
    field.reshape(-1)[np.flatnonzero(mask)[::300]] += 0.39
    weight = np.random.default_rng(3).uniform(0.2, 2, geometry.shape).astype(np.float32)
    weight /= np.median(weight[mask])
    expected = twin(field, mask, geometry, ALPHA, 8, weight, huber=0.02)
    grid = padded_box(mask, geometry)
    inside, f = grid.embed_mask(mask), grid.embed(field * mask)
    solver = Solver(f, inside, grown(inside, grid.geometry, 5.0), grid.geometry, ALPHA)
    term = WeightedTerm(f, (grid.embed(weight) * inside) ** 2, 0.02)
    solver.start(term)
    solver.iterate(8, term, lambda: None)
    chi = grid.restore(solver.x * inside)
    assert np.abs(chi - expected).max() < 2e-5 * np.abs(expected).max()
    linear = twin(field, mask, geometry, ALPHA, 8, weight)
    assert np.abs(linear - expected).max() > 0.1 * np.abs(expected).max()


def test_one_voxel_that_is_off_by_far_is_one_outlier():
    geometry = GRIDS[0]
    _, field, mask = blocks(geometry)
    wrong = tuple(np.argwhere(mask)[3000])
    spoilt = field.copy()
    spoilt[wrong] = 50
    filled, missed = without_outliers(
        spoilt, mask, geometry, alpha_ppm_mm=ALPHA, sigma_ppm=23 * ALPHA
    )
    assert missed[wrong]
    assert np.count_nonzero(missed) < 10
    assert abs(filled[wrong] - field[wrong]) < 0.1
    assert np.array_equal(filled[~missed & mask], spoilt[~missed & mask])


def test_outliers_are_told_and_filled_in():
    """Where the weight trusts a voxel less, it may be off by more."""
    geometry = GRIDS[0]
    chi, field, mask = blocks(geometry)
    how = {"alpha_ppm_mm": ALPHA, "sigma_ppm": 23 * ALPHA}
    wrong = np.flatnonzero(mask)[::300]
    spoilt = field.copy()
    spoilt.reshape(-1)[wrong] += 0.39
    share = wrong.size / np.count_nonzero(mask)
    plain, facts = total_variation(spoilt, mask, geometry, iterations=25, **how)
    assert facts.outliers > 0.5 * share
    filled, missed = without_outliers(spoilt, mask, geometry, **how)
    assert missed.reshape(-1)[wrong].all()
    assert share <= missed[mask].mean() < 2 * share
    assert np.abs(filled - field)[mask].max() < 0.2
    weight = np.where(missed, np.float32(0), mask)
    robust, _ = total_variation(filled, mask, geometry, weight=weight, iterations=25, **how)
    assert nrmse(robust, chi, mask) < 0.25 * nrmse(plain, chi, mask)
    trust = mask.astype(np.float32)
    trust.reshape(-1)[wrong] = 1e-3
    assert not without_outliers(spoilt, mask, geometry, weight=trust, **how)[1].any()
    assert total_variation(spoilt, mask, geometry, weight=trust, **how)[1].outliers == 0


class TestProperties:
    geometry = GRIDS[2]

    def map_of(self, field, mask, geometry=None, scale=1.0, **how):
        return total_variation(
            field,
            mask,
            geometry or self.geometry,
            alpha_ppm_mm=ALPHA * scale,
            sigma_ppm=1e-3 * scale,
            iterations=12,
            **how,
        )[0]

    def test_homogeneous_and_odd(self):
        _, field, mask = blocks(self.geometry)
        chi = self.map_of(field, mask)
        for factor in (-1.0, 3.0):
            other = self.map_of(np.float32(factor) * field, mask, scale=abs(factor))
            assert np.abs(other - factor * chi).max() < 1e-5 * np.abs(other).max()

    def test_zero_field_gives_a_zero_map(self):
        assert not self.map_of(
            np.zeros(self.geometry.shape, np.float32), ball_mask((24, 30, 29))
        ).any()

    @pytest.mark.parametrize("axis", range(3))
    def test_flipped_field_and_b0(self, axis):
        _, field, mask = blocks(self.geometry)
        b0 = list(self.geometry.b0_direction)
        b0[axis] *= -1
        flipped = Geometry(self.geometry.shape, self.geometry.voxel_size_mm, tuple(b0))
        chi = self.map_of(field, mask)
        other = self.map_of(np.flip(field, axis), np.flip(mask, axis), flipped)
        assert np.abs(np.flip(other, axis) - chi).max() < 1e-5 * np.abs(chi).max()

    @pytest.mark.parametrize("axis", range(3))
    def test_flipped_magnitude(self, axis):
        _, field, mask = blocks(self.geometry)
        signal = np.random.default_rng(3).random(field.shape, dtype=np.float32)
        b0 = list(self.geometry.b0_direction)
        b0[axis] *= -1
        flipped = Geometry(self.geometry.shape, self.geometry.voxel_size_mm, tuple(b0))
        edges = edges_of_magnitude(signal, mask, self.geometry)
        chi = self.map_of(field, mask, edges=edges)
        turned = [np.flip(x, axis).copy() for x in (field, mask, signal)]
        edges = edges_of_magnitude(turned[2], turned[1], flipped)
        other = self.map_of(*turned[:2], flipped, edges=edges)
        assert np.abs(np.flip(other, axis) - chi).max() < 1e-5 * np.abs(chi).max()

    def test_weights_of_any_scale_and_one_that_is_far_too_large(self):
        _, field, mask = blocks(self.geometry)
        weight = np.random.default_rng(3).uniform(0.5, 2, field.shape).astype(np.float32)
        chi = self.map_of(field, mask, weight=weight)
        for scale in (1e-25, 1e25):
            other = self.map_of(field, mask, weight=np.float32(scale) * weight)
            assert np.abs(other - chi).max() < 1e-5 * np.abs(chi).max()
        weight[tuple(np.argwhere(mask)[100])] = 1e30
        other = self.map_of(field, mask, weight=weight)
        assert np.abs(other - chi).max() < 0.05 * np.abs(chi).max()

    def test_what_lies_outside_the_mask_is_not_looked_at(self):
        _, field, mask = blocks(self.geometry)
        noisy = np.where(mask, field, np.float32(np.nan))
        assert np.array_equal(self.map_of(noisy, mask), self.map_of(field, mask))

    def test_where_it_lies_in_a_larger_volume_does_not_matter(self):
        _, field, mask = blocks(self.geometry)
        pads = ((3, 1), (0, 7), (2, 2))
        x, y, z = (n + a + b for n, (a, b) in zip(self.geometry.shape, pads, strict=True))
        larger = Geometry((x, y, z), self.geometry.voxel_size_mm, self.geometry.b0_direction)
        chi = self.map_of(np.pad(field, pads), np.pad(mask, pads), larger)
        assert np.array_equal(chi[3:-1, :-7, 2:-2], self.map_of(field, mask))

    @pytest.mark.parametrize("kind", ["one slice", "whole volume", "one voxel"])
    def test_masks_at_the_limit(self, kind):
        _, field, mask = blocks(self.geometry)
        if kind == "one slice":
            mask[..., :14] = mask[..., 15:] = False
        elif kind == "whole volume":
            mask[:] = True
        else:
            mask[:] = False
            mask[0, 0, 0] = True
        chi = self.map_of(field, mask)
        assert np.isfinite(chi).all()
        assert not chi[~mask].any()

    def test_refusals(self):
        _, field, mask = blocks(self.geometry)
        with pytest.raises(DataError, match="mask is empty"):
            self.map_of(field, np.zeros_like(mask))
        for wrong in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(UsageError, match="alpha must be positive"):
                total_variation(field, mask, self.geometry, alpha_ppm_mm=wrong, sigma_ppm=1)
        with pytest.raises(UsageError, match="iterations must be positive"):
            total_variation(field, mask, self.geometry, alpha_ppm_mm=1, sigma_ppm=1, iterations=0)


def test_reaches_the_minimum():
    """Its objective is that of a smoothed twin, solved by Gauss-Newton steps, within 1 %."""
    geometry = Geometry((20, 22, 18), b0_direction=OBLIQUE)
    _, field, mask = blocks(geometry)
    field = field + np.float32(1e-3) * np.random.default_rng(1).standard_normal(
        field.shape, dtype=np.float32
    )
    grid = padded_box(mask, geometry)
    inside, g = grid.embed_mask(mask), grid.geometry
    support, f = grown(inside, g, 5.0), grid.embed(field) * inside

    def dipole(x):
        return dipole_convolve(x.astype(np.float64), g)

    def objective(x):
        edges = sum(float(np.abs(gradient(x, g, a)).sum()) for a in range(3))
        return 0.5 * float(((inside * (dipole(x) - f)) ** 2).sum()) + ALPHA * edges

    x = np.zeros(g.shape)
    for _ in range(25):
        v = [1 / np.sqrt(gradient(x, g, a) ** 2 + 1e-5**2) for a in range(3)]

        def normal(p, v=v):
            edges = sum(gradient_adjoint(v[a] * gradient(p, g, a), g, a) for a in range(3))
            return support * (dipole(inside * dipole(p)) + ALPHA * edges)

        r = support * dipole(inside * f) - normal(x)
        p, rr = r.copy(), float((r * r).sum())
        for _ in range(60):
            image = normal(p)
            step = rr / float((p * image).sum())
            x = x + step * p
            r -= step * image
            before, rr = rr, float((r * r).sum())
            p = r + rr / before * p
    solver = Solver(f, inside, support, g, ALPHA)
    term = EvenTerm(f, inside)
    solver.start(term)
    solver.iterate(400, term, lambda: None)
    found = objective((solver.x * support).astype(np.float64))
    assert found < 1.01 * objective(x)
    assert found < 0.9 * objective(np.zeros(g.shape))


class TestGradients:
    @pytest.mark.parametrize("geometry", GRIDS, ids=str)
    def test_adjoint_and_eigenvalues(self, geometry):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((2, *geometry.shape))
        normal = np.zeros(geometry.shape)
        for axis in range(3):
            left = float((gradient(x, geometry, axis) * y).sum())
            right = float((x * gradient_adjoint(y, geometry, axis)).sum())
            assert left == pytest.approx(right, rel=1e-6)
            normal += gradient_adjoint(gradient(x, geometry, axis), geometry, axis)
        eigenvalues = sum(laplacian_eigenvalues(geometry))
        by_eigenvalues = scipy.fft.irfftn(eigenvalues * scipy.fft.rfftn(x), s=geometry.shape)
        assert np.allclose(normal, by_eigenvalues, rtol=0, atol=1e-5 * np.abs(normal).max())


class TestGrid:
    def test_grown_is_the_distance_in_mm(self):
        from scipy.ndimage import distance_transform_edt

        geometry = Geometry((36, 40, 31), (0.8, 1.0, 2.0))
        mask = np.zeros(geometry.shape, dtype=bool)
        mask[12:20, 15:22, 12:16] = np.random.default_rng(0).random((8, 7, 4)) > 0.5
        distance = distance_transform_edt(~mask, sampling=geometry.voxel_size_mm)
        for radius in (0.0, 2.0, 5.0):
            assert np.array_equal(grown(mask, geometry, radius), distance <= radius + 1e-6)

    def test_voxel_sizes_of_headers_give_the_grid_of_the_exact_ones(self):
        """In single precision 5 mm may be a little more or less than four voxels of 1.25 mm."""
        mask = np.zeros((24, 24, 24), dtype=bool)
        mask[12, 12, 12] = True
        exact = Geometry(mask.shape, (1.25, 1.0, 2.5))
        for off in (1 - 5e-8, 1 + 5e-8):
            x, y, z = (off * h for h in exact.voxel_size_mm)
            rounded = Geometry(mask.shape, (x, y, z))
            assert (
                padded_box(mask, rounded).geometry.shape == padded_box(mask, exact).geometry.shape
            )
            assert np.array_equal(grown(mask, rounded, 5.0), grown(mask, exact, 5.0))

    def test_there_is_room_around_the_support(self):
        geometry = Geometry((20, 20, 20), (0.8, 1, 2))
        grid = padded_box(np.ones(geometry.shape, bool), geometry)
        assert all(
            n >= 20 + 2 * (math.ceil(5 / h) + 4)
            for n, h in zip(grid.geometry.shape, (0.8, 1, 2), strict=True)
        )
        volume = np.random.default_rng(0).random(geometry.shape, dtype=np.float32)
        assert np.array_equal(grid.restore(grid.embed(volume)), volume)


HEADS = {
    "1 mm axial": (Geometry((96, 112, 96)), 29, 0.79),
    "35 degrees": (Geometry((96, 112, 96), b0_direction=(0.344, 0.459, 0.819)), 29, 0.78),
    "0.8 x 0.8 x 2 mm": (Geometry((120, 144, 48), (0.8, 0.8, 2.0)), 29, 0.80),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_a_head(name):
    geometry, most_nrmse, least_xsim = HEADS[name]
    head = head_phantom(geometry, seed=501, noise_ppm=0.0025)
    sigma = field_noise(head.local_field_ppm, head.mask, geometry)
    assert 0.95 * 0.0025 < sigma < 1.25 * 0.0025
    alpha = alpha_of_noise(sigma, geometry)
    seen = {"alpha_ppm_mm": alpha, "sigma_ppm": sigma}
    chi, facts = total_variation(head.local_field_ppm, head.mask, geometry, **seen)
    assert nrmse(chi, head.chi_ppm, head.mask) < most_nrmse
    assert xsim(chi, head.chi_ppm, head.mask) > least_xsim
    assert facts.last_change < 5e-3
    assert facts.outliers < 5e-4
    contrast = np.array([0, *np.linspace(0.6, 1.0, 18)], dtype=np.float32)
    magnitude = contrast[np.clip(head.labels, 0, 18)] * head.mask
    edges = edges_of_magnitude(magnitude, head.mask, geometry)
    medi, _ = total_variation(head.local_field_ppm, head.mask, geometry, edges=edges, **seen)
    assert nrmse(medi, head.chi_ppm, head.mask) < most_nrmse
    assert hfen(medi, head.chi_ppm, head.mask) < hfen(chi, head.chi_ppm, head.mask)


class TestFieldNoise:
    geometry = Geometry((64, 72, 60))

    @pytest.mark.parametrize("noise", [0.0025, 0.005, 0.01])
    def test_of_a_field(self, noise):
        _, field, mask = blocks(self.geometry)
        rng = np.random.default_rng(7)
        noisy = field + np.float32(noise) * rng.standard_normal(field.shape, dtype=np.float32)
        assert 0.95 * noise < field_noise(noisy, mask, self.geometry) < 1.25 * noise

    def test_is_homogeneous_and_blind_to_what_is_outside(self):
        _, field, mask = blocks(self.geometry)
        noise = field_noise(field, mask, self.geometry)
        outside = np.where(mask, field, np.float32(np.nan))
        assert field_noise(outside, mask, self.geometry) == noise
        assert field_noise(2 * field, mask, self.geometry) == pytest.approx(2 * noise, rel=1e-5)

    @pytest.mark.parametrize("noise", [0.0, 0.001])
    def test_tells_b0_where_another_direction_is_stated(self, noise):
        grid = Geometry(self.geometry.shape, (1.0, 1.0, 1.5), OBLIQUE)
        _, field, mask = blocks(grid)
        rng = np.random.default_rng(7)
        field += np.float32(noise) * rng.standard_normal(field.shape, dtype=np.float32)
        wrong = replace(grid, b0_direction=(0.0, 1.0, 0.0))
        assert b0_contradicted(field, mask, grid, AXES) is None
        assert b0_contradicted(field, mask, wrong, [*AXES, OBLIQUE]) == OBLIQUE
        field[:] = rng.standard_normal(field.shape)
        assert b0_contradicted(field, mask, grid, AXES) is None

    def test_has_a_floor_where_k_space_was_filled_with_zeros(self):
        _, field, mask = blocks(self.geometry)
        coarse = np.fft.fftn(field)
        coarse[8:-8] = coarse[:, 8:-8] = coarse[:, :, 8:-8] = 0
        field = np.fft.ifftn(coarse).real.astype(np.float32)
        mask[:] = True
        noise = field_noise(field, mask, self.geometry)
        assert noise == pytest.approx(0.02 * field.std(), rel=1e-3)

    def test_wrong_voxels_do_not_raise_the_noise_of_most(self):
        _, field, mask = blocks(self.geometry)
        field += np.float32(0.0025) * np.random.default_rng(7).standard_normal(
            field.shape, dtype=np.float32
        )
        field.reshape(-1)[np.flatnonzero(mask)[::200]] += 0.39
        sigma = field_noise(field, mask, self.geometry)
        assert sigma > 0.02
        assert 0.9 * 0.0025 < noise_of_most(field, mask, sigma) < 1.25 * 0.0025
        assert noise_of_most(field, mask, 0.001) == 0.001

    def test_of_one_slice_and_of_one_voxel(self):
        mask = np.zeros(self.geometry.shape, dtype=bool)
        mask[10:30, 10:30, 20] = True
        field = np.random.default_rng(0).standard_normal(mask.shape, dtype=np.float32)
        assert 0 < field_noise(field, mask, self.geometry) < 3
        mask[:] = False
        mask[3, 3, 3] = True
        assert field_noise(field, mask, self.geometry) == 0
        assert noise_of_most(field, mask, 0.5) == 0.5


def test_edges_are_the_steepest_and_need_contrast():
    geometry = GRIDS[1]
    mask = ball_mask(geometry.shape)
    magnitude = np.random.default_rng(0).random(geometry.shape, dtype=np.float32) * mask
    penalised = edges_of_magnitude(magnitude, mask, geometry)
    both = np.stack([mask & np.roll(mask, -1, axis) for axis in range(3)])
    assert (~penalised[both]).mean() == pytest.approx(0.3, abs=0.01)
    assert penalised[~both].all()
    with pytest.raises(DataError, match="the same everywhere"):
        edges_of_magnitude(mask.astype(np.float32), mask, geometry)
