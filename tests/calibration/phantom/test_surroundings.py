"""What lies around the brain, and the background field that it makes."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from scipy.signal import fftconvolve

from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.calibration.phantom.phantom import Phantom, head_phantom
from qsm_deploy.calibration.phantom.residual_background import residual_background
from qsm_deploy.calibration.phantom.surroundings import background_field, draw_surroundings
from qsm_deploy.kernels.geometry import Geometry

GRIDS = (
    Geometry((80, 96, 80), (2.0, 2.0, 2.0)),
    Geometry((81, 70, 45), (1.6, 2, 3), (0.2, -0.4, 1)),
)

BALL_MM = 9.0
# of harmonic fields: measured .002 and .10, where few flat voxels make no good ball
MEAN_VALUE = dict(zip(GRIDS, (0.006, 0.13), strict=True))


@pytest.fixture(scope="module", params=GRIDS, ids=["upright", "oblique"])
def head(request) -> Phantom:
    return head_phantom(request.param, seed=4, noise_ppm=0)


@pytest.fixture(scope="module")
def around(head):
    return draw_surroundings(head.mask, head.geometry)


def departure(field, head):
    """Return how far a field is from its mean over balls around deep voxels, over its own size."""
    offsets = np.meshgrid(
        *(np.arange(-(BALL_MM // v), BALL_MM // v + 1) * v for v in head.geometry.voxel_size_mm),
        indexing="ij",
    )
    ball = sum(o * o for o in offsets) <= BALL_MM**2
    depth_mm = distance_transform_edt(head.mask, sampling=head.geometry.voxel_size_mm)
    deep = depth_mm > BALL_MM + 4
    mean = fftconvolve(head.mask * field.astype(float), ball / ball.sum(), mode="same")
    return (field - mean)[deep].std() / field[deep].std()


def test_bone_lies_on_the_brain_and_air_around_the_head(head, around):
    np.testing.assert_array_equal(around == 0, head.mask)
    assert set(np.unique(around[~head.mask])) == {Label.BONE, Label.MUSCLE, Label.AIR}
    beside = (distance_transform_edt(~head.mask) == 1) & ~head.mask
    assert np.all(around[beside] == Label.BONE)
    assert np.mean(around[:, :, -1] == Label.AIR) > 0.7
    assert np.mean(around[:, :, 0] == Label.MUSCLE) > 0.4  # the neck


def test_air_has_cavities_inside_the_head(head, around):
    x, y, z = (n // 2 for n in head.geometry.shape)
    front = around[x, y:, :z]
    assert np.any((front == Label.AIR) & (np.roll(front, 4, axis=0) != Label.AIR))
    nose = [
        n // 2 + round(at * n / fov)
        for n, at, fov in zip(around.shape, (0, 46, -44), (160, 192, 160), strict=True)
    ]
    assert around[tuple(nose)] == Label.AIR


def test_the_background_is_strong_and_harmonic_in_the_brain(head, around):
    background = background_field(around, head.geometry)
    local = head.local_field_ppm
    assert background.dtype == np.float32
    assert background.shape == head.mask.shape
    assert 0.05 < background[head.mask].std() < 0.4
    assert background[head.mask].std() > 5 * local[head.mask].std()
    assert departure(background, head) < MEAN_VALUE[head.geometry]
    assert departure(local, head) > 0.6


def test_shims_leave_the_rest_of_what_they_could_take(head, around):
    background = background_field(around, head.geometry)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in head.mask.shape), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, z], axis=-1)[head.mask]
    fit = terms @ np.linalg.lstsq(terms, background[head.mask], rcond=None)[0]
    assert fit.std() < 0.5 * background[head.mask].std()
    assert abs(fit.mean()) < 0.1


@pytest.mark.parametrize("rms_ppm", [0.002, 0.03])
def test_what_removal_leaves_has_the_stated_size_and_is_harmonic(head, rms_ppm):
    rng = np.random.default_rng(2)
    left = residual_background(head.mask, head.geometry, rms_ppm=rms_ppm, rng=rng)
    assert left.dtype == np.float32
    assert np.sqrt(np.mean(left[head.mask] ** 2)) == pytest.approx(rms_ppm, rel=1e-5)
    assert not left[~head.mask].any()
    assert departure(left, head) < MEAN_VALUE[head.geometry]
    again = residual_background(
        head.mask, head.geometry, rms_ppm=rms_ppm, rng=np.random.default_rng(2)
    )
    np.testing.assert_array_equal(left, again)


def test_what_removal_leaves_is_at_the_edge():
    head = head_phantom(Geometry((96, 112, 96)), seed=501)
    rng = np.random.default_rng(0)
    left = residual_background(head.mask, head.geometry, rms_ppm=0.002, rng=rng)
    depth = distance_transform_edt(head.mask)
    sizes = [
        np.sqrt(np.mean(left[where] ** 2)) / 0.002
        for where in (head.mask & (depth <= 4), depth > 12)
    ]
    assert sizes == pytest.approx([1.77, 0.16], rel=0.2)
