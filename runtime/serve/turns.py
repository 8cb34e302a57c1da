"""The reconstructors behind the server: opened once, warmed up, one volume at a time."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import nibabel as nib
import numpy as np

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.job.request import maker_from
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.reconstruction.inversion import CHI, Made, Needs, Wants
from qsm_deploy.runtime.reconstructor import Host, Maker, Reconstructor, open_reconstructor
from qsm_deploy.runtime.scan.scan import Scan

WARM_UP_VOXELS = 64  # along each axis
ONE = 1  # thread, since a GPU belongs to the one that opened it


class TakingTurns:
    """A reconstructor and the turn to use it; whoever has the turn, one thread computes.

    Parameters
    ----------
    reconstructor
        Of one local field.
    wants
        What is asked of every reconstruction.
    worker
        The thread that opened it, of a pool of one.
    maker, host
        What it was opened of, and where.
    """

    def __init__(
        self,
        reconstructor: Reconstructor,
        wants: Wants | None = None,
        worker: ThreadPoolExecutor | None = None,
        maker: Maker = (),
        host: Host | None = None,
    ) -> None:
        self.reconstructor, self.wants = reconstructor, wants or Wants()
        self._worker = worker or ThreadPoolExecutor(ONE)
        self._maker, self._host = maker, host or Host()
        self._turn = threading.Lock()
        self._named: dict[str, TakingTurns] = {}

    @property
    def name(self) -> str:
        """Method, precision, and what runs it."""
        return self.reconstructor.inversion.name

    @property
    def needs(self) -> Needs:
        """What it takes."""
        return self.reconstructor.needs

    @property
    def busy(self) -> bool:
        """Whether another session has the turn."""
        return self._turn.locked()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the others, and keep them waiting."""
        with self._turn:
            yield

    def named(self, method: str | None) -> "TakingTurns":
        """Return what a session asks for, which takes its turn with the others.

        It is opened when it is first asked for, and stays. Of what the server was started with,
        the memory limit is for all; the rest is for what it was started with.

        Parameters
        ----------
        method
            A method or the bundled network; ``None`` is what the server was started with.

        Raises
        ------
        QsmDeployError
            If it cannot be opened.
        """
        if method is None or (maker := maker_from((), method=method)) == self._maker:
            return self
        with self.turn():
            if method not in self._named:
                host = Host() if isinstance(maker, Method) else self._host
                opened = self._worker.submit(open_reconstructor, maker, host).result()
                wants = Wants(memory_limit=self.wants.memory_limit)
                other = TakingTurns(opened, wants, self._worker, maker, host)
                other._turn = self._turn
                self._named[method] = other
            return self._named[method]

    def warm_up(self, voxels: int = WARM_UP_VOXELS) -> None:
        """Reconstruct a point's field, so that the first scan waits for nothing done once."""
        needs, shape = self.needs, (voxels,) * 3
        grid = Geometry(
            shape,
            needs.geometry.voxel_size_mm or (1, 1, 1),
            needs.geometry.b0_direction or (0, 0, 1),
        )
        point = np.zeros(shape, dtype=np.float32)
        point[(voxels // 2,) * 3] = 1
        field, mask = dipole_convolve(point, grid), np.ones(shape, dtype=bool)
        magnitude = np.abs(field) if needs.magnitude else None
        head = nib.Nifti1Header(), np.eye(4)
        self.make(Scan(field[None], mask, grid, *head, magnitude=magnitude), Stages())

    def make(self, measured: Scan, stages: Stages) -> Made:
        """Return the map, and in its ``notes`` what the host should know about it.

        Raises
        ------
        GeometryError
            If the network was not trained for the grid.
        MemoryLimitError
            If it does not fit the memory.
        EngineError
            If the backend fails, or the result is not finite.
        """
        return self._worker.submit(self._make, measured, stages).result()

    def _make(self, measured: Scan, stages: Stages) -> Made:
        planned = self.reconstructor.plan(measured, self.wants)
        before = [*planned.notes[len(measured.notes) :], *planned.task.notes]
        made = self.reconstructor.run(planned, stages)
        made.findings["notes"] = before + made.findings.get("notes", [])
        return made


def open_taking_turns(
    maker: Maker,
    host: Host | None = None,
    wants: Wants | None = None,
    *,
    warm_up_voxels: int = WARM_UP_VOXELS,
) -> TakingTurns:
    """Load a network of one local field, or take a method, and warm it up.

    Raises
    ------
    UsageError
        If it takes something else, or is one of two parts.
    QsmDeployError
        If it cannot be loaded or run.
    """
    worker, host = ThreadPoolExecutor(ONE), host or Host()
    reconstructor = worker.submit(open_reconstructor, maker, host).result()
    needs = reconstructor.needs
    takes = [needs.quantity, *needs.maps]
    if needs.quantity == "local_field_ppm" and 1 not in needs.field_counts:
        takes = [f"{needs.field_counts[0]} fields"]
    if (takes, needs.gives) != (["local_field_ppm"], (CHI,)):
        raise UsageError(
            f"{reconstructor.inversion.name} takes {' and '.join(takes)} and gives "
            f"{' and '.join(needs.gives)}; the server needs a network of one local field to a map"
        )
    opened = TakingTurns(reconstructor, wants, worker, maker, host)
    opened.warm_up(warm_up_voxels)
    return opened
