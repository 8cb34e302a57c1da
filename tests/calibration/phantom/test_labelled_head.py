"""A labelled head as a scanner measures it: its truth, its phase, its readout."""

from dataclasses import replace

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.calibration.phantom.contrast import Contrast
from qsm_deploy.calibration.phantom.gradient_echo import GradientEcho, readout_offset
from qsm_deploy.calibration.phantom.head_frame import HeadFrame, ellipsoid_radius
from qsm_deploy.calibration.phantom.labelled_head import CHI_PPM, FineHead, fine_head, measure
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry

FINE = Geometry((72, 80, 66), (2.2, 2.4, 2.5), (0.2, -0.3, 1.0))
SHAPE = (47, 50, 31)
TIMES_S = (0.004, 0.011, 0.018)
NOISE_FREE = 1e9
STEP_RAD = 2 * np.pi / 4096


@pytest.fixture(scope="module")
def labels():
    """Return shells of tissues, in which bone adjoins grey matter and air is in the head."""
    axes = HeadFrame(FINE).axes
    labels = np.full(FINE.shape, Label.AIR, dtype=np.uint8)
    for label, semi_axes_mm in (
        (Label.MUSCLE, (78, 94, 200)),
        (Label.BONE, (70, 86, 72)),
        (Label.GREY_MATTER, (64, 80, 66)),
        (Label.WHITE_MATTER, (58, 74, 60)),
        (Label.CSF, (8, 20, 10)),
    ):
        labels[ellipsoid_radius(axes, (0, 0, 0), semi_axes_mm) < 1] = label
    labels[ellipsoid_radius(axes, (0, 40, -80), (12, 20, 14)) < 1] = Label.AIR
    return labels


@pytest.fixture(scope="module")
def head(labels) -> FineHead:
    return fine_head(labels, FINE, seed=1)


def measured(head, shape=SHAPE, **options):
    sequence = GradientEcho(TIMES_S, **{"snr": NOISE_FREE} | options)
    return measure(head, shape, sequence, np.random.default_rng(2))


@pytest.fixture(scope="module")
def acquisition(head):
    return measured(head)


def wrapped(angle):
    return np.angle(np.exp(1j * angle))


def test_lesions_lie_in_the_brain_which_has_no_mean(labels, head):
    lesions = np.isin(head.labels, (Label.HAEMORRHAGE, Label.MICROBLEED))
    assert set(np.unique(head.labels[lesions])) == {Label.HAEMORRHAGE, Label.MICROBLEED}
    np.testing.assert_array_equal(head.labels[~lesions], labels[~lesions])
    assert head.mask[lesions].all()
    assert not labels[head.mask].max() > Label.CSF
    assert head.chi_ppm.mean() == pytest.approx(0, abs=1e-5)
    bleed = head.chi_ppm[head.labels == Label.HAEMORRHAGE]
    assert bleed.max() == pytest.approx(CHI_PPM[Label.HAEMORRHAGE], abs=0.15)


def test_bone_and_air_make_the_background_alone(labels, head):
    filled = np.where(head.mask, labels, Label.AIR).astype(np.uint8)
    bare = fine_head(filled, FINE, seed=1)
    np.testing.assert_allclose(bare.inner_ppm, head.inner_ppm, atol=1e-6)
    assert np.abs(bare.outer_ppm - head.outer_ppm)[head.mask].max() > 0.1
    assert head.outer_ppm[head.mask].std() > 3 * head.inner_ppm[head.mask].std()


def test_the_grid_covers_the_same_field_of_view(head, acquisition):
    grid = acquisition.echoes.geometry
    assert grid.shape == acquisition.mask.shape == acquisition.labels.shape == SHAPE
    extent = np.multiply(grid.voxel_size_mm, grid.shape)
    np.testing.assert_allclose(extent, np.multiply(FINE.voxel_size_mm, FINE.shape))
    assert grid.b0_direction == pytest.approx(FINE.b0_direction)
    volumes = np.prod(grid.voxel_size_mm), np.prod(FINE.voxel_size_mm)
    sizes = acquisition.mask.sum() * volumes[0], head.mask.sum() * volumes[1]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    brain = {*range(Label.CAUDATE, Label.VEIN + 1), Label.MICROBLEED, Label.HAEMORRHAGE}
    inside = acquisition.labels[acquisition.mask]
    assert np.mean(np.isin(inside, list(brain))) > 0.95
    for part in (acquisition.total_ppm, acquisition.local_ppm, acquisition.chi_ppm):
        assert part.dtype == np.float32
        assert not part[~acquisition.mask].any()


