"""The reconstructor behind the server: opened once, warmed up, one volume at a time."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, Reconstructor, open_reconstructor
from qsm_deploy.runtime.scan.scan import Scan

WARM_UP_VOXELS, FLAT_PPM = 64, 1e-3  # along each axis, and the field
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
    """

    def __init__(
        self,
        reconstructor: Reconstructor,
        wants: Wants | None = None,
        worker: ThreadPoolExecutor | None = None,
    ) -> None:
        self.reconstructor, self.wants = reconstructor, wants or Wants()
        self._worker = worker or ThreadPoolExecutor(ONE)
        self._turn = threading.Lock()

    @property
    def name(self) -> str:
        """Method, precision, and what runs it."""
        return self.reconstructor.inversion.name

    @property
    def busy(self) -> bool:
        """Whether another session has the turn."""
        return self._turn.locked()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the others, and keep them waiting."""
        with self._turn:
            yield

    def warm_up(self, voxels: int = WARM_UP_VOXELS) -> None:
        """Reconstruct a flat field, so that the first scan does not wait for what is done once."""
        trained = self.reconstructor.inversion.needs.geometry
        shape = (voxels,) * 3
        grid = Geometry(
            shape, trained.voxel_size_mm or (1, 1, 1), trained.b0_direction or (0, 0, 1)
        )
        field = np.full((1, *shape), FLAT_PPM, dtype=np.float32)
        mask = np.ones(shape, dtype=bool)
        self.chi_ppm(Scan(field, mask, grid, nib.Nifti1Header(), np.eye(4)), Stages())

    def chi_ppm(self, measured: Scan, stages: Stages) -> tuple[Volume, list[str]]:
        """Return the (x, y, z) susceptibility [ppm] and what the host should know about it.

        Raises
        ------
        GeometryError
            If the network was not trained for the grid.
        MemoryLimitError
            If it does not fit the memory.
        EngineError
            If the backend fails, or the result is not finite.
        """
        return self._worker.submit(self._chi_ppm, measured, stages).result()

    def _chi_ppm(self, measured: Scan, stages: Stages) -> tuple[Volume, list[str]]:
        planned = self.reconstructor.plan(measured, self.wants)
        made = self.reconstructor.run(planned, stages)
        known = len(measured.notes)
        return made.chi_ppm, [*planned.notes[known:], *planned.task.notes]


def open_taking_turns(
    model: Path,
    host: Host | None = None,
    wants: Wants | None = None,
    *,
    warm_up_voxels: int = WARM_UP_VOXELS,
) -> TakingTurns:
    """Load a network of one local field and warm it up.

    Raises
    ------
    UsageError
        If the network takes something else, or is one of two parts.
    QsmDeployError
        If it cannot be loaded or run.
    """
    worker = ThreadPoolExecutor(ONE)
    reconstructor = worker.submit(open_reconstructor, [model], host or Host()).result()
    needs = reconstructor.inversion.needs
    takes = "phase" if needs.quantity == "phase_rad" else f"{needs.field_counts[0]} fields"
    if needs.quantity == "phase_rad" or 1 not in needs.field_counts:
        raise UsageError(
            f"{model}: {reconstructor.inversion.name} takes {takes}; the server needs a network "
            "of one field"
        )
    opened = TakingTurns(reconstructor, wants, worker)
    opened.warm_up(warm_up_voxels)
    return opened
