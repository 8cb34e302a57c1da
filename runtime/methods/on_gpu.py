"""Total variation on a GPU, as an inversion."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.inversion.field_noise import noise_of_most
from qsm_deploy.kernels.inversion.total_variation import ITERATIONS
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu import open as gpu
from qsm_deploy.runtime.gpu.arrays import DeviceView
from qsm_deploy.runtime.gpu.reconstruction import DeviceJob, reconstruct_on_device
from qsm_deploy.runtime.gpu.run import Place
from qsm_deploy.runtime.gpu.session import SHARE_OF_FREE
from qsm_deploy.runtime.gpu.total_variation import VariationWorkload, variation_job
from qsm_deploy.runtime.methods.inversion import (
    MethodInversion,
    told_of_weights,
    weight_of_edges,
)
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.reconstruction.inversion import Done, Made, Needs, Task, Wants
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.scan.scan import Scan


def open_on_gpu(method: Method, number: int) -> "GpuVariation":
    """Return a method on a GPU.

    Raises
    ------
    UsageError
        If it does not run there, or not with what is said to it.
    EngineError
        If there is no GPU of that number, or the CUDA library is not built.
    MissingDependencyError
        If a library is not installed.
    """
    if method.name != "tv" or method.robust:
        what = f"{method.name} --robust" if method.robust else method.name
        raise UsageError(f"{what} runs on the CPU; drop --device cuda:{number}")
    return GpuVariation(method, gpu.open_place(number))


class GpuVariation(MethodInversion):
    """Total variation on a GPU; all calls must come from the thread that opened it.

    The noise of the field and the support are found on the host.
    """

    judges_field = True

    def __init__(self, method: Method, place: Place) -> None:
        super().__init__(method)
        self.place, self._version = place, place.library.versions()["cufft"]

    @property
    def name(self) -> str:
        """The method, and what computes its transforms."""
        return f"{self.method.name} ({self.method.row.title}), cuFFT {self._version}"

    @property
    def needs(self) -> Needs:
        """Local fields on any grid, whose voxels it trusts alike."""
        return replace(super().needs, takes_noise=False)

    def facts(self) -> dict[str, Any]:
        """Return what the report says of it."""
        device = f"cuda:{self.place.device.number} ({self.place.device.name})"
        backend = {"name": "cufft", "version": self._version, "device": device}
        return super().facts() | {"backend": backend}

    def limit_bytes(self) -> float:
        """Return what a run may take of the GPU's memory."""
        return SHARE_OF_FREE * self.place.device.free_bytes()

    def task(self, scan: Scan, measured: Scan, wants: Wants, limit_bytes: float) -> Task:
        """Return how a scan would be run: the whole volume, or a refusal."""
        for flag, volume in (("--magnitude", scan.magnitude), ("--noise-map", scan.noise_ppm)):
            if volume is not None:
                raise UsageError(
                    f"{flag}: on a GPU {self.method.name} trusts all voxels alike; drop it, or "
                    "pass --device cpu"
                )
        task = super().task(scan, measured, wants, limit_bytes)
        return replace(task, demand=self._work(scan, wants))

    def stage_bytes(self, scan: Scan, whole: PatchPlan, wants: Wants) -> Mapping[str, float]:
        """Return the memory of every stage on the GPU [bytes]."""
        return self._work(scan, wants).allocated_bytes(whole)

    def make(self, task: Task, stages: Stages, done: Done) -> Made:
        """Return the map, what was found, and the field residual where it was asked for."""
        with stages("noise"):
            job, told = self.job(task)
        chi, found = reconstruct_on_device(job, stages, done)
        residual = {name: found.pop(name) for name in {"field_residual"} & found.keys()}
        made = self.made(task.scan, chi, told | found)
        made.findings |= residual
        return made

    def job(self, task: Task, field: DeviceView | None = None) -> tuple[DeviceJob, dict[str, Any]]:
        """Return what runs on the GPU, and what decided it: the noise of the scan's field.

        Parameters
        ----------
        task
            As :meth:`task` returned it.
        field
            The field where it lies on the GPU too.
        """
        assert isinstance(task.demand, VariationWorkload)
        scan = task.scan
        sigma = scan.spectrum_noise_ppm
        usual = noise_of_most(scan.measured[0], scan.mask, sigma)
        alpha = weight_of_edges(self.method, sigma, scan.geometry)
        work = replace(task.demand, field=field)
        job = variation_job(self.place, work, alpha_ppm_mm=alpha, sigma_ppm=usual)
        return job, told_of_weights(alpha, sigma, None, scan.geometry)

    def _work(self, scan: Scan, wants: Wants) -> VariationWorkload:
        return VariationWorkload(
            scan,
            self.place.library,
            evaluates=wants.evaluates,
            iterations=self.method.iterations or ITERATIONS,
        )
