"""What is no local field and no truth is named, and what is one passes."""

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.scan.mistaken import refuse_other_than_field, refuse_other_than_truth
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles, load_scan

RNG = np.random.default_rng(4)
FIELD = (0.02 * RNG.standard_normal(3000)).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (RNG.integers(0, 2, 3000), "2 different whole numbers inside the mask, as of a mask"),
        (np.ones(3000), "1 different whole numbers inside the mask, as of a mask"),
        (RNG.integers(-1, 20, 3000), "21 different whole numbers inside the mask, as of a mask or"),
        (RNG.random(3000), "nowhere negative inside the mask"),
        (RNG.integers(0, 4000, 3000), "nowhere negative inside the mask .*, as of a magnitude"),
        (-0.1 - RNG.random(3000), "nowhere positive inside the mask"),
    ],
    ids=["mask", "its inside", "labels", "magnitude", "stored magnitude", "offset"],
)
def test_what_is_no_field_is_named(values, says):
    with pytest.raises(DataError, match=says):
        refuse_other_than_field(values.astype(np.float32))


@pytest.mark.parametrize("values", [FIELD, np.rint(1000 * FIELD), 1e-6 * FIELD, 0 * FIELD])
def test_fields_pass(values):
    refuse_other_than_field(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (RNG.integers(0, 17, 3000), "17 different whole numbers .*regions with --labels"),
        (1000 * FIELD, "is it in ppb"),
    ],
)
def test_what_is_no_truth_is_named(values, says):
    with pytest.raises(DataError, match=says):
        refuse_other_than_truth(values.astype(np.float32))


def test_truths_pass():
    for values in (FIELD, RNG.integers(0, 2, 3000).astype(np.float32), -3 * np.abs(FIELD)):
        refuse_other_than_truth(values)


def test_a_map_of_this_program_is_no_field(tmp_path):
    path = tmp_path / "chi.nii"
    volume = (0.05 * RNG.standard_normal((9, 8, 7))).astype(np.float32)
    described = {
        "chi [ppm] tv-unet": True,
        "qsm-deploy phantom: susceptibility [ppm]": True,
        "local field": False,
    }
    for description, refused in described.items():
        path.write_bytes(nifti_bytes(volume, np.eye(4), description=description, compress=False))
        if refused:
            with pytest.raises(DataError, match=r"chi\.nii: a susceptibility map by its header"):
                load_scan(ScanFiles((path,)), Reading())
        else:
            assert load_scan(ScanFiles((path,)), Reading()).mask.any()
