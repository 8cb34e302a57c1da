"""What ``qsm-bench`` runs: the engine, what its flags put beside it, and PyTorch."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from qsm_deploy.export.bench.rounds import Contender
from qsm_deploy.export.check.evaluations import load_valid_card, reference_evaluation
from qsm_deploy.kernels.errors import UsageError, WeightsError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.gpu.open_gpu import gpu_number, open_gpu_sessions
from qsm_deploy.runtime.sessions.session import (
    Backend,
    Precision,
    Session,
    choose_backend,
    open_session,
)

TORCH, CPU = "torch", "cpu"
BACKENDS = get_args(Backend)
Opener = Callable[[], Session]


def find_contenders(arguments: argparse.Namespace) -> list[Contender]:
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
    card = load_valid_card(arguments.engine)
    reference = find_reference(card, arguments.weights, arguments.normalisation)
    if reference is None and TORCH in arguments.against:
        reference_evaluation(card, [], arguments.normalisation)  # says why not
    contenders = [
        _engine(arguments, arguments.engine, card, arguments.precision),
        *_others(arguments, card, reference),
    ]
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


def _engine(
    arguments: argparse.Namespace, path: Path, card: ModelCard, precision: Precision
) -> Contender:
    """Return a file on the device and in the library that the flags choose."""
    number = gpu_number(arguments.device, [path])
    if number is not None:
        return Contender(
            path.name,
            "the GPU's engine",
            card.precision,
            f"cuda:{number}",
            card,
            lambda: open_gpu_sessions([path], number)[0],
            path,
        )
    backend, _ = choose_backend(arguments.backend, precision)
    return _on_cpu(arguments, path, card, backend, precision)


def _on_cpu(
    arguments: argparse.Namespace,
    path: Path,
    card: ModelCard,
    backend: Backend,
    precision: Precision = "fp32",
) -> Contender:
    return Contender(
        path.name,
        backend,
        precision,
        CPU,
        card,
        lambda: open_session(path, backend, precision=precision, threads=arguments.threads),
        path,
    )


def _others(
    arguments: argparse.Namespace, card: ModelCard, reference: Opener | None
) -> Iterator[Contender]:
    """Yield what the engine is compared with."""
    engine = arguments.engine
    for other in arguments.against:
        if other == TORCH:
            assert reference is not None  # or it was refused
            yield Contender("the weights", TORCH, "fp32", CPU, card, reference, engine)
        elif other in BACKENDS:
            yield _on_cpu(arguments, engine, card, other)
        else:
            path = Path(other)
            second = load_valid_card(path)
            _require_same_inputs(card, second, path)
            yield _engine(arguments, path, second, "fp32")


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
