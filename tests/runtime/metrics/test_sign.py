"""A map that looks turned over is doubted, if it is one of a brain."""

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.metrics.doubts import doubt_of_sign

GRID = Geometry((64, 72, 64), (2.4, 2.4, 2.4))


@pytest.fixture(scope="module")
def head():
    return head_phantom(GRID, seed=4, noise_ppm=0.0)


def test_a_head_is_right_and_its_negative_doubted(head):
    assert doubt_of_sign(head.chi_ppm, head.mask, GRID) == []
    (note,) = doubt_of_sign(-head.chi_ppm, head.mask, GRID)
    assert "pass --negate" in note


def test_what_is_as_high_as_low_is_not_doubted(head):
    chi = np.random.default_rng(1).normal(0.05, 0.03, GRID.shape).astype(np.float32)
    assert doubt_of_sign(chi, head.mask, GRID) == []


def test_a_part_of_a_brain_tells_nothing(head):
    small = Geometry(GRID.shape, (1, 1, 1))
    assert doubt_of_sign(-head.chi_ppm, head.mask, small) == []
