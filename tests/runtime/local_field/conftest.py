"""A head and the field of what lies around it."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.dipole import dipole_convolve
from tests.runtime.local_field.acquisition import GEOMETRY


@pytest.fixture(scope="session")
def head():
    return head_phantom(GEOMETRY, seed=4, noise_ppm=0.0)


@pytest.fixture(scope="session")
def total(head):
    """Return the field of the head, of the air around it and of a cavity, shimmed [ppm]."""
    outside = distance_transform_edt(~head.mask, sampling=GEOMETRY.voxel_size_mm)
    air = np.where(outside > 14, 9.4, 0).astype(np.float32)
    air[28:36, 60:66, 20:28] = 9.4 * (outside[28:36, 60:66, 20:28] > 5)
    air = gaussian_filter(air, 1.0) * (outside > 2)
    field = dipole_convolve(air, GEOMETRY, pad_voxels=(32, 36, 32))
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in GEOMETRY.shape], indexing="ij")
    shims = np.stack([np.ones(GEOMETRY.shape), *axes], axis=-1).astype(np.float32)
    field -= shims @ np.linalg.lstsq(shims[head.mask], field[head.mask], rcond=None)[0]
    return head.local_field_ppm + field * head.mask
