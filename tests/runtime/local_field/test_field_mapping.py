"""From wrapped echoes to a local field, on phantoms whose field is known and on a real scan."""

import math

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.local_field.background_removal import remove_background
from qsm_deploy.runtime.local_field.field_mapping import Echoes, map_field
from qsm_deploy.runtime.local_field.from_echoes import local_field_from_echoes, result_of
from qsm_deploy.runtime.local_field.magnitude_mask import mask_from_magnitude, otsu_threshold

GEOMETRY = Geometry((64, 72, 64), (2.4, 2.4, 2.4), (0.2, 0.1, 1.0))
TESLA, MEGAHERTZ_PER_TESLA = 3.0, 42.577
NOISE = 0.03  # of the signal


@pytest.fixture(scope="module")
def head():
    return head_phantom(GEOMETRY, seed=4, noise_ppm=0.0)


@pytest.fixture(scope="module")
def background(head):
    """Return the field of the air around the head and of a cavity, shimmed [ppm]."""
    outside = distance_transform_edt(~head.mask, sampling=GEOMETRY.voxel_size_mm)
    air = np.where(outside > 14, 9.4, 0).astype(np.float32)
    air[28:36, 60:66, 20:28] = 9.4 * (outside[28:36, 60:66, 20:28] > 5)
    air = gaussian_filter(air, 1.0) * (outside > 2)
    field = dipole_convolve(air, GEOMETRY, pad_voxels=(32, 36, 32))
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in GEOMETRY.shape], indexing="ij")
    shims = np.stack([np.ones(GEOMETRY.shape), *axes], axis=-1)
    shims = shims.astype(np.float32)
    field -= shims @ np.linalg.lstsq(shims[head.mask], field[head.mask], rcond=None)[0]
    return field * head.mask


def echoes_of(field_ppm, mask, times_s, initial_rad=0.0):
    """Return what a scanner would measure."""
    rng = np.random.default_rng(8)
    phase, magnitude = [], []
    for time in times_s:
        angle = initial_rad + 2 * math.pi * MEGAHERTZ_PER_TESLA * TESLA * time * field_ppm
        signal = np.where(mask, math.exp(-time / 0.04), 0.02) * np.exp(1j * angle)
        noise = rng.standard_normal((2, *mask.shape)) * NOISE / math.sqrt(2)
        signal = signal + noise[0] + 1j * noise[1]
        phase.append(np.angle(signal).astype(np.float32))
        magnitude.append(np.abs(signal).astype(np.float32))
    return Echoes(np.stack(phase), np.stack(magnitude), times_s, TESLA, GEOMETRY)


def nrmse(result, truth, mask):
    error = (result - truth)[mask]
    reference = truth[mask] - truth[mask].mean()
    return float(np.linalg.norm(error - error.mean()) / np.linalg.norm(reference))


