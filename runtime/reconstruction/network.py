"""A network in a session, as an inversion."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.kernels.threads import using_threads, workers
from qsm_deploy.runtime.card.card import UNROLLED, ModelCard
from qsm_deploy.runtime.console.peak_memory import rss_bytes
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.time_limit import LONGEST_S
from qsm_deploy.runtime.reconstruction.inversion import (
    CPU,
    Done,
    Made,
    Needs,
    Task,
    Wants,
    needs_of,
)
from qsm_deploy.runtime.reconstruction.memory import Workload, available_bytes, bounded_bytes
from qsm_deploy.runtime.reconstruction.pipeline import network_outputs, require_field_count
from qsm_deploy.runtime.reconstruction.planning import Demand, as_told, decide, patches_text
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Session

REFERENCE = "openvino"  # what a lower precision is compared in
S = TypeVar("S", bound=Session)


class Network(ABC, Generic[S]):
    """A network in a session, wherever that runs.

    Parameters
    ----------
    session
        What runs it.
    model
        Its file.
    device
        Where.
    threads
        Of the CPU, 0 for all.
    stays
        Whether it serves further scans; else its memory is free when a map is made.
    """

    def __init__(
        self, session: S, model: Path, *, device: str = CPU, threads: int = 0, stays: bool = True
    ) -> None:
        self.card, self.model, self.stays = session.card, model, stays
        self.backend, self.version = session.backend, session.version
        self.precision, self.device, self.threads = session.precision, device, threads
        self._session: S | None = session

    @property
    def session(self) -> S:
        """What runs it, as long as it is there."""
        assert self._session is not None, "it was opened for one map"
        return self._session

    def used(self) -> None:
        """Give up the session, unless it stays."""
        if not self.stays:
            self._session = None

    @property
    def name(self) -> str:
        """Network, precision and library."""
        return f"{self.card.network} {self.precision}, {self.backend} {self.version}"

    @property
    def needs(self) -> Needs:
        """What its card says."""
        return needs_of(self.card)

    def facts(self) -> dict[str, Any]:
        """Return what the report says of it."""
        card = self.card
        return {
            "model": {
                "file": self.model.name,
                "network": card.network,
                "options": card.options,
                "precision": self.precision,
                "weights_sha256": card.weights_sha256,
                "receptive_field": asdict(card.receptive_field),
                "verified": asdict(card.verified),
                "doi": card.doi,
            },
            "backend": {
                "name": self.backend,
                "version": self.version,
                "device": self.device,
                "threads": self.threads or None,
            },
        }

    def require_fields(self, count: int) -> None:
        """Check that it takes so many fields."""
        require_field_count(self.card, count)

    @abstractmethod
    def limit_bytes(self) -> float:
        """Return the memory that it may take, where it runs."""

    @abstractmethod
    def task(self, scan: Scan, measured: Scan, wants: Wants, limit_bytes: float) -> Task:
        """Return how a scan would be run."""

    @abstractmethod
    def make(self, task: Task, stages: Stages, done: Done) -> Made:
        """Return the map, finite or not."""


class CpuNetwork(Network[Session]):
    """A network in a session of the CPU.

    ``baseline_bytes`` is the resident memory before it was opened: what was taken since then is
    the network's to use.
    """

    def __init__(
        self,
        session: Session,
        model: Path,
        *,
        threads: int = 0,
        stays: bool = True,
        baseline_bytes: int | None = None,
        time_limit: float = LONGEST_S,
    ) -> None:
        super().__init__(session, model, threads=threads, stays=stays)
        self._time_limit = time_limit
        self._baseline = rss_bytes() if baseline_bytes is None else baseline_bytes

    def limit_bytes(self) -> float:
        """Return what the machine has left, with what was taken since before it was opened."""
        return available_bytes() + self._taken()

    def _taken(self) -> int:
        return max(0, rss_bytes() - self._baseline)

    def task(self, scan: Scan, measured: Scan, wants: Wants, limit_bytes: float) -> Task:
        """Return how a scan would be run."""
        limit_bytes = min(limit_bytes, bounded_bytes() + self._taken())
        work = Workload(
            scan,
            self.card,
            self.backend,
            evaluates=wants.evaluates,
            draws=wants.draws,
            compares_precision=self._compares_precision,
            correction=wants.correction,
            keeps_session=self.stays,
            measured=None if scan is measured else measured,
        )
        return network_task(scan, work, wants, limit_bytes)

    @property
    def _compares_precision(self) -> bool:
        """Whether the precision is the backend's; that of a file in INT8 was judged at export."""
        return self.precision == "bf16"

    def make(self, task: Task, stages: Stages, done: Done) -> Made:
        """Return the map, and how far a lower precision is from FP32 on a sample."""
        with using_threads(self.threads or workers()):
            maps = network_outputs(self.session, task.scan, task.decision.plan, stages, done)
            made = Made(maps[0], further=dict(zip(self.needs.gives[1:], maps[1:], strict=True)))
            if self._compares_precision:
                from qsm_deploy.runtime.reconstruction.precision_check import precision_error

                with stages("precision check"):
                    reference = open_session(
                        self.model, REFERENCE, threads=self.threads, time_limit=self._time_limit
                    )
                    error = precision_error(self.session, reference, task.scan)
                made.findings["precision_error"] = error
        self.used()
        return made


def network_task(scan: Scan, demand: Demand, wants: Wants, limit_bytes: float) -> Task:
    """Return how a network would run a scan."""
    card = demand.card
    if scan.magnitude is not None or scan.noise_ppm is not None:
        raise UsageError(
            f"--magnitude and --noise-map are for methods, {card.network} takes none; drop them, "
            "or pass --method tv"
        )
    if wants.layout is None:
        decision = decide(demand, wants.patches, limit_bytes)
    else:
        decision = as_told(demand, wants.layout)
    notes = () if decision.exact else (patches_text(card, decision.plan),)
    echoes = len(scan.measured) if card.inputs[0].name == "phase_rad" else 1
    runs = decision.plan.count * rounds(card) * echoes
    if card.priors:
        from qsm_deploy.runtime.reconstruction.prior_maps import variation_steps

        runs += variation_steps(card.priors)
    return Task(scan, demand, decision, runs, notes)


def rounds(card: ModelCard) -> int:
    """Return how often a network runs in one reconstruction."""
    return int(card.constants["iterations"]) if card.pipeline in UNROLLED else 1
