"""One way from a scan to its map: open models once, plan, run.

Every command, the server and the Python interface call these; none wires the sequence itself.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qsm_deploy.kernels.errors import EngineError, QsmDeployError, UsageError
from qsm_deploy.kernels.geometry import Volume
from qsm_deploy.runtime.card.read import PLAN, graph_in, load_card
from qsm_deploy.runtime.console.peak_memory import rss_bytes
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.console.time_limit import LONGEST_S, MOST_S
from qsm_deploy.runtime.methods.method import DEFAULT, Method
from qsm_deploy.runtime.metrics.doubts import doubt_of_values
from qsm_deploy.runtime.reconstruction.inversion import (
    CHI,
    Done,
    Inversion,
    Made,
    Needs,
    Task,
    Wants,
    grid_facts,
    require_finite,
)
from qsm_deploy.runtime.reconstruction.preparation import Prepared, prepare
from qsm_deploy.runtime.scan.params import is_number
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.sessions.session import AUTO, Backend, Precision, Session

if TYPE_CHECKING:
    from qsm_deploy.runtime.reconstruction.network import Network

UNWEIGHED: dict[str, Any] = dict.fromkeys(("magnitude", "noise_ppm", "misfit"))
CUDA = re.compile(r"cuda:(\d+)")
# what makes a map: models, a method, or models and a method that takes the field that they give
Maker = Sequence[Path | Method] | Method


@dataclass(frozen=True)
class Host:
    """Where models are opened.

    Attributes
    ----------
    backend
        The library on the CPU; ``auto`` takes the fastest that is installed.
    device
        ``cpu``, ``cuda:N``, or ``auto``: the first GPU for a plan, where there is one, the CPU for
        an ONNX file.
    precision
        What the backend computes in; ``auto`` is FP32, and INT8 for a file in INT8 where its card
        and the CPU allow it.
    threads
        Of the CPU, 0 for all cores.
    plan_cache
        The folder for engines that had to be built again, ``auto`` for the user's, ``off`` for
        none.
    time_limit
        For opening a model on the CPU, and each time that it runs [s].
    """

    backend: Backend = AUTO
    device: str = AUTO
    precision: Precision = "auto"
    threads: int = 0
    plan_cache: str | os.PathLike[str] = AUTO
    time_limit: float = LONGEST_S

    def __post_init__(self) -> None:
        if not (is_number(self.time_limit) and 0 < self.time_limit < MOST_S):
            raise UsageError(f"time_limit {self.time_limit!r} is not a positive number of seconds")


@dataclass(frozen=True)
class Planned:
    """What will be done with a scan.

    Attributes
    ----------
    prepared
        The acquisition.
    task
        How the inversion runs it.
    wants
        What was asked for.
    limit_bytes
        The memory that it may take.
    before
        What makes the map that this one takes, of a chain.
    beside
        What a method at its end takes besides that map.
    """

    prepared: Prepared
    task: Task
    wants: Wants
    limit_bytes: float
    before: "Planned | None" = None
    beside: Mapping[str, Volume | None] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What the user should know before the map is made, a line each."""
        departures = self.prepared.departures
        own = [*self.task.scan.notes, *(f"outside the training: {d}" for d in departures)]
        return list(dict.fromkeys([*(self.before.notes if self.before else ()), *own]))


def models_of(maker: Maker) -> tuple[Path, ...]:
    """Return the models among what makes a map."""
    return () if isinstance(maker, Method) else tuple(m for m in maker if isinstance(m, Path))


