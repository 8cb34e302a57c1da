"""From the command line to a running server, and to its end."""

import argparse
import importlib.util
import signal
import sys
import time
from types import FrameType

from qsm_deploy.kernels.errors import MissingDependencyError
from qsm_deploy.runtime.run.request import BUNDLED_MODEL
from qsm_deploy.runtime.serve.limits import Limits


def run_server(arguments: argparse.Namespace) -> str:
    """Serve until SIGTERM or SIGINT; a second one ends at once.

    Returns
    -------
    str
        What to print at the end.

    Raises
    ------
    MissingDependencyError
        If the package ``ismrmrd`` is not installed.
    QsmDeployError
        If the engine cannot be opened, or the address not listened on.
    """
    if importlib.util.find_spec("ismrmrd") is None:
        raise MissingDependencyError("ismrmrd", "serve", "qsm-serve")
    from qsm_deploy.runtime.serve.engine import open_engine
    from qsm_deploy.runtime.serve.server import MrdServer

    began = time.monotonic()
    engine = open_engine(
        arguments.model or BUNDLED_MODEL,
        arguments.backend,
        threads=arguments.threads,
        resample=arguments.resample,
        allow_geometry=arguments.allow_geometry,
    )
    ready_s = time.monotonic() - began
    server = MrdServer(arguments.host, arguments.port, engine, _limits(arguments), _log)

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        _log("stopping; volumes that are being reconstructed will be finished")
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    host, port = server.address
    _log(f"ready on {host}:{port}: {engine.name}, loaded and warmed up in {ready_s:.1f} s")
    server.serve()
    return "stopped"


def _limits(arguments: argparse.Namespace) -> Limits:
    stated = {
        "session_bytes": arguments.max_session,
        "idle_seconds": arguments.idle_seconds,
        "session_seconds": arguments.session_seconds,
        "clients": arguments.max_clients,
    }
    return Limits(**{name: value for name, value in stated.items() if value is not None})


def _log(line: str) -> None:
    sys.stderr.write(f"qsm-serve: {' '.join(line.split())}\n")
    sys.stderr.flush()
