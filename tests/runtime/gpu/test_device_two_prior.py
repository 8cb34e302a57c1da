"""Two-prior projection on a made-up GPU that runs work late, against that on the CPU."""

from dataclasses import replace

import numpy as np
import pytest

from qsm_deploy.kernels.errors import EngineError, MemoryLimitError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.gpu.two_prior import TwoPriorOnGpu
from qsm_deploy.runtime.local_field.background.removal import Task, padded
from qsm_deploy.runtime.local_field.background.two_prior import TwoPrior

GRID = Geometry((12, 9, 10), (2.5, 3.0, 4.0), (0.1, -0.2, 0.97))
METHOD = TwoPrior(around_mm=6.0, iterations=20)


def task_of(box, done=lambda: None):
    random = np.random.default_rng(3)
    mask = np.zeros(GRID.shape, bool)
    mask[box] = random.random(mask[box].shape) < 0.9
    trusted = mask & (random.random(mask.shape) < 0.95)
    field = (0.1 * random.standard_normal(GRID.shape)).astype(np.float32)
    return Task(field, mask, trusted, GRID, done)


BOX = (slice(2, -3),) * 3


# between the beginning and the end, steps on a field of noise multiply what is rounded
@pytest.mark.parametrize(("iterations", "noise_ppm"), [(1, 0.002), (10, 0.002), (60, 0.2)])
@pytest.mark.parametrize("box", [BOX, (slice(None),) * 3, (..., slice(2, 3))])
def test_it_does_as_the_cpu_does(place, fake_device, box, iterations, noise_ppm):
    steps, method = [], replace(METHOD, iterations=iterations, noise_ppm=noise_ppm)
    task = task_of(box, lambda: steps.append(1))
    remove = TwoPriorOnGpu(place, method)
    local, mask = remove(task)
    assert len(steps) == remove.steps == iterations
    expected, same = method(task_of(box))
    np.testing.assert_array_equal(mask, same)
    assert np.linalg.norm(expected - task.field_ppm * mask) > 0.02 * np.linalg.norm(expected)
    assert np.linalg.norm(local - expected) <= 1e-4 * np.linalg.norm(expected)
    assert fake_device.most_waiting > 8 * iterations  # all before any was waited for


def test_memory_is_what_was_predicted(place, fake_device):
    task, remove = task_of(BOX), TwoPriorOnGpu(place, METHOD)
    remove(task)
    needed = remove.layout(padded(task, remove)).total
    assert fake_device.peak_bytes == needed
    fake_device.capacity = needed - 1
    with pytest.raises(MemoryLimitError):
        remove(task)


@pytest.mark.parametrize("name", ["dipole_apply", "patch_finish", "combine", "dot"])
def test_a_kernel_that_fails_leaves_nothing_behind(place, name, monkeypatch):
    def refuse(*_, **__):
        raise EngineError("the GPU refuses")

    monkeypatch.setattr(place.library, name, refuse, raising=False)
    with pytest.raises(EngineError, match="the GPU refuses"):
        TwoPriorOnGpu(place, METHOD)(task_of(BOX))
