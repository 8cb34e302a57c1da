"""Total variation on a made-up GPU that runs work late, against that on the CPU."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from qsm_deploy.kernels.errors import DataError, EngineError, MemoryLimitError, UnitsError
from qsm_deploy.kernels.inversion.total_variation import total_variation
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.arrays import DeviceView
from qsm_deploy.runtime.gpu.reconstruction import reconstruct_on_device, reconstruct_to_device
from qsm_deploy.runtime.gpu.total_variation import VariationWorkload, variation_job
from qsm_deploy.runtime.metrics.metrics import field_residual
from tests.runtime.gpu.small_scans import GRIDS, WITHIN, each_grid, scan_of

ALPHA, SIGMA, FEW = 1e-4, 1e-3, 4  # iterations where their number does not matter


@pytest.fixture
def scan():
    return scan_of(*GRIDS["box inside"])


def job_of(place, scan, alpha=ALPHA, **choices):
    work = VariationWorkload(scan, place.library, **choices)
    return variation_job(place, work, alpha_ppm_mm=alpha, sigma_ppm=SIGMA)


def on_cpu(scan, iterations, done=lambda: None):
    return total_variation(
        scan.measured[0],
        scan.mask,
        scan.geometry,
        alpha_ppm_mm=ALPHA,
        sigma_ppm=SIGMA,
        iterations=iterations,
        done=done,
    )


@each_grid
@pytest.mark.parametrize("iterations", [1, 2, 30])
def test_it_does_as_the_cpu_does(place, fake_device, grid, box, iterations):
    scan, stages, steps = scan_of(grid, box), Stages(), []
    job = job_of(place, scan, iterations=iterations)
    chi, found = reconstruct_on_device(job, stages, lambda: steps.append(1))
    expected, facts = on_cpu(scan, iterations)
    assert np.abs(expected).max() > 0.01
    assert np.linalg.norm(chi - expected) <= WITHIN * np.linalg.norm(expected)
    assert (chi[~scan.mask] == 0).all()
    assert found.pop("padded_shape") == facts.padded_shape
    for name, value in found.items():
        assert value == pytest.approx(asdict(facts)[name], rel=1e-4), name
    assert len(steps) == iterations
    assert list(stages.seconds) == ["upload", "inversion", "download"]
    assert fake_device.most_waiting > 3 * iterations  # all were enqueued before any was waited for


def test_the_field_residual_is_the_cpus(place, scan):
    chi, found = reconstruct_on_device(
        job_of(place, scan, iterations=FEW, evaluates=True), Stages()
    )
    expected = field_residual(chi, scan.measured[0], scan.mask, scan.geometry)
    assert found["field_residual"] == pytest.approx(expected, rel=1e-5)


def test_it_repeats_exactly_in_any_order(place, scan):
    job = job_of(place, scan, iterations=FEW)
    first, _ = reconstruct_on_device(job, Stages())
    np.testing.assert_array_equal(reconstruct_on_device(job, Stages())[0], first)


@pytest.mark.parametrize("evaluates", [False, True])
def test_memory_is_what_was_predicted(place, fake_device, scan, evaluates):
    job = job_of(place, scan, iterations=FEW, evaluates=evaluates)
    predicted = max(job.work.allocated_bytes(job.plan).values())
    reconstruct_on_device(job, Stages())
    assert fake_device.peak_bytes == predicted


def test_a_gpu_with_too_little_memory_is_left_as_it_was(place, fake_device, scan):
    job = job_of(place, scan)
    needed = max(job.work.allocated_bytes(job.plan).values())
    for capacity in (needed - 1, needed // 2, 1):
        fake_device.capacity = capacity
        with pytest.raises(MemoryLimitError, match=r"no .* left for this run .* --device cpu"):
            reconstruct_on_device(job, Stages())
        assert not any(fake_device.held().values())


@pytest.mark.parametrize("name", ["tv_split", "tv_solve", "dipole_apply", "patch_gather"])
def test_a_kernel_that_fails_leaves_nothing_behind(place, fake_device, scan, name, monkeypatch):
    def refuse(*_, **__):
        raise EngineError("the GPU refuses")

    monkeypatch.setattr(place.library, name, refuse, raising=False)
    with pytest.raises(EngineError, match="the GPU refuses"):
        reconstruct_on_device(job_of(place, scan), Stages())
    assert not any(fake_device.held().values())


def test_a_map_that_is_not_finite_is_refused(place, scan):
    field = np.where(scan.mask, np.float32(1e38), np.float32(0))
    broken = replace(scan, measured=field[None])
    with pytest.raises(EngineError, match="NaN or Inf voxels"):
        reconstruct_on_device(job_of(place, broken, iterations=FEW), Stages())


class TestOnTheDevice:
    """A field that lies on the GPU already, and a map that stays there."""

    def view_of(self, device, scan, outside=np.nan):
        field = np.where(scan.mask, scan.measured[0], np.float32(outside))
        pointer = device.allocate(field.nbytes)
        stream = device.open_stream()
        device.copy_in(pointer, field, stream)
        return DeviceView(pointer, field.shape, "f4", stream, field)

    def test_it_is_the_same_map(self, place, fake_device, scan):
        """Whatever lies outside the mask, and although the owner's copy is still under way."""
        field = self.view_of(fake_device, scan)
        blank = replace(scan, measured=np.zeros_like(scan.measured))
        chi, found = reconstruct_to_device(
            job_of(place, blank, iterations=FEW, field=field), Stages()
        )
        seen = fake_device.pinned(scan.mask.shape, np.float32)
        pointer, _ = chi.__cuda_array_interface__["data"]
        fake_device.copy_out(seen, pointer, field.stream)
        fake_device.synchronize()
        expected, facts = reconstruct_on_device(job_of(place, scan, iterations=FEW), Stages())
        np.testing.assert_array_equal(seen, expected)
        assert found == facts
        del chi
        fake_device.release(field.pointer)
        fake_device.close_stream(field.stream)

    @pytest.mark.parametrize(("value", "error"), [(np.nan, DataError), (0, UnitsError)])
    def test_a_field_that_cannot_be(self, place, fake_device, scan, value, error):
        wrong = replace(scan, measured=np.full_like(scan.measured, value))
        field = self.view_of(fake_device, wrong)
        with pytest.raises(error, match="the field"):
            reconstruct_to_device(job_of(place, scan, field=field), Stages())
        fake_device.release(field.pointer)
        fake_device.close_stream(field.stream)