class Reconstructor:
    """An inversion and what surrounds it.

    Parameters
    ----------
    inversion
        Makes the map.
    why_backend
        Why it runs where it does.
    missing_gpu
        What is missing where a plan runs on the CPU without anybody having said so.
    before
        What makes a map that it takes, the field or one beside it, of another quantity.
    """

    def __init__(
        self,
        inversion: Inversion,
        why_backend: str = "asked for",
        missing_gpu: str | None = None,
        before: "Reconstructor | None" = None,
    ) -> None:
        self.inversion, self.why_backend = inversion, why_backend
        self.missing_gpu, self.before = missing_gpu, before

    @property
    def needs(self) -> Needs:
        """What is taken of a scan, and given in the end."""
        own = self.inversion.needs
        if self.before is None:
            return own
        first = self.before.needs
        maps = tuple(name for name in (*first.maps, *own.maps) if name not in first.gives)
        return replace(first, maps=maps, gives=own.gives)

    def plan(self, measured: Scan, wants: Wants) -> Planned:
        """Return what will be done with a scan; nothing is computed but another grid's field.

        Parameters
        ----------
        measured
            One acquisition, in the quantity that the inversion needs.
        wants
            What is asked for.

        Raises
        ------
        UsageError
            If it has more or fewer fields than the network takes, is to be made consistent with no
            field, or the patch options contradict each other.
        DataError
            If nothing of the mask is left.
        GeometryError
            If the network was not trained for the grid, and none is made for it.
        MemoryLimitError
            If it does not fit the memory, not even in patches.
        """
        before, beside = None, dict[str, Any]()
        if self.before is not None:
            scan = replace(measured, **UNWEIGHED) if self._is_method else measured
            before = self.before.plan(scan, replace(wants, correction=None))
            unmade = np.broadcast_to(np.float32(0), before.prepared.measured.mask.shape)
            beside = {name: getattr(measured, name) for name in UNWEIGHED}
            measured = self._handed_on(before.prepared.measured, unmade, beside)
        self.inversion.require_fields(len(measured.measured))
        if wants.correction is not None:
            self._require_correctable()
            wants.correction.require(measured)
        planned = self.planned(prepare(self.inversion.needs, measured, wants), wants)
        if self.before is None or before is None:
            return planned
        first = {
            "model": self.before.inversion.facts()["model"],
            "geometry": grid_facts(before.prepared.scan.geometry),
            "grid": before.prepared.facts,
            "plan": before.task.decision.facts(),
        }
        first |= before.task.facts
        own = planned.task.facts
        if "first_part" in own:  # of an inversion of two parts
            first = own["first_part"] | {"first_part": first}
        decision, earlier = planned.task.decision, before.task.decision.stage_bytes
        stages = {f"{name} of the part before": size for name, size in earlier.items()}
        task = replace(
            planned.task,
            decision=replace(decision, stage_bytes=stages | dict(decision.stage_bytes)),
            runs=before.task.runs + planned.task.runs,
            notes=before.task.notes + planned.task.notes,
            facts=own | {"first_part": first},
        )
        return replace(planned, task=task, before=before, beside=beside)

    def first_weights(self) -> str | None:
        """Return precision and digest of the weights of what runs before, if something does."""
        first = (
            getattr(self.inversion, "first", None) if self.before is None else self.before.inversion
        )
        model = None if first is None else first.facts()["model"]
        return model and f"{model.get('precision')}, {model.get('weights_sha256')}"

    def _require_correctable(self) -> None:
        needs = self.inversion.needs
        if (needs.quantity, needs.gives) != ("local_field_ppm", (CHI,)):
            raise UsageError(
                "--data-consistency needs a local field and a map of it; "
                f"{needs.network} takes {needs.quantity} and gives {', '.join(needs.gives)}"
            )

    @property
    def _is_method(self) -> bool:
        return "method" in self.inversion.facts()["model"]

    def _handed_on(self, scan: Scan, made: Volume, beside: Mapping[str, Volume | None]) -> Scan:
        """Return the acquisition with what the part before made of it.

        ``beside`` is what a method weighs a field by; networks before it do not take it.
        """
        assert self.before is not None  # or nothing is handed on
        kept = beside if self._is_method else UNWEIGHED
        taken = {**kept, "chi_ppm": scan.chi_ppm, "r2prime_hz": scan.r2prime_hz}
        volumes: dict[str, Any] = {
            n: None if v is None else v * scan.mask for n, v in taken.items()
        }
        if self.before.needs.gives == (CHI,):
            return replace(scan, **volumes | {"chi_ppm": made})
        return replace(
            scan,
            measured=made[None],
            quantity="local_field_ppm",
            echo_weights=None,
            more_echo_times_s=(),
            **volumes,
        )

    def planned(self, prepared: Prepared, wants: Wants) -> Planned:
        """Return what will be done with a scan that is prepared."""
        limit, step = wants.memory_limit, wants.correction
        if prepared.facts and step is not None and step.brought_back is not None:
            wants = replace(wants, correction=step.brought_back)
        limit_bytes = self.inversion.limit_bytes() if limit is None else limit
        task = self.inversion.task(prepared.scan, prepared.measured, wants, limit_bytes)
        return Planned(prepared, task, wants, limit_bytes)

    def run(self, planned: Planned, stages: Stages, done: Done = lambda: None) -> Made:
        """Return the map on the grid that was measured.

        Parameters
        ----------
        planned
            As :meth:`plan` returned it.
        stages
            Takes the time and memory of every stage.
        done
            Called after each patch.

        Raises
        ------
        DataError
            If the scan lacks a parameter that the network needs.
        EngineError
            If what runs it fails, or the map is not finite.
        """
        between, found = dict[str, Volume](), dict[str, Any]()
        if self.before is not None and planned.before is not None:
            earlier = self.before.run(planned.before, stages, done)
            assert earlier.scan is not None  # as below
            scan = self._handed_on(earlier.scan, earlier.map_ppm, planned.beside)
            found = earlier.findings
            between = earlier.between | {self.before.needs.gives[0]: earlier.map_ppm}
            planned = self.planned(
                prepare(self.inversion.needs, scan, planned.wants), planned.wants
            )
        prepared, wants = planned.prepared, planned.wants
        measured = prepared.measured
        made = self.inversion.make(planned.task, stages, done)
        made.scan, made.between = measured, between
        if notes := [*found.pop("notes", ()), *made.findings.pop("notes", ())]:
            made.findings["notes"] = notes
        if found:
            made.findings["first_part_found"] = found
        if not wants.any_values:
            for volume in made.volumes:
                require_finite(volume)
        if prepared.back:
            with stages("bring back"):
                made.map_ppm = prepared.brought_back(made.map_ppm)
                made.further = {n: prepared.brought_back(v) for n, v in made.further.items()}
        if wants.correction is not None and "data_consistency" not in made.findings:
            made.map_ppm, step = wants.correction.apply(made.map_ppm, measured, stages)
            made.findings["data_consistency"] = step
        for name, volume in zip(self.inversion.needs.gives, made.volumes, strict=True):
            if name.startswith("chi") and not wants.any_values:
                doubts = doubt_of_values(volume, measured.mask, measured.measured)
                if doubts:
                    made.findings.setdefault("notes", []).extend(doubts)
        return made


