"""The networks of a run, opened once for any number of acquisitions."""

from dataclasses import dataclass
from pathlib import Path

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.after import in_order
from qsm_deploy.runtime.card import ModelCard
from qsm_deploy.runtime.pipeline import require_field_count
from qsm_deploy.runtime.request import Request
from qsm_deploy.runtime.session import Session, choose_backend, open_session, require_backend


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


def open_networks(request: Request, *, stay: bool = False) -> Networks:
    """Open the models of a run.

    Raises
    ------
    UsageError
        If they do not belong together, or the backend lacks the precision.
    EngineError
        If one cannot be loaded.
    """
    flags = request.flags
    backend, why = choose_backend(flags.backend, flags.precision)
    require_backend(backend)
    sessions = [
        open_session(model, backend, precision=flags.precision, threads=flags.threads)
        for model in request.models
    ]
    order = in_order([session.card for session in sessions])
    networks = Networks([request.models[n] for n in order], [sessions[n] for n in order], why, stay)
    if len(order) > 1 and networks.sessions[-1].precision != "fp32":
        raise UsageError("the two parts of after-qsm run in fp32 only; drop --precision")
    require_field_count(networks.card, len(request.files.fields))
    return networks
