"""From wrapped echoes to a field and its noise, on a phantom whose field is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.stats import chi

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.local_field.field_mapping import map_field
from qsm_deploy.runtime.local_field.unwrapping import wrap
from tests.runtime.local_field.acquisition import (
    GEOMETRY,
    MEGAHERTZ_PER_TESLA,
    NOISE,
    RAD_PER_S_PER_PPM,
    TESLA,
    axes_of,
    echoes_of,
    nrmse,
)

ONE, TWO, FIVE = (0.006,), (0.004, 0.011), (0.004, 0.010, 0.016, 0.022, 0.028)
EIGHT = tuple(0.003 + 0.004 * n for n in range(8))


def error_of(found, total, mask):
    """Return the error inside a mask but for its median [ppm]."""
    error = (found.field_ppm - total)[mask]
    return error - np.median(error)


class TestField:
    @pytest.mark.parametrize(
        ("times", "notes"),
        [(ONE, ["one echo "]), (TWO, ["two echoes"]), (FIVE[:4], []), (EIGHT, [])],
    )
    def test_the_field_of_one_or_several_echoes(self, head, total, times, notes):
        found = map_field(echoes_of(total, head.mask, times), head.mask)
        assert [note[:9] for note in found.notes] == [note[:9] for note in notes]
        assert found.field_ppm.dtype == np.float32
        assert not found.field_ppm[~head.mask].any()
        expected = NOISE / (RAD_PER_S_PER_PPM * times[0])  # of the first echo, as a field
        error = error_of(found, total, head.mask)
        assert np.percentile(np.abs(error), 99) < 3 * expected
        assert np.mean(np.abs(error) > 20 * expected) < 1e-4  # voxels off by a turn

    def test_more_echoes_are_more_precise(self, head, total):
        errors = [
            np.std(error_of(map_field(echoes_of(total, head.mask, t), head.mask), total, head.mask))
            for t in ((0.005,), (0.005, 0.01, 0.015, 0.02))
        ]
        assert errors[1] < errors[0] / 2

    def test_echo_times_must_rise(self, head, total):
        with pytest.raises(DataError, match=r"\[10.0, 5.0\] ms do not rise"):
            map_field(echoes_of(total, head.mask, (0.01, 0.005)), head.mask)

    def test_an_empty_mask(self, head, total):
        with pytest.raises(DataError, match="mask is empty"):
            map_field(echoes_of(total, head.mask, TWO), np.zeros_like(head.mask))

    @pytest.mark.parametrize("times", [ONE, TWO, FIVE])
    def test_other_types_and_orders_of_memory(self, head, total, times):
        echoes = echoes_of(total, head.mask, times)
        whole = np.rint(1000 * echoes.magnitude).astype(np.int16)
        phase = echoes.phase_rad
        plain = replace(echoes, magnitude=whole.astype(np.float32))
        other = replace(
            echoes,
            magnitude=np.moveaxis(np.moveaxis(whole, 0, -1).copy(), -1, 0),
            phase_rad=np.asfortranarray(phase.astype(np.float64)),
        )
        kept = other.phase_rad.copy()
        expected, found = map_field(plain, head.mask), map_field(other, head.mask)
        for name in ("field_ppm", "noise_ppm", "misfit"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        np.testing.assert_array_equal(other.phase_rad, kept)

    def test_a_mask_at_the_edge_of_the_volume_and_one_of_one_slice(self, head, total):
        middle = np.s_[18:44, 20:50, 30:50]
        geometry = Geometry(total[middle].shape, GEOMETRY.voxel_size_mm, GEOMETRY.b0_direction)
        part = total[middle]
        everywhere = np.ones(part.shape, dtype=bool)
        echoes = echoes_of(part, everywhere, FIVE, geometry=geometry)
        assert nrmse(map_field(echoes, everywhere).field_ppm, part, everywhere) < 0.05
        slice_ = np.zeros_like(everywhere)
        slice_[:, :, 7] = True
        assert nrmse(map_field(echoes, slice_).field_ppm, part, slice_) < 0.05

    def test_what_lies_outside_the_mask_does_not_matter(self, head, total):
        echoes = echoes_of(total, head.mask, FIVE)
        cleared = replace(
            echoes, phase_rad=echoes.phase_rad * head.mask, magnitude=echoes.magnitude * head.mask
        )
        one, other = (map_field(e, head.mask) for e in (echoes, cleared))
        np.testing.assert_array_equal(one.field_ppm, other.field_ppm)
        np.testing.assert_array_equal(one.misfit, other.misfit)


class TestNoise:
    @pytest.mark.parametrize(("times", "snr"), [(FIVE, 40), (FIVE, 15), (EIGHT, 30), (TWO, 40)])
    def test_noise_map_says_how_far_the_field_is_off(self, head, total, times, snr):
        noise = 1 / snr * math.sqrt(2)  # of both parts
        found = map_field(echoes_of(total, head.mask, times, noise=noise), head.mask)
        deep = distance_transform_edt(head.mask, sampling=GEOMETRY.voxel_size_mm) > 6
        ratio = error_of(found, total, deep) / found.noise_ppm[deep]
        # two echoes: the phase at excitation follows its noise, which makes the field better
        low = 0.9 if len(times) == 2 else 0.97
        assert low < np.median(np.abs(ratio)) / 0.6745 < 1.06
        assert np.mean(np.abs(ratio) > 5) < 0.001
        first = math.exp(-times[0] * 25)
        if len(times) > 2:
            assert found.facts["snr"] == pytest.approx(first * snr, rel=0.03)
            assert found.facts["sigma"] == pytest.approx(1 / snr, rel=0.03)
        ppb = 1000 * found.noise_ppm[head.mask]
        assert found.facts["noise_median_ppb"] == pytest.approx(np.median(ppb), rel=1e-4)

    def test_misfit_finds_voxels_that_are_a_turn_off(self, head, total):
        rng = np.random.default_rng(6)
        echoes = echoes_of(total, head.mask, FIVE)
        off = head.mask & (rng.random(head.mask.shape) < 0.002)
        # between the first two echoes the phase grows by half a turn and more than it should
        echoes.phase_rad[1][off] = wrap(echoes.phase_rad[1][off] + np.float32(math.pi))
        found = map_field(echoes, head.mask)
        assert np.mean(found.misfit[off] > 4) > 0.99
        assert np.mean(found.misfit[head.mask & ~off] > 4) < 1e-4
        usual = chi.median(len(FIVE) - 1) / math.sqrt(len(FIVE))
        assert np.median(found.misfit[head.mask & ~off]) == pytest.approx(usual, rel=0.02)
        flagged = found.facts["misfit_over_4_percent"]
        assert flagged == pytest.approx(100 * np.mean(found.misfit[head.mask] > 4), abs=1e-3)

    def test_facts_go_into_a_report(self, head, total):
        facts = map_field(echoes_of(total, head.mask, FIVE), head.mask).facts
        assert json.loads(json.dumps(facts)) == facts
        assert set(facts) == {
            "sigma",
            "snr",
            "noise_median_ppb",
            "noise_p95_ppb",
            "noise_over_10_ppb_percent",
            "misfit_over_4_percent",
            "even_echoes_off_rad",
            "even_echoes_corrected",
            "initial_phase_rough_percent",
        }
        assert facts["even_echoes_corrected"] is False
        assert facts["even_echoes_off_rad"] < 0.01

    def test_one_echo_tells_no_noise(self, head, total):
        found = map_field(echoes_of(total, head.mask, ONE), head.mask)
        assert found.noise_ppm is None
        assert found.misfit is None

    @pytest.mark.parametrize("times", [ONE, TWO, FIVE])
    @pytest.mark.parametrize("share", [0.05, 0.6])
    def test_voids_leave_everything_finite(self, head, total, times, share):
        echoes = echoes_of(total, head.mask, times)
        void = np.random.default_rng(1).random(head.mask.shape) < share
        echoes.magnitude[:, void | ~head.mask] = 0
        np.multiply(echoes.magnitude, 4000, out=echoes.magnitude)  # as of whole numbers
        echoes.phase_rad[:, void | ~head.mask] = 0
        found = map_field(echoes, head.mask)
        volumes = [v for v in (found.field_ppm, found.noise_ppm, found.misfit) if v is not None]
        assert all(np.isfinite(v).all() for v in volumes)
        assert all(math.isfinite(v) for v in found.facts.values())
        if len(times) > 1:
            inside = void & head.mask
            nothing_known = 1 / math.sqrt(12) / (times[1] - times[0]) / MEGAHERTZ_PER_TESLA / TESLA
            np.testing.assert_allclose(found.noise_ppm[inside], nothing_known, rtol=1e-4)

    def test_no_noise_at_all(self):
        shape = (20, 22, 18)
        x, y, z = axes_of(shape)
        field = (0.1 * x * y + 0.05 * z).astype(np.float32)
        everywhere = np.ones(shape, dtype=bool)
        geometry = Geometry(shape, (2.0, 2.0, 2.0), (0.0, 0.0, 1.0))
        echoes = echoes_of(field, everywhere, FIVE, noise=0.0, geometry=geometry)
        found = map_field(echoes, everywhere)
        assert np.isfinite(found.misfit).all()
        assert nrmse(found.field_ppm, field, everywhere) < 0.01


class TestPhaseAtExcitation:
    def test_it_does_not_matter_where_it_is_smooth(self, head, total):
        x, y, z = axes_of(GEOMETRY.shape)
        initial = 2.0 + 1.5 * x - y + 1.2 * x * z
        times = (0.005, 0.01, 0.015)
        with_it, without = (
            map_field(echoes_of(total, head.mask, times, p, noise=0.003), head.mask).field_ppm
            for p in (initial, 0.0)
        )
        change = (with_it - without)[head.mask]
        assert np.std(change - np.median(change)) < 0.001  # ppm; a Gaussian alone: 0.0044
        assert nrmse(with_it, total, head.mask) < 0.01

    @pytest.mark.parametrize("turns", [1, 6])
    @pytest.mark.parametrize("times", [(0.004, 0.010), (0.004, 0.010, 0.016)])
    def test_a_plane_does_not_matter(self, head, total, turns, times):
        x, _, z = axes_of(GEOMETRY.shape)
        without = map_field(echoes_of(total, head.mask, times), head.mask).field_ppm
        plane = math.pi * turns * (x - 0.5 * z)
        found = map_field(echoes_of(total, head.mask, times, plane), head.mask).field_ppm
        assert nrmse(found, total, head.mask) < 1.05 * nrmse(without, total, head.mask)

    def test_a_pole_costs_little_and_only_near_it(self, head, total):
        x, y, _ = axes_of(GEOMETRY.shape)
        pole = np.arctan2(y - 0.21, x - 0.13)  # a line along z, through the brain
        plain, found = (
            map_field(echoes_of(total, head.mask, FIVE, phase), head.mask) for phase in (0.0, pole)
        )
        (note,) = found.notes
        assert note.startswith("the phase at excitation is not smooth in ")
        assert plain.notes == []
        assert plain.facts["initial_phase_rough_percent"] == 0
        assert 1 < found.facts["initial_phase_rough_percent"] < 15
        errors = [np.abs(error_of(f, total, head.mask)) for f in (plain, found)]
        assert np.median(errors[1]) < 1.25 * np.median(errors[0])
        assert np.percentile(errors[1], 95) < 1.6 * np.percentile(errors[0], 95)
        near = head.mask & np.broadcast_to(np.hypot(x - 0.13, y - 0.21) < 0.05, head.mask.shape)
        ratio = error_of(found, total, near) / found.noise_ppm[near]
        assert np.median(np.abs(ratio)) / 0.6745 < 1.3  # its noise is told as larger there
        assert np.median(found.noise_ppm[near]) > 1.3 * np.median(plain.noise_ppm[near])


class TestBipolarReadout:
    @pytest.mark.parametrize("times", [(0.005, 0.011, 0.017), (0.004, 0.010, 0.017, 0.022, 0.029)])
    @pytest.mark.parametrize("slopes", [(1.6, 0, 0, 0.3), (-0.4, 0.5, 0.2, 0.0), (0, 0, 6.0, -0.4)])
    def test_it_makes_no_difference(self, head, total, times, slopes):
        offset = sum(s * a for s, a in zip(slopes, [*axes_of(GEOMETRY.shape), 1.0], strict=True))
        unipolar = map_field(echoes_of(total, head.mask, times), head.mask)
        echoes = echoes_of(total, head.mask, times)
        echoes.phase_rad[1::2] += offset
        bipolar = map_field(echoes, head.mask)
        assert unipolar.notes == []
        (note,) = bipolar.notes
        assert note.startswith("bipolar readout: even echoes ")
        assert bipolar.facts["even_echoes_corrected"] is True
        size = np.abs(np.broadcast_to(offset, head.mask.shape)[head.mask]).mean()
        assert bipolar.facts["even_echoes_off_rad"] == pytest.approx(size, abs=0.02)
        error = (bipolar.field_ppm - unipolar.field_ppm)[head.mask]
        assert np.median(np.abs(error - np.median(error))) < 0.001  # ppm
        errors = [nrmse(f.field_ppm, total, head.mask) for f in (unipolar, bipolar)]
        assert errors[1] < 1.1 * errors[0] + 0.01

    @pytest.mark.parametrize("constant", [2.0, 3.0, -2.5])
    def test_a_constant_offset_between_uneven_echoes(self, head, total, constant):
        times = (0.003, 0.008, 0.011, 0.020)
        unipolar = map_field(echoes_of(total, head.mask, times), head.mask)
        echoes = echoes_of(total, head.mask, times)
        echoes.phase_rad[1::2] += np.float32(constant)
        error = error_of(map_field(echoes, head.mask), unipolar.field_ppm, head.mask)
        assert np.percentile(np.abs(error), 99) < 0.002


class TestContradictions:
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

    def test_much_noise_is_no_contradiction(self, head, total):
        found = map_field(echoes_of(total, head.mask, FIVE, noise=0.35), head.mask)
        inner = binary_erosion(head.mask, iterations=2)
        ratio = error_of(found, total, inner) / found.noise_ppm[inner]
        assert 0.8 < np.median(np.abs(ratio)) / 0.6745 < 1.4
