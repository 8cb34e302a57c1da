import numpy as np
import pytest

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.errors import DataError


def test_the_box_is_tight_and_its_margin_stops_at_the_grid():
    mask = np.zeros((7, 9, 5), bool)
    mask[1, 4, 0] = mask[3, 6, 4] = True
    assert bounding_box(mask) == (slice(1, 4), slice(4, 7), slice(0, 5))
    assert bounding_box(mask, margin=2) == (slice(0, 6), slice(2, 9), slice(0, 5))


def test_any_memory_layout_will_do():
    mask = np.zeros((7, 9, 5), bool, order="F")
    mask[2, 3, 2] = True
    assert bounding_box(mask[::-1, :, ::2]) == (slice(4, 5), slice(3, 4), slice(1, 2))


def test_an_empty_mask_is_refused():
    with pytest.raises(DataError, match="mask is empty"):
        bounding_box(np.zeros((3, 4, 5), bool))
