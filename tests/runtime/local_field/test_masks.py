"""Masks of the magnitude: of deepbet, and of all that gives signal."""

import sys

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes, label

from qsm_deploy.kernels.errors import DataError, MissingDependencyError
from qsm_deploy.kernels.threads import using_threads
from qsm_deploy.runtime.local_field import masks
from qsm_deploy.runtime.local_field.brain_mask import brain_mask
from qsm_deploy.runtime.local_field.magnitude_mask import mask_from_magnitude, otsu_threshold
from qsm_deploy.runtime.local_field.masks import find_mask
from tests.runtime.local_field.acquisition import axes_of, echoes_of


def dice(one, other):
    return 2 * np.count_nonzero(one & other) / (one.sum() + other.sum())


class TestMagnitudeMask:
    def test_signal_and_no_noise(self, head):
        echoes = echoes_of(head.local_field_ppm, head.mask, (0.005, 0.015))
        assert dice(mask_from_magnitude(echoes.magnitude), head.mask) > 0.985

    def test_holes_are_filled_and_islands_left_out(self):
        magnitude = np.full((1, 30, 30, 30), 0.01, dtype=np.float32)
        magnitude[0, 5:20, 5:20, 5:20] = 1
        magnitude[0, 11:14, 11:14, 11:14] = 0.01
        magnitude[0, 24:28, 24:28, 24:28] = 1
        found = mask_from_magnitude(magnitude)
        assert found[12, 12, 12]
        assert not found[26, 26, 26]

    def test_a_volume_without_background_is_all_mask(self):
        rng = np.random.default_rng(1)
        magnitude = rng.normal(1, 0.2, (1, 20, 20, 20)).clip(0.1).astype(np.float32)
        assert mask_from_magnitude(magnitude).all()

    def test_nothing_to_tell_apart(self):
        with pytest.raises(DataError, match="constant or not finite; give a brain mask"):
            mask_from_magnitude(np.ones((1, 9, 9, 9), dtype=np.float32))

    def test_the_threshold_lies_between_two_classes(self):
        values = np.concatenate([np.linspace(0, 1, 100), np.linspace(5, 6, 50)])
        assert 1 < otsu_threshold(values.astype(np.float32)) < 5


class TestFindMask:
    def test_the_last_resort_is_loud(self, head, monkeypatch):
        monkeypatch.setattr(masks, "has_deepbet", lambda: False)
        magnitude = echoes_of(head.local_field_ppm, head.mask, (0.005, 0.015)).magnitude
        found = find_mask(magnitude)
        np.testing.assert_array_equal(found.mask, mask_from_magnitude(magnitude))
        assert "NOT of the brain" in found.origin
        (note,) = found.notes
        assert note.startswith("THIS IS NO BRAIN MASK")
        assert "-m" in note
        assert "qsm-deploy[mask]" in note

    def test_deepbet_comes_first_where_it_is_installed(self, head, monkeypatch):
        monkeypatch.setattr(masks, "has_deepbet", lambda: True)
        monkeypatch.setattr(masks, "brain_mask", lambda magnitude: magnitude > 0.5)
        magnitude = np.stack([head.mask, np.zeros_like(head.mask)]).astype(np.float32)
        found = find_mask(magnitude)
        np.testing.assert_array_equal(found.mask, head.mask)
        assert found.origin == "of deepbet"

    def test_without_deepbet(self, head, monkeypatch):
        monkeypatch.setitem(sys.modules, "deepbet", None)
        with pytest.raises(MissingDependencyError, match=r"needs deepbet.*\[mask\]"):
            brain_mask(head.mask.astype(np.float32))


@pytest.mark.slow
class TestDeepbet:
    """A ball in a shell is all that this needs to look like a head."""

    @pytest.fixture(autouse=True)
    def _deepbet(self):
        pytest.importorskip("deepbet")

    def test_one_part_without_holes_and_nothing_else_changed(self, capfd):
        import torch

        x, y, z = axes_of((70, 90, 80))
        radius = np.sqrt(x * x + y * y + z * z)
        rng = np.random.default_rng(2)
        magnitude = np.where(radius < 0.7, 100, 0) + np.abs(rng.standard_normal(radius.shape))
        magnitude = magnitude.astype(np.float32)
        kept, threads = magnitude.copy(), torch.get_num_threads()
        with using_threads(1):
            found = brain_mask(magnitude)
        assert dice(found, radius < 0.7) > 0.9
        assert label(found)[1] == 1
        np.testing.assert_array_equal(binary_fill_holes(found), found)
        np.testing.assert_array_equal(magnitude, kept)
        assert torch.get_num_threads() == threads
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_no_brain(self, value):
        magnitude = np.full((40, 44, 36), value, np.float32)
        with pytest.raises(DataError, match="deepbet finds no brain on the magnitude"):
            brain_mask(magnitude)
