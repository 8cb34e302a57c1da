"""The procedural head: reproducible, physical, and as varied as a real brain."""

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.anatomy import Label
from qsm_deploy.calibration.phantom.phantom import Phantom, head_phantom, local_field
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry

OBLIQUE = Geometry((37, 44, 30), (1.0, 0.9, 2.0), (0.3, -0.4, 0.8))
LESIONS = {Label.CALCIFICATION, Label.MICROBLEED, Label.HAEMORRHAGE}

# A COSMOS map of a healthy volunteer at 1 mm, median-centred in its mask.
COSMOS = {
    "std": 0.028,
    "p1": -0.0534,
    "p5": -0.0339,
    "p95": 0.041,
    "p99": 0.1067,
    "p99.9": 0.2103,
    "median gradient": 0.0069,
    "field std": 0.0084,
}


@pytest.fixture(scope="module")
def head() -> Phantom:
    return head_phantom(OBLIQUE, seed=5)


@pytest.fixture(scope="module")
def head_with_lesions() -> Phantom:
    return head_phantom(Geometry((96, 96, 96)), seed=1)


def arrays(phantom: Phantom) -> list[bytes]:
    parts = (phantom.chi_ppm, phantom.local_field_ppm, phantom.mask, phantom.labels)
    return [part.tobytes() for part in parts]


def test_the_same_seed_gives_the_same_head(head):
    assert arrays(head_phantom(OBLIQUE, seed=5)) == arrays(head)


def test_another_seed_changes_everything(head):
    other = head_phantom(OBLIQUE, seed=6)
    assert all(a != b for a, b in zip(arrays(other), arrays(head), strict=True))


def test_noise_and_direction_leave_the_anatomy_alone(head):
    upright = Geometry(OBLIQUE.shape, OBLIQUE.voxel_size_mm)
    other = head_phantom(upright, seed=5, noise_ppm=0)
    np.testing.assert_array_equal(other.chi_ppm, head.chi_ppm)
    np.testing.assert_array_equal(other.labels, head.labels)
    assert np.abs(other.local_field_ppm - head.local_field_ppm).max() > 0.01


def test_types_and_what_lies_outside_the_mask(head):
    assert [a.dtype for a in (head.chi_ppm, head.local_field_ppm, head.mask, head.labels)] == [
        np.float32,
        np.float32,
        np.bool_,
        np.uint8,
    ]
    np.testing.assert_array_equal(head.labels > 0, head.mask)
    assert 0.1 < head.mask.mean() < 0.6
    assert not head.chi_ppm[~head.mask].any()
    assert not head.local_field_ppm[~head.mask].any()
    assert set(np.unique(head.labels)) <= set(Label)


def test_the_field_is_the_dipole_of_chi_plus_the_stated_noise(head):
    x, y, z = (n // 2 for n in OBLIQUE.shape)
    clean = dipole_convolve(head.chi_ppm, OBLIQUE, pad_voxels=(x, y, z))
    noise = (head.local_field_ppm - clean)[head.mask]
    assert noise.std() == pytest.approx(0.0025, rel=0.05)
    assert abs(noise.mean()) < 5 * 0.0025 / np.sqrt(noise.size)
    noise_free = head_phantom(OBLIQUE, seed=5, noise_ppm=0).local_field_ppm
    np.testing.assert_allclose(noise_free[head.mask], clean[head.mask], atol=1e-7)


def test_sources_outside_the_mask_make_no_field(head):
    clutter = head.chi_ppm + np.where(head.mask, 0, 9.2).astype(np.float32)
    fields = [
        local_field(chi, head.mask, OBLIQUE, noise_ppm=0, rng=np.random.default_rng(0))
        for chi in (clutter, head.chi_ppm)
    ]
    np.testing.assert_array_equal(*fields)


def test_lesions_come_and_go(head_with_lesions):
    assert set(np.unique(head_with_lesions.labels)) >= LESIONS
    assert head_with_lesions.chi_ppm.min() < -1
    assert head_with_lesions.chi_ppm.max() > 0.4
    healthy = head_phantom(head_with_lesions.geometry, seed=1, lesions=False)
    assert not set(np.unique(healthy.labels)) & LESIONS
    assert np.abs(healthy.chi_ppm).max() < 0.4
    np.testing.assert_array_equal(healthy.mask, head_with_lesions.mask)


def test_tissues_have_their_susceptibility(head_with_lesions):
    chi, labels = head_with_lesions.chi_ppm, head_with_lesions.labels
    means = {label: chi[labels == label].mean() for label in Label if (labels == label).any()}
    assert means[Label.WHITE_MATTER] < 0 < means[Label.GREY_MATTER]
    assert means[Label.GLOBUS_PALLIDUS] > means[Label.PUTAMEN] > means[Label.WHITE_MATTER]
    assert means[Label.VEIN] > 0.1
    assert means[Label.CALCIFICATION] < -1 < means[Label.HAEMORRHAGE] < means[Label.MICROBLEED]


@pytest.fixture(scope="module")
def statistics() -> dict[str, float]:
    """Return what :data:`COSMOS` lists, of a healthy head at 1 mm."""
    head = head_phantom(Geometry((128, 144, 128)), seed=1, lesions=False)
    centred = np.where(head.mask, head.chi_ppm - np.median(head.chi_ppm[head.mask]), 0)
    field = local_field(
        centred.astype(np.float32),
        head.mask,
        head.geometry,
        noise_ppm=0,
        rng=np.random.default_rng(0),
    )
    inside = centred[head.mask]
    both = head.mask[1:] & head.mask[:-1]
    percentiles = [name for name in COSMOS if name.startswith("p")]
    return {
        "std": inside.std(),
        "median gradient": np.median(np.abs(np.diff(centred, axis=0))[both]),
        "field std": field[head.mask].std(),
    } | {name: np.percentile(inside, float(name[1:])) for name in percentiles}


@pytest.mark.parametrize("name", COSMOS)
def test_a_head_varies_as_a_real_one_does(statistics, name):
    assert statistics[name] == pytest.approx(COSMOS[name], rel=0.4)


def test_bad_requests_are_refused():
    small = Geometry((16, 16, 16))
    with pytest.raises(GeometryError, match=r"at least 16 voxels.*\(16, 15, 16\)"):
        head_phantom(Geometry((16, 15, 16)), seed=1)
    with pytest.raises(UsageError, match="seed must not be negative, got -1"):
        head_phantom(small, seed=-1)
    for noise in (-0.1, np.nan, np.inf):
        with pytest.raises(UsageError, match="noise must be"):
            head_phantom(small, seed=1, noise_ppm=noise)
