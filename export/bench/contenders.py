"""What ``qsm-bench`` runs: the engine, what its flags put beside it, and PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qsm_deploy.export.bench.rounds import Contender
from qsm_deploy.export.check.evaluations import load_valid_card, reference_evaluation
from qsm_deploy.kernels.errors import UsageError, WeightsError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.console.terminal import TerminalLog
from qsm_deploy.runtime.gpu.open import open_gpu_sessions
from qsm_deploy.runtime.reconstruction.inversion import CPU
from qsm_deploy.runtime.reconstructor import Host, gpu_number, instead_of_gpu
from qsm_deploy.runtime.sessions.int8 import computed_precision
from qsm_deploy.runtime.sessions.open import choose_backend, open_session
from qsm_deploy.runtime.sessions.session import BACKENDS, Session

TORCH = "torch"
Opener = Callable[[], Session]


@dataclass(frozen=True)
class Lineup:
    """What is run.

    Attributes
    ----------
    engine
        An ONNX file or a plan, first.
    against
        ``torch``, backends of the CPU, or other files.
    weights, normalisation
        What the engine was made of, for PyTorch; else the bundled weights, if it was those.
    host
        Where files run; the others on the CPU compute in FP32.
    """

    engine: Path
    against: Sequence[str] = ()
    weights: Sequence[Path] = ()
    normalisation: Sequence[Path] = ()
    host: Host = field(default_factory=Host)


def find_contenders(lineup: Lineup, log: TerminalLog | None = None) -> list[Contender]:
    """Return the engine, first, and what it is compared with; nothing is loaded yet.

    Raises
    ------
    UsageError
        If one is named twice, or cannot run the same scan.
    WeightsError
        If PyTorch is asked for without the engine's weights.
    DataError, EngineError, CardError
        If a file is missing, no model, or has no card.
    """
    card = load_valid_card(lineup.engine)
    reference = find_reference(card, lineup.weights, lineup.normalisation)
    if reference is None and TORCH in lineup.against:
        reference_evaluation(card, [], lineup.normalisation)  # says why not
    if log and (missing := instead_of_gpu(lineup.host.device, [lineup.engine])):
        log.warn(f"{lineup.engine}: {missing}; its graph is measured instead, on the CPU")
    contenders = [_engine(lineup.host, lineup.engine, card), *_others(lineup, card, reference)]
    _require_different(contenders)
    return contenders


def find_reference(
    card: ModelCard, weights: Sequence[Path], normalisation: Sequence[Path]
) -> Opener | None:
    """Return what opens the PyTorch network of a card, if its weights are at hand.

    Parameters
    ----------
    card
        Of the engine.
    weights
        The files that it was made of; none takes the bundled ones, if it was made of those.
    normalisation
        The authors' files of numbers.

    Raises
    ------
    UsageError, WeightsError
        If the files are not what the engine was made of.
    """
    try:
        return reference_evaluation(card, list(map(str, weights)), normalisation)[0].open
    except (UsageError, WeightsError):
        if weights:
            raise
        return None


def _engine(host: Host, path: Path, card: ModelCard) -> Contender:
    """Return a file on the device and in the library that were chosen."""
    number = gpu_number(host.device, [path])
    if number is not None:
        return Contender(
            path.name,
            "the GPU's engine",
            card.precision,
            f"cuda:{number}",
            card,
            lambda: open_gpu_sessions([path], number, plan_cache=host.plan_cache)[0],
            path,
        )
    backend, _ = choose_backend(host.backend, host.precision)
    return _on_cpu(replace(host, backend=backend), path, card)


def _on_cpu(host: Host, path: Path, card: ModelCard) -> Contender:
    backend = host.backend
    precision = computed_precision(card, backend, host.precision)
    return Contender(
        path.name,
        backend,
        precision,
        CPU,
        card,
        lambda: open_session(
            path, backend, precision=precision, threads=host.threads, time_limit=host.time_limit
        ),
        path,
    )


def _others(lineup: Lineup, card: ModelCard, reference: Opener | None) -> Iterator[Contender]:
    """Yield what the engine is compared with."""
    engine, plain = lineup.engine, replace(lineup.host, precision="fp32")
    for other in lineup.against:
        if other == TORCH:
            assert reference is not None  # or it was refused
            yield Contender("the weights", TORCH, "fp32", CPU, card, reference, engine)
        elif other in BACKENDS:
            yield _on_cpu(replace(plain, backend=other), engine, card)
        else:
            path = Path(other)
            second = load_valid_card(path)
            _require_same_inputs(card, second, path)
            yield _engine(plain, path, second)


def _require_different(contenders: list[Contender]) -> None:
    seen = set()
    for contender in contenders:
        what = (contender.path, contender.backend, contender.precision, contender.device)
        if what in seen:
            raise UsageError(
                f"{contender.name} in {contender.backend} {contender.precision} would be compared "
                "with itself; name another library, precision or engine"
            )
        seen.add(what)


def _require_same_inputs(card: ModelCard, other: ModelCard, path: Path) -> None:
    ours, theirs = ((c.task, c.field_counts.start) for c in (card, other))
    if ours != theirs:
        raise UsageError(
            f"{path}: {other.network} takes {theirs[1]} x {theirs[0]}, {card.network} {ours[1]} x "
            f"{ours[0]}: they cannot run the same scan"
        )
