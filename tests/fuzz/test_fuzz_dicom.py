"""Damaged DICOM files among whole ones: refused, or the volumes are the same as of whole ones."""

import random
import shutil
from collections import Counter

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import QsmDeployError
from qsm_deploy.runtime.dicom.choice import acquisition_of
from qsm_deploy.runtime.dicom.conversion import convert
from qsm_deploy.runtime.dicom.frames import read_frames
from tests.fuzz.damage import damaged
from tests.runtime.dicom.vendors import gradient_echo, write_series

pytestmark = pytest.mark.slow

SHAPE, TIMES_S = (16, 18, 16), (0.005, 0.010)
TRIES = 250
PIXEL_DATA = b"\xe0\x7f\x10\x00"  # its tag


def volumes(folder, scratch):
    """Return all volumes with their affines, and the sidecars' words."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    made = convert(acquisition_of(read_frames(folder), folder), scratch)
    paths = [path for side in made.values() for path in side]
    return [
        (nib.load(p).get_fdata(), nib.load(p).affine, p.with_suffix(".json").read_text())
        for p in paths
    ]


def same(made, right):
    return len(made) == len(right) and all(
        one[0].shape == other[0].shape
        and np.allclose(one[1], other[1], atol=0.05)
        and one[2] == other[2]
        for one, other in zip(made, right, strict=True)
    )


@pytest.mark.parametrize("enhanced", [False, True], ids=["classic", "enhanced"])
def test_damaged_headers_change_nothing_without_a_word(tmp_path, note_counts, enhanced):
    write_series(tmp_path / "in", "philips", truth=gradient_echo(SHAPE, TIMES_S), enhanced=enhanced)
    right = volumes(tmp_path / "in", tmp_path / "out")
    dice, counts = random.Random(5), Counter()
    paths = sorted((tmp_path / "in").iterdir())
    for _ in range(TRIES):
        path = dice.choice(paths)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, dice, within=whole.index(PIXEL_DATA)))
        try:
            made = volumes(tmp_path / "in", tmp_path / "out")
            counts["same" if same(made, right) else "silent"] += 1
        except QsmDeployError:
            counts["refused"] += 1
        finally:
            path.write_bytes(whole)
    assert counts["silent"] == 0, counts
    assert counts["refused"] > TRIES // 4, counts
    assert counts["same"] > TRIES // 20, counts
    note_counts("DICOM headers", inputs=TRIES, refused=counts["refused"], same=counts["same"])
