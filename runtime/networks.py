"""The networks of a run, opened once for any number of acquisitions."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.gpu.open import gpu_number, open_gpu_sessions
from qsm_deploy.runtime.reconstruction.after import in_order
from qsm_deploy.runtime.reconstruction.pipeline import require_field_count
from qsm_deploy.runtime.sessions.session import (
    Session,
    choose_backend,
    open_session,
    require_backend,
)


@dataclass
class Networks:
    """The network of a run, or the two that follow each other, opened.

    Attributes
    ----------
    models, sessions
        Files and sessions, in the order in which they run.
    why_backend
        Why this backend runs them.
    stay
        Whether they serve further runs; else the memory of each is free when it is done.
    """

    models: list[Path]
    sessions: list[Session]
    why_backend: str
    stay: bool = False

    @property
    def card(self) -> ModelCard:
        """The card of the last one, whose output is the map."""
        return self.sessions[-1].card


def open_networks(
    models: Sequence[Path], flags: argparse.Namespace, field_count: int, *, stay: bool = False
) -> Networks:
    """Open the models of a run.

    Parameters
    ----------
    models
        Their files, in any order.
    flags
        Device, backend, precision and threads.
    field_count
        How many fields each acquisition has.
    stay
        Whether they serve several acquisitions.

    Raises
    ------
    UsageError
        If they do not belong together, take more or fewer fields, or the backend lacks the
        precision.
    EngineError
        If one cannot be loaded.
    """
    number = gpu_number(flags.device, models)
    sessions, why = _on_cpu(models, flags) if number is None else _on_gpu(models, flags, number)
    order = in_order([session.card for session in sessions])
    networks = Networks([models[n] for n in order], [sessions[n] for n in order], why, stay)
    if len(order) > 1 and networks.sessions[-1].precision != "fp32":
        raise UsageError("the two parts of after-qsm run in fp32 only; drop --precision")
    require_field_count(networks.card, field_count)
    return networks


def _on_cpu(models: Sequence[Path], flags: argparse.Namespace) -> tuple[list[Session], str]:
    backend, why = choose_backend(flags.backend, flags.precision)
    require_backend(backend)
    sessions = [
        open_session(model, backend, precision=flags.precision, threads=flags.threads)
        for model in models
    ]
    return sessions, why


def _on_gpu(
    models: Sequence[Path], flags: argparse.Namespace, number: int
) -> tuple[list[Session], str]:
    for flag, value, default in (
        ("--backend", flags.backend, "auto"),
        ("--precision", flags.precision, "fp32"),
        ("--threads", flags.threads, 0),
    ):
        if value != default:
            raise UsageError(
                f"{flag} {value} is for the CPU; on a GPU the file says what runs it and in "
                f"which precision: drop it, or pass --device cpu"
            )
    sessions = open_gpu_sessions(models, number, flags.memory_limit)
    return list(sessions), f"on GPU {number}"