def gpu_number(device: str, models: Sequence[Path]) -> int | None:
    """Return the GPU that models are to run on, ``None`` for the CPU.

    Parameters
    ----------
    device
        ``cpu``, ``cuda:N``, or ``auto``: the first GPU for plans, where there is one, the CPU for
        ONNX files.
    models
        The files.
    """
    if found := CUDA.fullmatch(device):
        return int(found[1])
    return 0 if _may_choose(device, models) and not instead_of_gpu(device, models) else None


def instead_of_gpu(device: str, models: Sequence[Path]) -> str | None:
    """Return what is missing where plans run on the CPU without anybody having said so."""
    if not _may_choose(device, models):
        return None
    from qsm_deploy.runtime.gpu.open import missing_gpu

    return missing_gpu()


def _may_choose(device: str, models: Sequence[Path]) -> bool:
    return device == AUTO and any(path.suffix == PLAN for path in models)


def _runs_on_cpu(path: Path) -> bool:
    try:
        return bool(graph_in(path)) and load_card(path).options.get("dipole_op") != "plugin"
    except QsmDeployError:
        return False


def reconstructor_of(session: Session, model: Path) -> Reconstructor:
    """Return what reconstructs in a session that was opened elsewhere, and stays."""
    from qsm_deploy.runtime.gpu.session import GpuSession

    if isinstance(session, GpuSession):
        from qsm_deploy.runtime.gpu.network import GpuNetwork

        return Reconstructor(GpuNetwork(session, model))
    from qsm_deploy.runtime.reconstruction.network import CpuNetwork

    return Reconstructor(CpuNetwork(session, model))


def open_reconstructor(
    maker: Maker,
    host: Host,
    log: TerminalLog | None = None,
    *,
    stays: bool = True,
    memory_limit: int | None = None,
) -> Reconstructor:
    """Open the models of a run, or take a method.

    Parameters
    ----------
    maker
        One file, the two parts of AFTER-QSM, or several of which each takes what the one before
        gives, in any order; a method, or models and a method that takes the field that they give.
    host
        Where.
    log
        Takes what the user must know of where a plan runs.
    stays
        Whether they serve several scans; else the memory of each is free when it is done.
    memory_limit
        Bytes that a GPU's library may take which does not compute in memory of ours.

    Raises
    ------
    UsageError
        If they do not belong together, or the backend lacks the precision.
    EngineError
        If one cannot be loaded.
    MissingDependencyError
        If a library is not installed.
    """
    if isinstance(maker, Method):
        why = "the default method" if maker.name == DEFAULT else "asked for"
        return Reconstructor(_method(maker, host), why)
    log = log or TerminalLog(quiet=True)
    models = models_of(maker)
    networks, why = _opened(models, host, log, memory_limit, stays=stays)
    if missing := instead_of_gpu(host.device, models):
        session = networks[0].session
        log.warn(
            f"{models[0]}: {missing}; its {session.card.precision} graph runs on the CPU instead, "
            f"in {session.backend}, computed in {session.precision}"
        )
    parts = [network for network in networks if network.card.pipeline == "after"]
    inversions: list[Inversion] = [n for n in networks if n.card.pipeline != "after"]
    if parts:
        from qsm_deploy.runtime.reconstruction.after import TwoNetworks, in_order

        ordered = [parts[n] for n in in_order([network.card for network in parts])]
        if host.precision not in ("auto", "fp32"):
            raise UsageError("the two parts of after-qsm run in fp32 only; drop --precision")
        inversions.append(TwoNetworks(*ordered))
    for method in (one for one in maker if isinstance(one, Method)):
        inversions.append(_method(method, Host(device=host.device, threads=host.threads)))
    chain: Reconstructor | None = None
    for inversion in in_turn(inversions):
        chain = Reconstructor(inversion, why, missing, chain)
    assert chain is not None  # there is a model
    return chain