class TestFieldMapping:
    @pytest.fixture
    def total(self, head, background):
        return head.local_field_ppm + background

    @pytest.mark.parametrize("times", [(0.006,), (0.004, 0.011), (0.005, 0.01, 0.015, 0.02)])
    def test_the_field_of_one_or_several_echoes(self, head, total, times):
        found, notes = map_field(echoes_of(total, head.mask, times), head.mask)
        assert [note[:10] for note in notes] == ["two echoes"] * (len(times) == 2)
        assert not found[~head.mask].any()
        # the noise of one echo, as a field
        expected = NOISE / (2 * math.pi * MEGAHERTZ_PER_TESLA * TESLA * times[0])
        error = (found - total)[head.mask]
        error -= np.median(error)
        assert np.percentile(np.abs(error), 99) < 3 * expected
        assert np.mean(np.abs(error) > 20 * expected) < 1e-4  # voxels off by a turn

    def test_more_echoes_are_more_precise(self, head, total):
        errors = []
        for times in ((0.005,), (0.005, 0.01, 0.015, 0.02)):
            found, _ = map_field(echoes_of(total, head.mask, times), head.mask)
            errors.append(np.std((found - total)[head.mask]))
        assert errors[1] < errors[0] / 2

    def test_the_phase_at_excitation_does_not_matter(self, head, total):
        x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in GEOMETRY.shape], indexing="ij")
        initial = 2.0 + 1.5 * x - y + 1.2 * x * z
        times = (0.005, 0.01, 0.015)
        with_it, _ = map_field(echoes_of(total, head.mask, times, initial), head.mask)
        without, _ = map_field(echoes_of(total, head.mask, times), head.mask)
        inner = distance_transform_edt(head.mask) > 2
        change = (with_it - without)[inner]
        assert (
            np.std(change - np.median(change)) < 0.006
        )  # ppm; 0.0044, of the smoothing at the edge
        assert nrmse(with_it, total, inner) < 0.05

    @pytest.mark.parametrize("times", [(0.005, 0.011, 0.017), (0.004, 0.010, 0.017, 0.022, 0.029)])
    @pytest.mark.parametrize("slopes", [(1.6, 0, 0, 0.3), (-0.4, 0.5, 0.2, 0.0), (0, 0, 6.0, -0.4)])
    def test_a_bipolar_readout_makes_no_difference(self, head, total, times, slopes):
        axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in GEOMETRY.shape], indexing="ij")
        offset = sum(s * a for s, a in zip(slopes, [*axes, 1.0], strict=True)).astype(np.float32)
        unipolar, none = map_field(echoes_of(total, head.mask, times), head.mask)
        echoes = echoes_of(total, head.mask, times)
        echoes.phase_rad[1::2] += offset
        bipolar, (note,) = map_field(echoes, head.mask)
        assert none == []
        assert note.startswith("bipolar readout: even echoes ")
        error = (bipolar - unipolar)[head.mask]
        assert np.median(np.abs(error - np.median(error))) < 0.001  # ppm
        assert nrmse(bipolar, total, head.mask) < 1.1 * nrmse(unipolar, total, head.mask) + 0.01

    @pytest.mark.parametrize("constant", [2.0, 3.0, -2.5])
    def test_a_constant_offset_between_uneven_echoes(self, head, total, constant):
        times = (0.003, 0.008, 0.011, 0.020)
        unipolar, _ = map_field(echoes_of(total, head.mask, times), head.mask)
        echoes = echoes_of(total, head.mask, times)
        echoes.phase_rad[1::2] += np.float32(constant)
        error = (map_field(echoes, head.mask)[0] - unipolar)[head.mask]
        assert np.percentile(np.abs(error - np.median(error)), 99) < 0.002

    @pytest.mark.parametrize("turns", [1, 6])
    @pytest.mark.parametrize("times", [(0.004, 0.010), (0.004, 0.010, 0.016)])
    def test_a_plane_at_excitation_does_not_matter(self, head, total, turns, times):
        x, _, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in GEOMETRY.shape], indexing="ij")
        without, _ = map_field(echoes_of(total, head.mask, times), head.mask)
        found, _ = map_field(
            echoes_of(total, head.mask, times, math.pi * turns * (x - 0.5 * z)), head.mask
        )
        assert nrmse(found, total, head.mask) < 1.05 * nrmse(without, total, head.mask)

    @pytest.mark.parametrize(
        ("times", "echo", "change"),
        [
            ((0.005, 0.011, 0.017), 2, lambda phase: 0.5 * phase),
            ((0.005, 0.011, 0.017), 1, lambda phase: 0.767 * phase),
            ((0.004, 0.009, 0.014), 1, lambda phase: -phase),
            ((0.004, 0.009, 0.014), 2, lambda phase: -phase),
            ((0.004, 0.009), 1, lambda phase: -phase),
            ((0.010, 0.020), 1, lambda phase: phase[::-1]),
            ((0.004, 0.009, 0.014), 1, lambda phase: phase[:, ::-1]),
        ],
    )
    def test_an_echo_that_contradicts_the_others_is_refused(self, head, total, times, echo, change):
        echoes = echoes_of(total, head.mask, times)
        echoes.phase_rad[echo] = change(echoes.phase_rad[echo].copy())
        with pytest.raises(DataError, match="contradicts echo"):
            map_field(echoes, head.mask)

    def test_an_echo_that_is_there_twice_is_refused(self, head, total):
        echoes = echoes_of(total, head.mask, (0.005, 0.011, 0.017))
        echoes.phase_rad[1] = echoes.phase_rad[0]
        with pytest.raises(DataError, match="echoes 1 and 2 hold the same phase"):
            map_field(echoes, head.mask)

    @pytest.mark.parametrize("times", [(0.006,), (0.005, 0.011, 0.017)])
    def test_slices_half_a_turn_off_make_no_difference(self, head, total, times):
        right = echoes_of(total, head.mask, times)
        flipped = echoes_of(total, head.mask, times)
        flipped.phase_rad[..., ::2] += math.pi
        fields = [
            result_of(local_field_from_echoes(e, head.mask, GEOMETRY, 1e10, Stages()))
            for e in (right, flipped)
        ]
        np.testing.assert_allclose(fields[0][0], fields[1][0], atol=2e-4)
        assert fields[0][2] == []
        assert "every second slice along voxel axis 3 was half a turn off" in fields[1][2][0]

    def test_echo_times_must_rise(self, head, total):
        with pytest.raises(DataError, match=r"\[10.0, 5.0\] ms do not rise"):
            map_field(echoes_of(total, head.mask, (0.01, 0.005)), head.mask)


