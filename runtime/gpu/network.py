"""A network on a GPU, as an inversion."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from qsm_deploy.kernels.errors import EngineError, UnservedShapeError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.arrays import DeviceView
from qsm_deploy.runtime.gpu.layout import DeviceWorkload
from qsm_deploy.runtime.gpu.pipeline import Gpu
from qsm_deploy.runtime.gpu.reconstruction import DeviceJob, network_job, reconstruct_on_device
from qsm_deploy.runtime.gpu.session import GpuSession
from qsm_deploy.runtime.reconstruction.inversion import Done, Made, Task, Wants
from qsm_deploy.runtime.reconstruction.network import Network, network_task
from qsm_deploy.runtime.reconstruction.pipeline import network_outputs
from qsm_deploy.runtime.reconstruction.prior_maps import variation_steps
from qsm_deploy.runtime.scan.scan import Scan


class GpuNetwork(Network[GpuSession]):
    """An engine on a GPU; all calls must come from the thread that opened it.

    Most networks go from field to map there. Those whose loop or whose grid is the host's business
    are called by it, patch by patch; those in tiles or of several outputs are an ``EngineError``.
    """

    def __init__(self, session: GpuSession, model: Path, *, stays: bool = True) -> None:
        require_known(session.card)
        super().__init__(session, model, device=session.device, stays=stays)

    def limit_bytes(self) -> float:
        """Return what a run may take of the GPU's memory, the engine included."""
        return self.session.limit_bytes()

    def task(self, scan: Scan, measured: Scan, wants: Wants, limit_bytes: float) -> Task:
        """Return how a scan would be run; what follows the network is done on the GPU too.

        Unless the map is compared on another grid, or not with a field. An engine that serves no
        shape that would do is built again for the one that is needed.
        """
        try:
            return self._task(scan, measured, wants, limit_bytes)
        except UnservedShapeError as error:
            if not self.session.serve(error):
                raise
        return self._task(scan, measured, wants, limit_bytes)

    def _task(self, scan: Scan, measured: Scan, wants: Wants, limit_bytes: float) -> Task:
        if scan is not measured or self.card.task != "local_field->chi":
            demand = self.session.workload(scan)
        else:
            demand = self.session.workload(scan, wants.correction, evaluates=wants.evaluates)
        return network_task(scan, demand, wants, limit_bytes)

    def make(self, task: Task, stages: Stages, done: Done) -> Made:
        """Return the map, and the field residual and data consistency where they were asked for."""
        if isinstance(task.demand, DeviceWorkload):
            job, _ = self.job(task)
            made = Made(*reconstruct_on_device(job, stages, done))
        else:
            plan = task.decision.plan
            made = Made(network_outputs(self.session, task.scan, plan, stages, done)[0])
        self.used()
        return made

    @property
    def judges_field(self) -> bool:
        """Whether the host needs the field itself, for its noise."""
        card = self.card
        is_told = "field_noise_ppm" in (tensor.name for tensor in card.inputs)
        return is_told or variation_steps(card.priors) > 0

    @property
    def place(self) -> Gpu:
        """Where it runs."""
        return self.session.gpu

    def job(self, task: Task, field: DeviceView | None = None) -> tuple[DeviceJob, dict[str, Any]]:
        """Return what runs on the GPU all the way, and nothing that was found before."""
        assert isinstance(task.demand, DeviceWorkload)
        work = replace(task.demand, field=field)
        return network_job(self.place, work, task.decision.plan), {}


def require_known(card: ModelCard) -> None:
    """Check that what a network needs besides its engine is there on a GPU.

    Raises
    ------
    EngineError
        If not.
    """
    lacking = {
        "runs in tiles of its own": card.tiles is not None,
        f"gives {len(card.outputs)} maps": bool(card.further_outputs),
        f"is a part of {card.pipeline}": card.pipeline == "nextqsm",
    }
    if found := [what for what, needed in lacking.items() if needed]:
        raise EngineError(
            f"{card.network} {' and '.join(found)}, which is not done on a GPU; run it with "
            "--device cpu: a plan has its graph inside"
        )
