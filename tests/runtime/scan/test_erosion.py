import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.erosion import erode_mask
from qsm_deploy.runtime.scan.scan import Scan


def scan_of(mask: np.ndarray) -> Scan:
    field = np.ones((1, *mask.shape), dtype=np.float32)
    return Scan(field, mask, Geometry(mask.shape), nib.Nifti1Header(), np.eye(4))


def test_it_takes_a_ball_and_the_volumes_border_counts_as_outside():
    rng = np.random.default_rng(0)
    mask = rng.random((21, 18, 15)) > 0.002
    x, y, z = np.ogrid[-3:4, -3:4, -3:4]
    expected = binary_erosion(mask, x * x + y * y + z * z <= 9)
    eroded = erode_mask(scan_of(mask), 3)
    assert 0 < expected.sum() < mask.sum()
    assert np.array_equal(eroded.mask, expected)
    assert eroded.measured.all()
    assert "eroded by 3 voxels" in eroded.notes[0]


def test_a_mask_that_vanishes_is_refused():
    mask = np.zeros((12, 12, 12), dtype=bool)
    mask[3:8, 3:8, 3:8] = True
    with pytest.raises(DataError, match="leaves nothing"):
        erode_mask(scan_of(mask), 3)
