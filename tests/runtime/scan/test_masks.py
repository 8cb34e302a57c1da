"""What is inside a mask, by one rule, and what is no mask at all."""

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.scan.masks import mask_from_values

RNG = np.random.default_rng(0)
BRAIN = np.zeros((16, 15, 14), dtype=bool)
BRAIN[4:12, 3:11, 4:10] = True
SOFT = BRAIN.astype(float)
SOFT[3, 3:11, 4:10], SOFT[12, 3:11, 4:10] = RNG.uniform(0.05, 0.45, (2, 8, 6))


@pytest.mark.parametrize(
    ("values", "notes"),
    [
        (BRAIN, 0),
        (BRAIN.astype(np.uint8), 0),
        (BRAIN.astype(np.float32), 0),
        (255 * BRAIN.astype(np.int16), 0),
        (np.where(BRAIN, 1, -1), 1),
        (np.where(BRAIN, RNG.integers(1, 40, BRAIN.shape), 0), 1),
        (np.where(BRAIN, 1, 1e-9), 1),
        (np.where(BRAIN, RNG.uniform(0.51, 1, BRAIN.shape), RNG.uniform(0, 0.5, BRAIN.shape)), 1),
        (np.where(BRAIN, 1.0004, -0.0004), 1),
        (np.rint(255 * SOFT), 1),
        (np.rint(100 * SOFT), 1),
    ],
    ids=[
        "bool",
        "uint8",
        "float",
        "255",
        "-1",
        "labels",
        "1e-9",
        "probability",
        "interpolated",
        "bytes",
        "%",
    ],
)
def test_the_brain_is_inside(values, notes):
    mask, said = mask_from_values(values, "m.nii")
    np.testing.assert_array_equal(mask, BRAIN)
    assert len(said) == notes
    assert all(note.startswith("m.nii: ") and "11 % of the volume" in note for note in said)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (0.02 * RNG.standard_normal(BRAIN.shape), "a field or an image, not a mask"),
        (np.rint(20 * RNG.standard_normal(BRAIN.shape)), "a field or an image, not a mask"),
        (RNG.integers(0, 4095, BRAIN.shape), "whole numbers from 0 to 409. a field or an image"),
        (100 * RNG.random(BRAIN.shape), "a field or an image, not a mask"),
        (np.zeros(BRAIN.shape), "the mask is empty"),
        (-BRAIN.astype(int), "the mask is empty"),
        (np.full(BRAIN.shape, 0.3), "the mask is empty"),
        (np.where(BRAIN, np.nan, 1), "384 voxels of the mask are NaN or Inf"),
    ],
    ids=["field", "field in ppb", "magnitude", "per cent", "zero", "minus", "faint", "NaN"],
)
def test_what_is_no_mask_is_refused(values, says):
    with pytest.raises(DataError, match=says.replace("409. a", r"409\d: a")):
        mask_from_values(values, "m.nii")


def test_a_mask_of_everything_is_worth_a_note():
    mask, said = mask_from_values(np.ones((5, 6, 7)), "m.nii")
    assert mask.all()
    assert said == ["m.nii: 100 % of the volume is inside; is it a mask of the brain?"]
