import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError, GeometryError, UnitsError
from qsm_deploy.runtime.scan.params import Params
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles, load_scan

NOTHING = Params()


@pytest.fixture
def load(field, write_volume):
    """Return a function that writes the given volumes and reads them as one acquisition."""

    def load(*, units="ppm", flags=NOTHING, from_file=NOTHING, affine=None, **volumes):
        volumes = {"field": field, **volumes}
        paths = {k: write_volume(v, f"{k}.nii.gz", affine) for k, v in volumes.items()}
        files = ScanFiles((paths.pop("field"),), **paths)
        return load_scan(files, Reading(units=units, flags=flags, from_file=from_file))

    return load


def test_outside_the_mask_nothing_counts(load, field):
    mask = np.zeros(field.shape, dtype=np.uint8)
    mask[6:10, 6:10, 6:10] = 7
    dirty = np.where(mask, field, np.nan).astype(np.float32)
    scan = load(field=dirty, mask=mask)
    assert scan.mask.sum() == 64
    assert np.array_equal(scan.measured[0], np.where(mask, field, 0))
    assert scan.notes == []


def test_without_a_mask_the_non_zero_field_is_one(load, field):
    scan = load()
    assert np.array_equal(scan.mask, field != 0)
    assert scan.notes == ["no mask given: taking the non-zero field, 37 % of the volume"]


def test_units_are_converted(load, field):
    hertz = load(field=field * 127.731, units="hz", flags=Params(field_strength_t=3.0))
    np.testing.assert_allclose(hertz.measured[0], field, rtol=1e-6)
    radians = load(
        field=field * np.float32(127.731 * 2 * np.pi * 0.01),
        units="rad",
        flags=Params(echo_times_s=(0.01,)),
        from_file=Params(echo_times_s=(0.5,), field_strength_t=3.0),
    )
    np.testing.assert_allclose(radians.measured[0], field, rtol=1e-6)


class TestGeometry:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])

    def test_comes_from_the_header(self, load):
        scan = load(affine=self.affine)
        assert scan.geometry.voxel_size_mm == (1, 1, 2)
        assert scan.geometry.b0_direction == (0, 0, 1)

    def test_a_flag_wins_over_the_file_and_the_file_over_the_header(self, load):
        from_file = Params(voxel_size_mm=(1, 1, 3), b0_direction=(0, 1, 0))
        scan = load(affine=self.affine, from_file=from_file, flags=Params(b0_direction=(1, 0, 0)))
        stored = scan.axes.inverse.geometry(scan.geometry)
        assert stored.voxel_size_mm == (1, 1, 3)
        assert stored.b0_direction == (1, 0, 0)
        assert scan.geometry.b0_direction == (0, 0, 1)
        assert scan.notes[:3] == [
            "voxel size (1, 1, 3) mm from the parameter file, not (1, 1, 2) mm",
            "B0 direction (0, 1, 0) from the parameter file, not (0, 0, 1)",
            "B0 direction (1, 0, 0) from the command line, not (0, 1, 0)",
        ]

    def test_what_agrees_is_not_worth_a_note(self, load):
        from_file = Params(voxel_size_mm=(1, 1, 2), b0_direction=(0, 0, -1))
        scan = load(affine=self.affine, from_file=from_file)
        assert len(scan.notes) == 1

    def test_a_stated_voxel_size_must_be_positive(self, load):
        with pytest.raises(GeometryError, match="voxel size must be positive"):
            load(flags=Params(voxel_size_mm=(1, 1, 0)))

    def test_a_stated_direction_must_not_vanish(self, load):
        with pytest.raises(GeometryError, match="B0 direction must be finite and non-zero"):
            load(flags=Params(b0_direction=(0, 0, 0)))


class TestBadValues:
    def test_nan_inside_the_mask_is_counted(self, load, field):
        field[8, 8, 8:11] = np.nan, np.inf, -np.inf
        says = "3 of 5670 voxels inside the mask are NaN or Inf; take these voxels out of the mask"
        with pytest.raises(DataError, match=says):
            load(field=field, mask=np.ones(field.shape, dtype=np.uint8))

    def test_nan_without_a_mask_asks_for_one(self, load, field):
        field[0] = np.nan
        with pytest.raises(DataError, match=r"270 of 2350 .* set them to 0 or pass a mask"):
            load(field=field)

    def test_nan_in_the_truth_is_found_before_the_work(self, load, field):
        truth = field.copy()
        truth[8, 8, 8] = np.nan
        with pytest.raises(DataError, match=r"truth\.nii\.gz: 1 of"):
            load(truth=truth)

    def test_zero_field(self, load, field):
        with pytest.raises(DataError, match="the field is zero everywhere"):
            load(field=0 * field)
        with pytest.raises(UnitsError, match="zero in the whole mask"):
            load(field=0 * field, mask=np.ones(field.shape, dtype=np.uint8))

    def test_empty_mask(self, load, field):
        with pytest.raises(DataError, match="the mask is empty"):
            load(mask=np.zeros(field.shape, dtype=np.uint8))

    def test_mask_of_nan(self, load, field):
        with pytest.raises(DataError, match="5670 voxels of the mask are NaN"):
            load(mask=np.full(field.shape, np.nan, dtype=np.float32))

    def test_field_in_hertz(self, load, field):
        with pytest.raises(UnitsError, match="if it is in hz"):
            load(field=127 * field)

    def test_fractional_labels(self, load, field):
        with pytest.raises(DataError, match="labels must be whole numbers"):
            load(labels=field)


@pytest.mark.parametrize("which", ["mask", "truth", "labels"])
def test_every_volume_must_be_on_the_fields_grid(field, write_volume, which):
    paths = {"fields": (write_volume(field, "field.nii.gz"),)}
    paths[which] = write_volume(np.ones((21, 18, 14), dtype=np.uint8), "other.nii.gz")
    with pytest.raises(GeometryError, match=r"has shape \(21, 18, 14\).*resample"):
        load_scan(ScanFiles(**paths), Reading())
    shifted = np.eye(4)
    shifted[0, 3] = 2
    paths[which] = write_volume(np.ones(field.shape, dtype=np.uint8), "shifted.nii.gz", shifted)
    with pytest.raises(GeometryError, match=r"affines .* disagree: .* 2 mm apart"):
        load_scan(ScanFiles(**paths), Reading())


def test_echoes_of_a_magnitude_of_any_scale(field, write_volume):
    signal = np.abs(field) + 1
    one, other = (write_volume(k * signal, f"{k:g}.nii") for k in (3e30, 4e30))
    mask = (field != 0).astype(np.uint8)
    paths = write_volume(field, "field.nii"), write_volume(mask, "mask.nii")
    scan = load_scan(ScanFiles(paths[:1], paths[1], magnitude=(one, other)), Reading())
    np.testing.assert_allclose(scan.magnitude, 5e30 * signal * mask, rtol=1e-6)
    short = write_volume(signal[1:], "short.nii")
    with pytest.raises(GeometryError) as refused:
        load_scan(ScanFiles(paths[:1], paths[1], magnitude=(short,)), Reading())
    assert str(refused.value).count("short.nii") == 1