def test_inner_and_outer_fields_are_the_total(head, acquisition):
    silent = np.zeros_like(head.inner_ppm)
    outer = measured(replace(head, inner_ppm=silent)).total_ppm
    inner = measured(replace(head, outer_ppm=silent))
    np.testing.assert_array_equal(inner.local_ppm, acquisition.local_ppm)
    inside = acquisition.mask & (np.abs(acquisition.local_ppm) < 0.5)
    for sum_ppm in (outer + acquisition.local_ppm, outer + inner.total_ppm):
        error = np.abs(sum_ppm - acquisition.total_ppm)[inside]
        assert np.median(error) < 2e-5
        assert np.percentile(error, 99) < 2e-3


def test_voxels_that_see_one_field_see_that_whatever_their_signal(head):
    flat = replace(head, inner_ppm=np.full_like(head.inner_ppm, 0.125))
    found = measured(flat)
    np.testing.assert_allclose(found.local_ppm[found.mask], 0.125, rtol=1e-4)


def test_the_truth_is_weighted_by_the_signal(head):
    """A field is not seen where there is no signal, so that it does not ring from there."""
    dark = head.contrast.m0 < 0.01
    assert dark.any()
    loud = replace(head, inner_ppm=np.where(dark, np.float32(9), head.inner_ppm))
    m0 = np.where(dark, np.float32(0), head.contrast.m0)
    plain, rung = (
        measured(replace(each, contrast=Contrast(m0, head.contrast.r2_star_3t)))
        for each in (head, loud)
    )
    np.testing.assert_array_equal(plain.local_ppm, rung.local_ppm)


def test_the_phase_is_that_of_the_field_in_steps(head, acquisition):
    echoes, mask = acquisition.echoes, acquisition.mask
    steps = echoes.phase_rad / STEP_RAD
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    assert steps.min() >= -2048.001
    assert steps.max() < 2047.5
    np.testing.assert_array_equal(echoes.magnitude, np.rint(echoes.magnitude))
    assert np.percentile(echoes.magnitude[0][mask], 99) == pytest.approx(1000, abs=2)


def test_the_phase_grows_as_the_field_says(head):
    flat = replace(head, inner_ppm=np.full_like(head.inner_ppm, 0.125))
    found = measured(replace(flat, outer_ppm=np.zeros_like(flat.outer_ppm)))
    first, second, _ = found.echoes.phase_rad
    rad = 0.125 * 2 * np.pi * 42.577 * 3 * (TIMES_S[1] - TIMES_S[0])
    error = np.abs(wrapped(second - first - rad)[found.mask])
    assert np.median(error) < 2 * STEP_RAD
    assert np.percentile(error, 99) < 0.1


def test_every_second_echo_is_read_backwards(head, acquisition):
    bipolar = measured(head, bipolar=True)
    np.testing.assert_array_equal(bipolar.total_ppm, acquisition.total_ppm)
    off = wrapped(bipolar.echoes.phase_rad - acquisition.echoes.phase_rad)
    expected = np.broadcast_to(readout_offset(bipolar.echoes.geometry), SHAPE)
    for echo, sign in zip(off, (1, -1, 1), strict=True):
        error = np.abs(echo - sign * expected)[bipolar.mask]
        assert np.median(error) < 0.01
        assert np.percentile(error, 95) < 0.05


def test_the_noise_is_as_stated(head, acquisition):
    noisy = measured(head, snr=20.0)
    phases = (a.echoes.magnitude * np.exp(1j * a.echoes.phase_rad) for a in (noisy, acquisition))
    noisy_signal, clean_signal = phases
    scale = np.median(noisy.echoes.magnitude[0] / acquisition.echoes.magnitude[0].clip(1))
    error = (noisy_signal - scale * clean_signal)[0][noisy.mask]
    expected = scale * acquisition.echoes.magnitude[0][noisy.mask].mean() / 20
    assert error.real.std() == pytest.approx(expected, rel=0.05)
    assert error.imag.std() == pytest.approx(expected, rel=0.05)


def test_the_same_seed_makes_the_same_head(labels, head):
    again, other = fine_head(labels, FINE, seed=1), fine_head(labels, FINE, seed=2)
    assert again.inner_ppm.tobytes() == head.inner_ppm.tobytes() != other.inner_ppm.tobytes()


def test_a_head_without_deep_white_matter_is_refused():
    labels = np.full((24, 24, 24), Label.GREY_MATTER, dtype=np.uint8)
    with pytest.raises(DataError, match="white matter"):
        fine_head(labels, Geometry((24, 24, 24), (7.0, 8.0, 7.0)), seed=0)
