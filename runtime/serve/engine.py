"""The network behind the server: opened once, warmed up, one volume at a time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.reconstruction.memory import Workload, available_bytes
from qsm_deploy.runtime.reconstruction.patches import plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.reconstruction.planning import PatchOptions, decide
from qsm_deploy.runtime.run.job import prepared
from qsm_deploy.runtime.run.report import patches_text
from qsm_deploy.runtime.scan.geometry_limits import deviations, require_geometry
from qsm_deploy.runtime.scan.resampling import resample_map
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import (
    Backend,
    Precision,
    Session,
    choose_backend,
    open_session,
)

Volume = NDArray[np.float32]

WARM_UP_VOXELS = 64  # at most, along each axis


@dataclass
class Engine:
    """A loaded network and the turn to use it.

    Attributes
    ----------
    session
        The network.
    resample
        Whether it is given the voxel size of its training.
    allow_geometry
        Whether it runs although voxel size or B0 direction are not those of the training.
    """

    session: Session
    resample: bool = False
    allow_geometry: bool = False
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """Network, precision and backend."""
        session = self.session
        return f"{session.card.network} {session.precision}, {session.backend} {session.version}"

    @property
    def busy(self) -> bool:
        """Whether another session has the turn."""
        return self._turn.locked()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the others, and keep them waiting."""
        with self._turn:
            yield

    def warm_up(self) -> None:
        """Reconstruct nothing once, so that the first scan does not wait for what is done once."""
        card = self.session.card
        edge = card.divisor * max(1, WARM_UP_VOXELS // card.divisor)
        shape = (edge, edge, edge)
        field = np.zeros((1, *shape), dtype=np.float32)
        mask = np.ones(shape, dtype=bool)
        scan = Scan(field, mask, Geometry(shape), nib.Nifti1Header(), np.eye(4))
        reconstruct(self.session, scan, plan_whole(shape, card.divisor), Stages())

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
        card = self.session.card
        measured, scan = prepared(card, measured, resample=self.resample)
        notes = [f"outside the training: {d}" for d in deviations(card.geometry, scan.geometry)]
        if not self.allow_geometry:
            require_geometry(card.geometry, scan.geometry)
        held = 0 if scan is measured else measured.nbytes
        workload = Workload(
            scan, card, self.session.backend, evaluates=False, draws=False, held_bytes=held
        )
        decision = decide(workload, PatchOptions(), available_bytes())
        if not decision.exact:
            notes.append(patches_text(card, decision.plan))
        chi = reconstruct(self.session, scan, decision.plan, stages)
        if scan is not measured:
            chi = resample_map(chi, measured.mask)
        return chi, notes


def open_engine(
    model: Path,
    backend: Backend | Literal["auto"] = "auto",
    *,
    precision: Precision = "fp32",
    threads: int = 0,
    resample: bool = False,
    allow_geometry: bool = False,
) -> Engine:
    """Load a network of one local field and warm it up.

    Raises
    ------
    UsageError
        If the network takes something else, or is one of two parts.
    QsmDeployError
        If it cannot be loaded or run.
    """
    chosen, _ = choose_backend(backend, precision)
    session = open_session(model, chosen, precision=precision, threads=threads)
    card = session.card
    takes = f"takes {card.task.split('->', maxsplit=1)[0]}"
    if card.task == "local_field->chi" and 1 not in card.field_counts:
        takes = f"takes {card.field_counts[0]} fields"
    elif card.pipeline == "after":
        takes = "is one of two parts"
    elif card.task == "local_field->chi":
        engine = Engine(session, resample, allow_geometry)
        engine.warm_up()
        return engine
    raise UsageError(f"{model}: {card.network} {takes}; the server needs a network of one field")
