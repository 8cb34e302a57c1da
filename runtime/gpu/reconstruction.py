"""Runs the pipeline once: everything is allocated, or nothing, and all of it is given back."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import EngineError, MemoryLimitError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.arrays import DeviceVolume
from qsm_deploy.runtime.gpu.device import Device, Holdings, holding, send
from qsm_deploy.runtime.gpu.layout import DeviceWork, DeviceWorkload
from qsm_deploy.runtime.gpu.pipeline import DevicePipeline, Gpu
from qsm_deploy.runtime.gpu.run import DeviceRun
from qsm_deploy.runtime.reconstruction.inversion import not_finite, require_finite
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.pipeline import require_field_count


@dataclass(frozen=True)
class DeviceJob:
    """What is run on a GPU, and what begins it: given what holds memory, and the map's pointer."""

    device: Device
    work: DeviceWork
    plan: PatchPlan
    begin: Callable[[Holdings, int], DeviceRun]


def network_job(gpu: Gpu, work: DeviceWorkload, plan: PatchPlan) -> DeviceJob:
    """Return what runs a network.

    Parameters
    ----------
    gpu
        Where.
    work
        The acquisition, on a geometry the network may be used for, and what follows the network.
    plan
        Whole volume or patches, made for the scan's mask.

    Raises
    ------
    UsageError
        If the network takes more or fewer fields than the scan has.
    """
    require_field_count(work.card, len(work.scan.measured))
    return DeviceJob(gpu.device, work, plan, partial(DevicePipeline, gpu, work, plan))


def reconstruct_on_device(
    job: DeviceJob, stages: Stages, done: Callable[[], object] = lambda: None
) -> tuple[Volume, dict[str, Any]]:
    """Return the susceptibility map of one acquisition, made on a GPU.

    Parameters
    ----------
    job
        What is run there.
    stages
        Takes the time of every stage, as the GPU measured it.
    done
        Called after each patch or iteration.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], 0 outside the mask.
    dict
        What was found, as ``field_residual`` if it was asked for.

    Raises
    ------
    MemoryLimitError
        If the GPU has less memory than was planned for; everything is given back.
    EngineError
        If the engine or the GPU fails, or the result is not finite.
    """
    with _prepared(job) as (run, _):
        findings = run.run(done)
        chi = run.download()
        job.device.synchronize()
        run.times(stages)
    require_finite(chi)
    return chi, findings


def reconstruct_to_device(job: DeviceJob, stages: Stages) -> tuple[DeviceVolume, dict[str, Any]]:
    """Do as :func:`reconstruct_on_device`, and leave the map on the GPU."""
    with _prepared(job) as (run, chi):
        findings = run.run(lambda: None)
        finite = np.isfinite(run.squared_norm("chi"))
        job.device.synchronize()
        run.times(stages)
        if not finite:
            raise not_finite(None)
        return chi.handed_out(), findings


def on_device(chi_ppm: Volume, device: Device) -> DeviceVolume:
    """Return a map that was made on the host, on a GPU.

    Raises
    ------
    MemoryLimitError
        If it does not fit.
    """
    with ExitStack() as stack:
        pointer = device.allocate(chi_ppm.nbytes)
        stack.callback(device.release, pointer)
        with holding(device) as holdings:
            staged = send(device, pointer, chi_ppm, holdings.stream())  # kept until it is there
        del staged
        stack.pop_all()
    return DeviceVolume(pointer, chi_ppm.shape, device.number, device.release)


class _Map:
    """The memory of the map: freed with everything else, unless it was handed out."""

    def __init__(self, job: DeviceJob) -> None:
        self._device, self._shape = job.device, job.work.scan.mask.shape
        self.pointer: int | None = job.device.allocate(job.work.map_bytes)

    def handed_out(self) -> DeviceVolume:
        assert self.pointer is not None
        device, pointer = self._device, self.pointer
        self.pointer = None
        return DeviceVolume(pointer, self._shape, device.number, device.release)

    def __enter__(self) -> "_Map":
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self.pointer is not None:
            with suppress(EngineError) if failed else nullcontext():  # the first failure is told
                self._device.release(self.pointer)


@contextmanager
def _prepared(job: DeviceJob) -> Iterator[tuple[DeviceRun, _Map]]:
    """Allocate everything, or nothing; free it in the end."""
    with ExitStack() as stack:
        try:
            chi = stack.enter_context(_Map(job))
            holdings = stack.enter_context(holding(job.device))
            assert chi.pointer is not None
            run = job.begin(holdings, chi.pointer)
        except MemoryLimitError as error:
            stack.close()
            raise _too_little(job, error) from error
        yield run, chi


def _too_little(job: DeviceJob, error: MemoryLimitError) -> MemoryLimitError:
    needed = max(job.work.allocated_bytes(job.plan).values())
    free = memory_text(job.device.free_bytes())
    return MemoryLimitError(
        f"{job.device.name} has no {memory_text(needed)} left for this run ({error}); it has "
        f"{free} free: {job.work.advice(free.replace(' ', ''))}"
    )
