"""Prior maps against their definitions, in double precision or by their parts."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.fft

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.dipole import CONE, dipole_convolve, dipole_kernel, tkd
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion.prior_maps import anchored, iterated_tkd, variation_maps
from qsm_deploy.kernels.inversion.total_variation import solved, total_variation

GRID = Geometry((31, 35, 27), (1.1, 1.0, 1.3), (0.1, -0.3, 0.95))
THRESHOLD = 0.15
HOW = {"alpha_ppm_mm": 2e-4, "iterations": 4}


@pytest.fixture(scope="module")
def head():
    return head_phantom(GRID, seed=7, noise_ppm=0.0025)


@pytest.fixture(scope="module")
def field(head):
    return head.local_field_ppm * head.mask


@pytest.fixture(scope="module")
def maps(head):
    return variation_maps(head.local_field_ppm, head.mask, GRID, **HOW)


def close(a, b, relative=1e-5):
    np.testing.assert_allclose(a, b, atol=relative * np.abs(b).max())


class TestIteratedTkd:
    def test_the_first_step_is_a_masked_map(self, head, field):
        chi = iterated_tkd(field, head.mask, GRID, threshold=THRESHOLD, steps=1)
        assert np.array_equal(chi, head.mask * tkd(field, GRID, threshold=THRESHOLD))

    @pytest.mark.parametrize("steps", [2, 4])
    def test_it_is_its_definition_in_double_precision(self, head, field, steps):
        d, mask = dipole_kernel(GRID).astype(np.float64), head.mask
        inverse = np.where(np.abs(d) < CONE, 0, np.sign(d)) / np.maximum(np.abs(d), THRESHOLD)

        def filtered(x, multiplier):
            return scipy.fft.ifftn(scipy.fft.fftn(x) * multiplier).real

        chi = np.zeros(GRID.shape)
        for _ in range(steps):
            chi += mask * filtered(mask * (field - filtered(chi, d)), inverse)
        close(iterated_tkd(field, mask, GRID, threshold=THRESHOLD, steps=steps), chi)

    def test_every_step_explains_more(self, head, field):
        misses = []
        for steps in range(1, 7):
            chi = iterated_tkd(field, head.mask, GRID, threshold=0.2, steps=steps)
            misses.append(np.linalg.norm(head.mask * (field - dipole_convolve(chi, GRID))))
        assert all(after < before for before, after in pairwise(misses))
        assert misses[-1] < 0.7 * misses[0]

    def test_it_is_linear(self, head, field):
        how = {"threshold": THRESHOLD, "steps": 3}
        other = head.mask * np.random.default_rng(0).normal(0, 0.02, GRID.shape).astype(np.float32)
        one, two, both = (
            iterated_tkd(f, head.mask, GRID, **how) for f in (field, other, 3 * field - 2 * other)
        )
        close(both, 3 * one - 2 * two)

    def test_nothing_is_outside_and_the_field_stays(self, head, field):
        before = field.copy()
        chi = iterated_tkd(field, head.mask, GRID, threshold=THRESHOLD, steps=3)
        assert not chi[~head.mask].any()
        assert np.array_equal(field, before)


class TestVariationMaps:
    def test_the_first_is_the_map_of_total_variation(self, head, maps):
        chi, _ = total_variation(head.local_field_ppm, head.mask, GRID, sigma_ppm=0.0025, **HOW)
        assert np.array_equal(maps[0], chi)

    def test_the_others_are_their_definitions(self, head, maps):
        grid, solver = solved(head.local_field_ppm, head.mask, GRID, done=lambda: None, **HOW)
        field, inside, x = solver.field_ppm, solver.mask, solver.x
        outer = x * ~inside
        assert np.abs(outer).max() > 0.01  # there are sources outside, or the first two are one
        for seen, explained in ((maps[1], outer), (maps[2], x)):
            expected = inside * (field - dipole_convolve(explained, grid.geometry))
            close(seen, grid.restore(expected), 1e-4)

    def test_they_are_zero_outside_and_blind_to_it(self, head, maps):
        for found in maps:
            assert found.dtype == np.float32
            assert not found[~head.mask].any()
        noise = np.random.default_rng(1).normal(0, 1, GRID.shape).astype(np.float32)
        other = np.where(head.mask, head.local_field_ppm, noise)
        for seen, again in zip(maps, variation_maps(other, head.mask, GRID, **HOW), strict=True):
            assert np.array_equal(seen, again)

    def test_twice_the_field_and_its_weight_give_twice_the_maps(self, head, maps):
        how = HOW | {"alpha_ppm_mm": 2 * HOW["alpha_ppm_mm"]}
        twice = variation_maps(2 * head.local_field_ppm, head.mask, GRID, **how)
        for seen, double in zip(maps, twice, strict=True):
            assert np.array_equal(2 * seen, double)

    def test_every_iteration_is_told(self, head):
        told = []
        variation_maps(head.local_field_ppm, head.mask, GRID, **HOW, done=lambda: told.append(True))
        assert len(told) == HOW["iterations"]


class TestAnchored:
    @pytest.fixture
    def noise(self):
        return np.random.default_rng(3).standard_normal(GRID.shape, dtype=np.float32)

    def test_what_changes_is_weighed_by_frequency(self, noise):
        everywhere = np.ones(GRID.shape, dtype=bool)
        map_ = anchored(noise, 0 * noise, everywhere, GRID, threshold=THRESHOLD)
        d = np.abs(dipole_kernel(GRID).astype(float))
        weight = np.where(d < CONE, 0, np.minimum(d / THRESHOLD, 1)) ** 2
        expected = scipy.fft.ifftn(scipy.fft.fftn(noise.astype(float)) * weight).real
        close(map_, expected)

    def test_it_ends_at_the_mask(self, head, noise):
        prior = head.chi_ppm * head.mask
        map_ = anchored(noise * head.mask, prior, head.mask, GRID, threshold=THRESHOLD)
        assert not map_[~head.mask].any()
        free = anchored(noise * head.mask, prior, head.mask | True, GRID, threshold=THRESHOLD)
        close(map_[head.mask], free[head.mask])

    def test_the_prior_map_itself_stays(self, head):
        prior = head.chi_ppm * head.mask
        np.testing.assert_array_equal(
            anchored(prior, prior, head.mask, GRID, threshold=THRESHOLD), prior
        )
