"""Runs the pipeline once: everything is allocated, or nothing, and all of it is given back."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np

from qsm_deploy.kernels.errors import EngineError, MemoryLimitError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.arrays import DeviceVolume
from qsm_deploy.runtime.gpu.device import holding
from qsm_deploy.runtime.gpu.layout import DeviceWorkload
from qsm_deploy.runtime.gpu.pipeline import DevicePipeline, Gpu
from qsm_deploy.runtime.reconstruction.inversion import not_finite, require_finite
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.reconstruction.pipeline import require_field_count


def reconstruct_on_device(
    gpu: Gpu,
    work: DeviceWorkload,
    plan: PatchPlan,
    stages: Stages,
    done: Callable[[], object] = lambda: None,
) -> tuple[Volume, dict[str, Any]]:
    """Return the susceptibility map of one acquisition, made on a GPU.

    Parameters
    ----------
    gpu
        Where.
    work
        The acquisition, on a geometry the network may be used for, and what follows the network.
    plan
        Whole volume or patches, made for the scan's mask.
    stages
        Takes the time of every stage, as the GPU measured it.
    done
        Called after each patch.

    Returns
    -------
    (x, y, z) float32 array
        Susceptibility [ppm], 0 outside the mask.
    dict
        ``field_residual`` if it was asked for, ``data_consistency`` if that was.

    Raises
    ------
    UsageError
        If the network takes more or fewer fields than the scan has.
    MemoryLimitError
        If the GPU has less memory than was planned for; everything is given back.
    EngineError
        If the engine or the GPU fails, or the result is not finite.
    """
    with _prepared(gpu, work, plan) as (pipeline, _):
        findings = pipeline.run(done)
        chi = pipeline.download()
        gpu.device.synchronize()
        pipeline.times(stages)
    require_finite(chi)
    return chi, findings


def reconstruct_to_device(
    gpu: Gpu, work: DeviceWorkload, plan: PatchPlan, stages: Stages
) -> tuple[DeviceVolume, dict[str, Any]]:
    """Do as :func:`reconstruct_on_device`, and leave the map on the GPU."""
    with _prepared(gpu, work, plan) as (pipeline, chi):
        findings = pipeline.run(lambda: None)
        finite = np.isfinite(pipeline.squared_norm("chi"))
        gpu.device.synchronize()
        pipeline.times(stages)
        if not finite:
            raise not_finite(None)
        return chi.handed_out(), findings


class _Map:
    """The memory of the map: freed with everything else, unless it was handed out."""

    def __init__(self, gpu: Gpu, work: DeviceWorkload) -> None:
        self._gpu, self._shape = gpu, work.scan.mask.shape
        self.pointer: int | None = gpu.device.allocate(work.map_bytes)

    def handed_out(self) -> DeviceVolume:
        assert self.pointer is not None
        device, pointer = self._gpu.device, self.pointer
        self.pointer = None
        return DeviceVolume(pointer, self._shape, device.number, device.release)

    def __enter__(self) -> "_Map":
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self.pointer is not None:
            with suppress(EngineError) if failed else nullcontext():  # the first failure is told
                self._gpu.device.release(self.pointer)


@contextmanager
def _prepared(
    gpu: Gpu, work: DeviceWorkload, plan: PatchPlan
) -> Iterator[tuple[DevicePipeline, _Map]]:
    """Allocate everything, or nothing; free it in the end."""
    require_field_count(work.card, len(work.scan.measured))
    with ExitStack() as stack:
        try:
            chi = stack.enter_context(_Map(gpu, work))
            holdings = stack.enter_context(holding(gpu.device))
            assert chi.pointer is not None
            pipeline = DevicePipeline(gpu, work, plan, holdings, chi.pointer)
        except MemoryLimitError as error:
            stack.close()
            raise _too_little(gpu, work, plan, error) from error
        yield pipeline, chi


def _too_little(
    gpu: Gpu, work: DeviceWorkload, plan: PatchPlan, error: MemoryLimitError
) -> MemoryLimitError:
    needed = max(work.peak_bytes(plan).values()) - work.session.weights_bytes
    free = memory_text(gpu.device.free_bytes())
    return MemoryLimitError(
        f"{gpu.device.name} has no {memory_text(needed)} left for this run ({error}); it has "
        f"{free} free: pass --memory-limit {free.replace(' ', '')} or smaller patches"
    )
