"""What is left of a brain where its field may be believed."""

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes, label

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.local_field.field_mapping import FieldMap, map_field
from qsm_deploy.runtime.local_field.quality_mask import (
    QUALITY,
    Quality,
    eroded,
    largest_part,
    quality_mask,
)
from tests.runtime.local_field.acquisition import GEOMETRY, axes_of, echoes_of

SHAPE = (41, 37, 29)
THIN = Geometry(SHAPE, (1.0, 1.5, 3.0), (0.0, 0.0, 1.0))


@pytest.fixture
def brain():
    return sum(axis**2 for axis in axes_of(SHAPE)) < 0.9


def field_map(noise=0.002, misfit=1.0):
    zeros = np.zeros(SHAPE, np.float32)
    return FieldMap(zeros, zeros + np.float32(noise), zeros + np.float32(misfit))


class TestErosion:
    @pytest.mark.parametrize(
        ("radius_mm", "voxels"), [(0.5, (1, 1, 1)), (2.0, (2, 1, 1)), (4.0, (4, 2, 1))]
    )
    def test_of_voxels_that_are_not_cubes(self, radius_mm, voxels):
        mask = np.zeros(SHAPE, dtype=bool)
        mask[5:35, 5:32, 4:25] = True
        inside = eroded(mask, THIN, radius_mm)
        (x, y, z) = voxels
        expected = np.zeros_like(mask)
        expected[5 + x : 35 - x, 5 + y : 32 - y, 4 + z : 25 - z] = True
        np.testing.assert_array_equal(inside, expected)

    def test_at_the_edge_of_the_volume(self):
        inside = eroded(np.ones(SHAPE, dtype=bool), THIN, 2.0)
        expected = np.zeros(SHAPE, dtype=bool)
        expected[2:-2, 1:-1, 1:-1] = True
        np.testing.assert_array_equal(inside, expected)

    def test_none(self, brain):
        assert eroded(brain, THIN, 0.0) is brain


class TestQualityMask:
    def test_a_good_field_keeps_the_eroded_brain(self, brain):
        kept, trusted = quality_mask(brain, field_map(), THIN)
        inside = eroded(brain, THIN, QUALITY.erosion_mm)
        assert not (kept & ~inside).any()
        assert kept.sum() > 0.98 * inside.sum()  # opening takes corners
        np.testing.assert_array_equal(kept, trusted)

    def test_one_part_without_holes_inside_the_eroded_brain(self, brain):
        rng = np.random.default_rng(5)
        found = field_map()
        found.misfit[rng.random(SHAPE) < 0.05] = 9
        found.misfit[17:23, 16:21, 12:17] = 9  # a lesion
        found.misfit[:, 30:32] = 9  # cuts a piece off
        found.noise_ppm[rng.random(SHAPE) < 0.05] = 0.3
        kept, trusted = quality_mask(brain, found, THIN)
        assert label(kept)[1] == 1
        np.testing.assert_array_equal(binary_fill_holes(kept), kept)
        assert not (kept & ~eroded(brain, THIN, QUALITY.erosion_mm)).any()
        assert not kept[:, 30:].any()
        assert kept[17:23, 16:21, 12:17].all()
        assert not trusted[17:23, 16:21, 12:17].any()
        assert not (trusted & ~kept).any()
        assert not trusted[(found.misfit > 6) | (found.noise_ppm > 0.02)].any()

    def test_voxels_a_turn_off_are_not_trusted(self, head, total):
        echoes = echoes_of(total, head.mask, (0.004, 0.010, 0.016, 0.022, 0.028))
        off = np.zeros_like(head.mask)
        off[28:31, 34:37, 30:33] = True
        echoes.phase_rad[1][off] += np.float32(np.pi)
        kept, trusted = quality_mask(head.mask, map_field(echoes, head.mask), GEOMETRY)
        assert kept[off].all()
        assert not trusted[off].any()

    @pytest.mark.parametrize("times", [(0.002,), (0.002, 0.003), (0.001, 0.0015, 0.002)])
    def test_short_noisy_echoes_keep_a_mask(self, head, total, times):
        found = map_field(echoes_of(total, head.mask, times, noise=0.2), head.mask)
        if found.noise_ppm is not None:
            assert np.median(found.noise_ppm[head.mask]) > 2 * QUALITY.most_noise_ppm
        kept, trusted = quality_mask(head.mask, found, GEOMETRY)
        inside = eroded(head.mask, GEOMETRY, QUALITY.erosion_mm)
        assert kept.sum() > 0.95 * inside.sum()
        assert trusted.sum() > 0.95 * kept.sum()

    def test_nothing_left(self, brain):
        with pytest.raises(DataError, match="nothing is left of the mask 2 mm below its edge"):
            quality_mask(brain & (np.arange(SHAPE[2]) == 9), field_map(), THIN)
        with pytest.raises(DataError, match="nothing is left of the mask 30 mm"):
            quality_mask(brain, field_map(), THIN, Quality(erosion_mm=30))
        with pytest.raises(DataError, match="nothing is left"):
            quality_mask(brain, field_map(misfit=5), THIN)


def test_the_largest_part_of_nothing(brain):
    assert not largest_part(np.zeros_like(brain)).any()