class TestMagnitudeMask:
    def test_signal_and_no_noise(self, head):
        echoes = echoes_of(head.local_field_ppm, head.mask, (0.005, 0.015))
        found = mask_from_magnitude(echoes.magnitude)
        overlap = 2 * np.count_nonzero(found & head.mask)
        assert overlap / (np.count_nonzero(found) + np.count_nonzero(head.mask)) > 0.97

    def test_holes_are_filled_and_islands_left_out(self):
        magnitude = np.full((1, 30, 30, 30), 0.01, dtype=np.float32)
        magnitude[0, 5:20, 5:20, 5:20] = 1
        magnitude[0, 11:14, 11:14, 11:14] = 0.01
        magnitude[0, 24:28, 24:28, 24:28] = 1
        found = mask_from_magnitude(magnitude)
        assert found[12, 12, 12]
        assert not found[26, 26, 26]

    def test_a_volume_without_background_is_all_mask(self):
        rng = np.random.default_rng(1)
        magnitude = rng.normal(1, 0.2, (1, 20, 20, 20)).clip(0.1).astype(np.float32)
        assert mask_from_magnitude(magnitude).all()

    def test_nothing_to_tell_apart(self):
        with pytest.raises(DataError, match="constant or not finite"):
            mask_from_magnitude(np.ones((1, 9, 9, 9), dtype=np.float32))

    def test_the_threshold_lies_between_two_classes(self):
        values = np.concatenate([np.linspace(0, 1, 100), np.linspace(5, 6, 50)])
        assert 1 < otsu_threshold(values.astype(np.float32)) < 5


def test_a_real_multi_echo_scan(shared):
    """Three echoes of part of a head: no jumps, and a local field of the size of tissue's."""
    folder = shared / "data" / "gre_crop"
    # the slope in the phase's header is stale: the stored values are radians
    phase, magnitude = (
        np.asarray(nib.load(folder / name).dataobj.get_unscaled(), dtype=np.float32)
        for name in ("Phase.nii", "Mag.nii")
    )
    times, voxel = (0.004, 0.008, 0.012), (0.469, 0.469, 1.0)
    echoes = Echoes(phase.transpose(3, 0, 1, 2), magnitude.transpose(3, 0, 1, 2), times, 7.0, voxel)
    mask = mask_from_magnitude(echoes.magnitude)
    assert mask.all()  # it was cut from inside the head
    field, notes = map_field(echoes, mask)
    assert not notes
    turn_ppm = 1 / (MEGAHERTZ_PER_TESLA * 7 * (times[1] - times[0]))
    steps = [np.abs(np.diff(field, axis=axis)).max() / turn_ppm for axis in range(3)]
    assert max(steps) < 0.5
    local, mask = remove_background(field, mask, Geometry(mask.shape, voxel))
    assert 0.002 < np.std(local[mask]) < 0.03
