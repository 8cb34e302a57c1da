"""COSMOS: how near several orientations come to the truth, and how well they see all of it."""

import math

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.dipole import dipole_convolve, dipole_kernel
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.inversion.cosmos import closed_form_cosmos, cosmos, coverage
from qsm_deploy.runtime.metrics.metrics import nrmse

NOISE_PPM = 0.0025


def about(axis: str, degrees: float) -> tuple[float, float, float]:
    """Return B0 as a head turned about an axis sees it."""
    s, c = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return (0.0, s, c) if axis == "x" else (s, 0.0, c)


THREE = [about("x", 0), about("x", 25), about("y", 25)]


def fields_of(chi, mask, geometry: Geometry, directions):
    rng = np.random.default_rng(7)
    for b in directions:
        turned = Geometry(geometry.shape, geometry.voxel_size_mm, b)
        field = dipole_convolve(chi, turned, pad_voxels=tuple(n // 2 for n in geometry.shape))
        noise = rng.standard_normal(geometry.shape, dtype=np.float32)
        yield np.where(mask, field + np.float32(NOISE_PPM) * noise, np.nan)


@pytest.fixture(scope="module")
def head():
    return head_phantom(Geometry((48, 56, 48), (2.0, 2.0, 2.0)), seed=501, noise_ppm=0)


def test_three_orientations_are_nearly_the_truth(head) -> None:
    fields = list(fields_of(head.chi_ppm, head.mask, head.geometry, THREE))
    errors = {}
    for count in (2, 3):
        chi, fit = cosmos(fields[:count], [head.mask] * count, THREE[:count], head.geometry)
        errors[count] = nrmse(chi, head.chi_ppm, head.mask)
        assert fit.iterations <= 10
        assert (chi[~head.mask] == 0).all()
    closed = nrmse(
        closed_form_cosmos(fields, head.mask, THREE, head.geometry), head.chi_ppm, head.mask
    )
    assert errors[3] < 18 < closed < 27
    assert errors[3] < errors[2] < 30


@pytest.mark.slow
def test_three_orientations_of_a_finer_head() -> None:
    head = head_phantom(Geometry((96, 112, 96)), seed=501, noise_ppm=0)
    fields = list(fields_of(head.chi_ppm, head.mask, head.geometry, THREE))
    chi, _ = cosmos(fields, [head.mask] * 3, THREE, head.geometry)
    assert nrmse(chi, head.chi_ppm, head.mask) < 18
    closed = closed_form_cosmos(fields, head.mask, THREE, head.geometry)
    assert nrmse(closed, head.chi_ppm, head.mask) < 26


def test_masks_may_differ(head) -> None:
    masks = [head.mask.copy() for _ in THREE]
    masks[1][:14], masks[2][:, :16] = False, False
    fields = [
        np.where(mask, field, np.nan)
        for field, mask in zip(
            fields_of(head.chi_ppm, head.mask, head.geometry, THREE), masks, strict=True
        )
    ]
    chi, _ = cosmos(fields, masks, THREE, head.geometry, iterations=15)
    everywhere = np.all(masks, axis=0)
    assert nrmse(chi, head.chi_ppm, everywhere) < 20
    assert np.isfinite(chi).all()


def test_the_closed_form_divides_by_what_all_see() -> None:
    geometry = Geometry((9, 8, 7), (0.8, 1.0, 1.3))
    rng = np.random.default_rng(0)
    chi = rng.standard_normal(geometry.shape, dtype=np.float32)
    chi -= chi.mean()
    seen = closed_form_cosmos(
        [
            dipole_convolve(chi, Geometry(geometry.shape, geometry.voxel_size_mm, b), pad_voxels=20)
            for b in THREE
        ],
        np.ones(geometry.shape, dtype=bool),
        THREE,
        geometry,
    )
    assert np.corrcoef(seen.ravel(), chi.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("shape", [(31, 40, 27), (16, 18, 20)])
def test_coverage_counts_what_no_orientation_sees(shape) -> None:
    geometry = Geometry(shape, (1.0, 0.9, 1.4))
    squared = np.zeros(shape)
    for b in THREE:
        squared += dipole_kernel(Geometry(shape, geometry.voxel_size_mm, b)).astype(float) ** 2
    mean = squared.ravel()[1:] / len(THREE)
    seen = coverage(THREE, geometry)
    assert seen.weakest == pytest.approx(math.sqrt(mean.min()), abs=1e-6)
    assert seen.unseen == pytest.approx((mean < 0.01).mean(), abs=1e-3)


def test_more_and_wider_orientations_see_more() -> None:
    geometry = Geometry((64, 64, 64))
    two, narrow = coverage(THREE[:2], geometry), coverage([THREE[0], about("x", 10)], geometry)
    three = coverage(THREE, geometry)
    assert three.unseen < 0.01 < 0.05 < two.unseen < narrow.unseen
    assert three.weakest > two.weakest


def test_one_orientation_is_refused() -> None:
    geometry = Geometry((8, 8, 8))
    field, mask = np.zeros((8, 8, 8), np.float32), np.ones((8, 8, 8), bool)
    for run in (
        lambda: cosmos([field], [mask], THREE[:1], geometry),
        lambda: closed_form_cosmos([field], mask, THREE[:1], geometry),
    ):
        with pytest.raises(UsageError, match="two orientations or more, got 1"):
            run()
