"""What a Dask worker has while a cohort is made: a child process, and reasons to take no part.

Whoever joins later gets the plugin, too, and nothing that a plugin does keeps it out. So the task
asks first, and the driver sends away who does not fit.
"""

import hashlib
import json
import platform
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distributed import Reschedule, get_worker
from distributed import Worker as DaskWorker
from distributed.diagnostics.plugin import WorkerPlugin

from qsm_deploy.kernels.errors import EngineError, QsmDeployError
from qsm_deploy.kernels.threads import workers as cores
from qsm_deploy.runtime.bids.layout import Recording
from qsm_deploy.runtime.cohort.cohort import Cohort
from qsm_deploy.runtime.cohort.worker import Worker
from qsm_deploy.runtime.console.peak_memory import rss_bytes
from qsm_deploy.runtime.console.provenance import NAME, version
from qsm_deploy.runtime.reconstruction.memory import available_bytes
from qsm_deploy.runtime.reconstructor import models_of

ENDS_S = 5.0  # that a killed child may take


class UnfitError(Exception):
    """A worker that takes no part: reason, exit code, its address and host."""

    def __init__(self, reason: str, exit_code: int, address: str, host: str) -> None:
        super().__init__(reason, exit_code, address, host)
        self.reason, self.exit_code, self.address, self.host = reason, exit_code, address, host


@dataclass(frozen=True)
class Alike:
    """What is the same on all computers that make a cohort.

    Attributes
    ----------
    version
        Of this program.
    sha256
        Of the models, and of what describes the dataset: another mount has another.
    """

    version: str
    sha256: Mapping[Path, str]

    def require(self) -> None:
        """Refuse a computer where it is not the same.

        Raises
        ------
        EngineError
            If something differs.
        """
        if self.version != version():
            raise EngineError(f"it has {NAME} {version()}, here is {self.version}")
        for path, expected in self.sha256.items():
            if (seen := sha256_of(path)) != expected:
                raise EngineError(
                    f"{path} is another file there (SHA-256 {seen[:12]}, here {expected[:12]})"
                )


def alike(cohort: Cohort) -> Alike:
    """Return what other computers must have as this one has it.

    Raises
    ------
    EngineError
        If a file cannot be read.
    """
    files = (*models_of(cohort.maker), cohort.dataset / "dataset_description.json")
    return Alike(version(), {path: sha256_of(path) for path in files})


def sha256_of(path: Path) -> str:
    """Return the digest of a file.

    Raises
    ------
    EngineError
        If it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EngineError(f"cannot read {path} ({error.strerror})") from error


class Workplace(WorkerPlugin):
    """A child process on a Dask worker that reconstructs one recording at a time.

    Parameters
    ----------
    name
        Of this run, other than that of any other.
    cohort
        What is asked of all; paths that mean the same everywhere.
    same
        What there must be.
    quiet
        Whether only warnings go to the worker's log.
    """

    def __init__(self, name: str, cohort: Cohort, same: Alike, *, quiet: bool) -> None:
        self.name, self._cohort, self._same, self._quiet = name, cohort, same, quiet

    def setup(self, worker: DaskWorker) -> None:
        """Begin; what takes time is left to the first task."""
        self._address = worker.address
        self._worker = Worker(fitted(self._cohort, worker), quiet=self._quiet)
        self._one_at_a_time = threading.Lock()
        self._ends = False
        self._facts: dict[str, Any] | None = None

    def teardown(self, worker: DaskWorker) -> None:
        """End the child at once."""
        self._ends = True
        self._worker.kill()
        if self._one_at_a_time.acquire(timeout=ENDS_S):
            self._worker.close()

    def facts(self) -> dict[str, Any]:
        """Return what all maps of this worker have alike.

        Raises
        ------
        UnfitError
            If it cannot make them, or would make them of something else.
        """
        with self._one_at_a_time:
            try:
                if self._facts is None:
                    self._same.require()
                    self._facts = asdict(self._worker.open())
            except QsmDeployError as error:
                raise self._unfit(str(error), error.exit_code) from error
            except (OSError, ValueError) as error:  # of a child that is none
                reason = f"{type(error).__name__}: {error}"
                raise self._unfit(reason, EngineError.exit_code) from error
            return self._facts

    def outcome(
        self, recording: Recording, wanted: dict[str, Any], *, wait: bool
    ) -> dict[str, Any]:
        """Reconstruct a recording.

        Raises
        ------
        UnfitError
            If the maps of this worker are not as wanted.
        Reschedule
            If the worker is told to end meanwhile, which the recording is not to be blamed for.
        """
        if (facts := self.facts()) != wanted:
            ours, theirs = facts["wanted"], wanted["wanted"]
            differs = [name for name in ours if ours[name] != theirs.get(name)]
            said = [f"{k} {ours[k] or 'none'}, not {theirs.get(k) or 'none'}" for k in differs]
            reason = f"its maps have {', '.join(said) or facts['gives']}"
            raise self._unfit(reason, EngineError.exit_code)
        with self._one_at_a_time:
            outcome = asdict(self._worker.outcome(recording, wait=wait))
        if self._ends:
            raise Reschedule
        return outcome

    def _unfit(self, reason: str, exit_code: int) -> UnfitError:
        return UnfitError(reason, exit_code, self._address, platform.node())


def fitted(cohort: Cohort, worker: DaskWorker) -> Cohort:
    """Return a cohort that takes the threads and the memory that are a Dask worker's.

    The child is no part of what Dask limits and counts, so it gets the limit as its own.
    """
    limit = worker.memory_manager.memory_limit
    memory = min(limit - rss_bytes(), int(available_bytes())) if limit else None
    return cohort.sharing(min(cores(), worker.state.nthreads), memory)


def answer(
    place: str, recording: Recording | None, wanted: dict[str, Any] | None, wait: bool
) -> str:
    """Reconstruct a recording on the worker that this runs on, or say what its maps are.

    Parameters
    ----------
    place
        The name of the run.
    recording
        Which one; none without ``wanted``.
    wanted
        The facts of all maps, if they are known.
    wait
        Whether to wait while another process is at it.

    Returns
    -------
    str
        An outcome, or the facts, in JSON.

    Raises
    ------
    UnfitError
        If nothing is to be reconstructed here.
    """
    worker = get_worker()
    plugin = worker.plugins.get(place)
    if not isinstance(plugin, Workplace):
        reason = "nothing could be set up there; its log says why"
        raise UnfitError(reason, EngineError.exit_code, worker.address, platform.node())
    if wanted is None or recording is None:
        return json.dumps(plugin.facts())
    return json.dumps(plugin.outcome(recording, wanted, wait=wait))
