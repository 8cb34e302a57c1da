"""Small fields on grids of thick voxels, which need little padding, tilted and not."""

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.scan import Scan

GRIDS = {
    "box inside": (Geometry((12, 9, 10), (2.5, 3.0, 4.0), (0.1, -0.2, 0.97)), (slice(2, -3),) * 3),
    "mask at the border": (Geometry((9, 7, 8), (3.0, 2.5, 3.5)), (slice(None),) * 3),
    "one slice": (Geometry((8, 7, 6), (3.0, 2.5, 4.0), (0.6, 0.3, 0.7)), (..., slice(2, 3))),
}
each_grid = pytest.mark.parametrize(("grid", "box"), GRIDS.values(), ids=GRIDS)
WITHIN = 1e-5  # of its norm a map is the CPU's, after 30 iterations too


def scan_of(grid, box):
    random = np.random.default_rng(3)
    mask = np.zeros(grid.shape, bool)
    mask[box] = random.random(mask[box].shape) < 0.9
    field = (0.03 * random.standard_normal(grid.shape)).astype(np.float32) * mask
    return Scan(field[None], mask, grid, nib.Nifti1Header(), np.eye(4))
