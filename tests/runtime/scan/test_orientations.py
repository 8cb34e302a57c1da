from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError, GeometryError, UnitsError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.nifti import load_volume
from qsm_deploy.runtime.scan.params import Params
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles, load_scan


def turned(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.eye(4)
    affine[:3, :3] = [[1, 0, 0], [0, c, -s], [0, s, c]]
    return affine


@pytest.fixture
def files(field, write_volume):
    paths = [write_volume((n + 1) * field, f"f{n}.nii", turned(20 * n)) for n in range(3)]
    return SimpleNamespace(paths=tuple(paths), field=field)


def test_each_affine_says_where_b0_points(files):
    scan = load_scan(ScanFiles(files.paths), Reading())
    for n, direction in enumerate(scan.b0_directions):
        expected = Geometry.from_affine(files.field.shape, turned(20 * n)).b0_direction
        np.testing.assert_allclose(direction, expected, atol=1e-6)
        np.testing.assert_allclose(scan.measured[n], (n + 1) * files.field, rtol=1e-6)
    np.testing.assert_allclose(scan.affine, turned(0))


def test_stated_directions_win(files):
    stated = ((0.0, 0.6, 0.8), (0.6, 0.0, 0.8))
    reading = Reading(flags=Params(b0_direction=(0, 0, 1)), more_b0_directions=stated)
    scan = load_scan(ScanFiles(files.paths), reading)
    np.testing.assert_allclose(scan.b0_directions, [(0, 0, 1), *stated], atol=1e-6)


def test_the_same_direction_twice_is_refused(files, write_volume):
    twin = write_volume(files.field, "twin.nii", turned(0.5))
    with pytest.raises(GeometryError, match=r"twin.nii: B0 direction .* the same"):
        load_scan(ScanFiles((files.paths[0], twin)), Reading())


def test_every_header_must_tell(files, tmp_path):
    path, image = tmp_path / "second.nii", nib.Nifti1Image(files.field, turned(20))
    nib.save(image, path)
    both = ScanFiles((files.paths[0], path))
    assert any("second.nii: the header says aligned" in n for n in load_scan(both, Reading()).notes)
    image.set_sform(turned(20), "mni")
    nib.save(image, path)
    with pytest.raises(GeometryError, match=r"second.nii: .*template space.* for each field"):
        load_scan(both, Reading())
    stated = Reading(flags=Params(b0_direction=(0, 0, 1)), more_b0_directions=((0, 0.6, 0.8),))
    np.testing.assert_allclose(load_scan(both, stated).b0_directions[1], (0, 0.6, 0.8))


def test_too_few_directions_are_refused(files):
    with pytest.raises(UsageError, match="3 fields but 2 --b0-direction"):
        load_scan(ScanFiles(files.paths), Reading(more_b0_directions=((0.0, 0.6, 0.8),)))


def test_another_grid_is_refused(files, write_volume):
    other = write_volume(files.field[:-1], "other.nii", turned(20))
    with pytest.raises(GeometryError, match=r"other.nii has shape .* register"):
        load_scan(ScanFiles((files.paths[0], other)), Reading())
    coarse = write_volume(files.field, "coarse.nii", turned(20) @ np.diag([1, 1, 1.5, 1]))
    with pytest.raises(GeometryError, match=r"coarse.nii has voxels of \(1, 1, 1.5\)"):
        load_scan(ScanFiles((files.paths[0], coarse)), Reading())


def test_a_bad_second_field_is_named(files, write_volume):
    holes = files.field.copy()
    holes[6, 6, 6] = np.nan
    bad = write_volume(holes, "holes.nii", turned(20))
    with pytest.raises(DataError, match=r"holes.nii: 1 of"):
        load_scan(ScanFiles((files.paths[0], bad)), Reading())


class TestPhase:
    def reading(self, **more):
        flags = Params(echo_times_s=(0.02,), field_strength_t=3.0)
        return Reading(quantity="phase_rad", flags=flags, **more)

    def load(self, write_volume, phase, **more):
        path = write_volume(phase.astype(np.float32), "phase.nii")
        return load_scan(ScanFiles((path,)), self.reading(**more))

    def test_it_stays_in_radians(self, field, write_volume):
        phase = np.angle(np.exp(1j * 40 * field))
        scan = self.load(write_volume, phase)
        assert scan.quantity == "phase_rad"
        assert (scan.echo_time_s, scan.field_strength_t, scan.notes[1:]) == (0.02, 3.0, [])
        np.testing.assert_allclose(scan.measured[0], phase, rtol=1e-6)
        turned_round = self.load(write_volume, phase, negate=True)
        np.testing.assert_allclose(turned_round.measured, -scan.measured)

    @pytest.mark.parametrize(
        ("factor", "says"),
        [(4096.0, "no scale known here"), (1e-3, "scl_slope.*stale")],
    )
    def test_what_cannot_be_a_wrapped_phase_is_refused(self, field, write_volume, factor, says):
        with pytest.raises(UnitsError, match=says):
            self.load(write_volume, factor * np.angle(np.exp(1j * 150 * field)))

    def test_a_field_is_refused_by_its_unit(self, field, write_volume):
        with pytest.raises(UnitsError, match="takes the wrapped phase in radians, not a field in"):
            self.load(write_volume, field, units="ppm")

    def test_a_small_range_is_noted(self, field, write_volume):
        assert "usually reaches pi" in self.load(write_volume, 10 * field).notes[-1]

    def test_the_stale_slope_of_a_real_phase_is_caught(self, shared, write_volume):
        phase = nib.load(shared / "data" / "gre_crop" / "Phase.nii")
        stale = phase.get_fdata()[..., 0]
        with pytest.raises(UnitsError, match=r"scl_slope.*stale"):
            self.load(write_volume, stale)
        right = self.load(write_volume, phase.dataobj.get_unscaled()[..., 0])
        assert np.abs(right.measured).max() <= np.float32(np.pi)


@pytest.mark.parametrize("letters", ["LPS", "LAS", "PSR", "RSA"])
def test_a_field_that_is_stored_in_another_order_is_turned_into_the_first_s(
    files, letters, tmp_path
):
    """The affine keeps the turn of the head, whatever the order that it is stored in."""
    first, second, _ = files.paths
    expected = load_scan(ScanFiles((first, second)), Reading())
    volume = nib.load(second)
    wanted = nib.orientations.axcodes2ornt(letters)
    now = nib.orientations.axcodes2ornt("RAS")
    way = nib.orientations.ornt_transform(now, wanted)
    turned = volume.as_reoriented(way)
    turned.set_sform(turned.affine, 1)
    path = tmp_path / f"{letters}.nii"
    nib.save(turned, path)
    found = load_scan(ScanFiles((first, path)), Reading())
    np.testing.assert_array_equal(found.measured, expected.measured)
    np.testing.assert_allclose(found.b0_directions, expected.b0_directions, atol=1e-6)
    stated = load_scan(
        ScanFiles((first, path)),
        Reading(
            flags=Params(b0_direction=expected.geometry.b0_direction),
            more_b0_directions=(load_volume(path).geometry.b0_direction,),
        ),
    )
    np.testing.assert_allclose(stated.b0_directions, expected.b0_directions, atol=1e-6)