def in_turn(inversions: Sequence[Inversion]) -> list[Inversion]:
    """Return what makes a map in an order in which each takes what the one before gives.

    Raises
    ------
    UsageError
        If there is none.
    """
    places = {"local_field_ppm": 0, CHI: 1}
    ordered = sorted(inversions, key=lambda one: places.get(one.needs.gives[0], 2))
    for one, following in pairwise(ordered):
        given, taken = one.needs.gives[0], following.needs
        fits = given == taken.quantity or (
            given in taken.maps and one.needs.quantity == taken.quantity
        )
        if given == CHI and given in taken.maps:
            fits = taken.quantity in (one.needs.quantity, *(o.needs.gives[0] for o in ordered))
        if not fits:
            takes = " and ".join((taken.quantity, *taken.maps))
            raise UsageError(
                f"{one.needs.network} gives {given}, {taken.network} takes {takes}: they do not "
                "follow each other; one model runs alone, or each takes what the one before gives"
            )
    return ordered


def _method(method: Method, host: Host) -> Inversion:
    """Return a method where it is to run.

    Raises
    ------
    UsageError
        If something is said that is for networks.
    """
    number = gpu_number(host.device, ())
    library = "scipy" if number is None else "cuFFT"
    why = f": {method.name} computes in fp32, with {library}; drop it, or name a network"
    _require_unsaid(host, ("backend", "precision", "time_limit"), why)
    if number is not None:
        _require_unsaid(host, ("threads",), why)
        from qsm_deploy.runtime.methods.on_gpu import open_on_gpu

        return open_on_gpu(method, number)
    from qsm_deploy.runtime.methods.inversion import MethodInversion

    return MethodInversion(method, host.threads)


def _require_unsaid(host: Host, names: Sequence[str], why: str) -> None:
    """Refuse what is said of a host that has no meaning there."""
    for name in names:
        if (value := getattr(host, name)) != getattr(Host(), name):
            raise UsageError(f"--{name.replace('_', '-')} {value}{why}")


def _opened(
    models: Sequence[Path], host: Host, log: TerminalLog, memory_limit: int | None, *, stays: bool
) -> tuple[list["Network[Any]"], str]:
    number = gpu_number(host.device, models)
    if number is None:
        return _on_cpu(models, host, stays=stays)
    _require_unsaid(
        host,
        ("backend", "precision", "threads", "time_limit"),
        " is for the CPU; on a GPU the file says what runs it and in which precision: drop it, or "
        "pass --device cpu",
    )
    from qsm_deploy.runtime.gpu.network import GpuNetwork
    from qsm_deploy.runtime.gpu.open import open_gpu_sessions

    try:
        sessions = open_gpu_sessions(
            models, number, memory_limit=memory_limit, plan_cache=host.plan_cache, log=log
        )
    except EngineError as error:
        if host.device != AUTO or not all(map(_runs_on_cpu, models)):
            raise
        raise EngineError(f"{error}; or pass --device cpu, for the graph in the plan") from error
    found: list[Network[Any]] = [
        GpuNetwork(s, m, stays=stays) for s, m in zip(sessions, models, strict=True)
    ]
    return found, f"on GPU {number}"


def _on_cpu(models: Sequence[Path], host: Host, *, stays: bool) -> tuple[list["Network[Any]"], str]:
    from qsm_deploy.runtime.reconstruction.network import CpuNetwork
    from qsm_deploy.runtime.sessions.int8 import why_not_int8
    from qsm_deploy.runtime.sessions.open import choose_backend, open_session, require_backend

    backend, why = choose_backend(host.backend, host.precision)
    baseline = rss_bytes()
    require_backend(backend)
    found: list[Network[Any]] = [
        CpuNetwork(
            open_session(
                model,
                backend,
                precision=host.precision,
                threads=host.threads,
                time_limit=host.time_limit,
            ),
            model,
            threads=host.threads,
            stays=stays,
            baseline_bytes=baseline,
            time_limit=host.time_limit,
        )
        for model in models
    ]
    for network in found if host.precision == "auto" else ():
        if network.card.precision == "int8" and (because := why_not_int8(network.card, backend)):
            why += f"; in fp32: {because}"
    return found, why
