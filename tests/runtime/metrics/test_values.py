"""A map is doubted where no tissue has its values, or where it is one value of many."""

import numpy as np
import pytest

from qsm_deploy.runtime.metrics.doubts import doubt_of_values

SHAPE = (4, 5, 3)
MASK = np.zeros(SHAPE, dtype=bool)
MASK[1:3, 1:4, 1:] = True
FIELD = np.random.default_rng(3).normal(0, 0.02, SHAPE).astype(np.float32) * MASK


@pytest.mark.parametrize(
    ("chi_ppm", "fields_ppm", "said"),
    [
        (FIELD, FIELD, []),
        (1e4 * FIELD, FIELD, ["no tissue has as much"]),
        (-1e4 * np.abs(FIELD), FIELD, ["no tissue has as much"]),
        (0.1 * MASK, FIELD, ["is 0.1 ppm everywhere"]),
        (0 * FIELD, FIELD, ["is 0 ppm everywhere"]),
        (40.0 * MASK, FIELD, ["no tissue has as much", "is 40 ppm everywhere"]),
        (0 * FIELD, 0 * FIELD, []),
        (0.1 * MASK, 0.2 * MASK, []),
    ],
)
def test_what_is_said_of_a_map(chi_ppm, fields_ppm, said) -> None:
    notes = doubt_of_values(chi_ppm.astype(np.float32), MASK, fields_ppm[None])
    assert len(notes) == len(said)
    assert all(words in note for words, note in zip(said, notes, strict=True))
