import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.resampling import resample_map, resample_scan
from qsm_deploy.runtime.scan.scan import Scan

GRID = Geometry((40, 36, 21), (0.8, 0.9, 2.0), (0.0, 0.3, 0.95))


def blob(grid: Geometry) -> np.ndarray:
    """Return a smooth bump well inside the field of view, at a place in mm."""
    axes = [np.arange(n) * d for n, d in zip(grid.shape, grid.voxel_size_mm, strict=True)]
    x, y, z = np.ix_(*axes)
    r2 = (x - 15) ** 2 + (y - 17) ** 2 + (z - 20) ** 2
    return np.exp(-r2 / (2 * 4.0**2)).astype(np.float32)


def scan_of(volume: np.ndarray, grid: Geometry = GRID, quantity="local_field_ppm") -> Scan:
    mask = np.zeros(grid.shape, dtype=bool)
    mask[2:-2, 2:-2, 2:-2] = True
    header = nib.Nifti1Header()
    return Scan(volume[None] * mask, mask, grid, header, np.eye(4), quantity=quantity)


def test_the_volume_keeps_its_place_and_its_field_of_view():
    finer = resample_scan(scan_of(blob(GRID)), (1.0, 1.0, 1.0))
    assert finer.geometry.shape == (32, 32, 42)
    np.testing.assert_allclose(finer.geometry.voxel_size_mm, (1.0, 1.0125, 1.0))
    assert finer.geometry.b0_direction == GRID.b0_direction
    expected = blob(finer.geometry)
    assert np.abs(finer.measured[0] - expected)[finer.mask].max() < 0.01
    assert not finer.measured[0][~finer.mask].any()


def test_there_and_back_is_the_identity_for_what_both_grids_hold():
    scan = scan_of(blob(GRID))
    finer = resample_scan(scan, (0.7, 0.7, 1.0))
    back = resample_map(finer.measured[0], scan.mask)
    assert back.dtype == np.float32
    assert np.abs(back - scan.measured[0]).max() < 0.01


def test_the_dipole_of_the_resampled_grid_is_that_of_the_tissue():
    wide = Geometry((64, 64, 32), (0.8, 0.8, 1.6), (0.0, 0.5, 0.87))
    chi = scan_of(blob(wide), wide)
    field = scan_of(dipole_convolve(blob(wide), wide), wide)
    finer_chi, finer_field = (resample_scan(s, (1.0, 1.0, 1.0)) for s in (chi, field))
    again = dipole_convolve(finer_chi.measured[0], finer_chi.geometry)
    inner = (slice(8, -8),) * 3  # at the mask's edge the cut field rings
    error = np.abs(again - finer_field.measured[0])[inner].max()
    assert error < 0.02 * np.abs(finer_field.measured).max()


def test_a_phase_is_not_averaged_across_its_wraps():
    ramp = np.broadcast_to(np.linspace(0, 12, 40, dtype=np.float32)[:, None, None], GRID.shape)
    wrapped = np.angle(np.exp(1j * ramp)).astype(np.float32)
    finer = resample_scan(scan_of(wrapped, quantity="phase_rad"), (0.8, 0.9, 1.0))
    inner = (slice(6, -6), slice(6, -6), slice(8, -8))
    expected = np.angle(np.exp(1j * ramp))[:, :, :1] * np.ones(finer.mask.shape)
    apart = np.angle(np.exp(1j * (finer.measured[0] - expected)))[inner]
    assert np.abs(apart).max() < 0.2


def test_truth_and_labels_stay_behind_and_an_empty_mask_is_refused():
    thin = scan_of(blob(GRID))
    thin.mask[:] = False
    thin.mask[5, 5, 5] = True
    with pytest.raises(DataError, match="nothing of the mask is left"):
        resample_scan(thin, (4.0, 4.0, 4.0))


@pytest.mark.parametrize("shape", [(32, 32, 42), (41, 36, 20), (40, 37, 10), (39, 35, 22)])
def test_the_spectrum_is_cut_and_filled_as_scipy_does(shape):
    from scipy.signal import resample

    noise = np.random.default_rng(0).standard_normal(GRID.shape).astype(np.float32)
    expected = noise.astype(np.float64)
    for axis, n in enumerate(shape):
        expected = resample(expected, n, axis=axis)
    mask = np.zeros(shape, bool)
    mask[2:-2, 2:-2, 2:-2] = True
    np.testing.assert_allclose(resample_map(noise, mask), expected * mask, atol=1e-5)
