"""From a model to a running server, and to its end."""

import ipaddress
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from qsm_deploy.runtime.console.command import require_installed
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, Maker
from qsm_deploy.runtime.serve.limits import Limits


def run_server(
    maker: Maker, host: Host, wants: Wants, address: tuple[str, int], limits: Limits
) -> str:
    """Serve until SIGTERM or SIGINT; a second one ends at once.

    Parameters
    ----------
    maker
        The network, or the method.
    host, wants
        Where it runs, and what is asked of every reconstruction.
    address
        Host and port to listen on.
    limits
        What a client may ask for.

    Returns
    -------
    str
        What to print at the end.

    Raises
    ------
    MissingDependencyError
        If the package ``ismrmrd`` is not installed.
    QsmDeployError
        If it cannot be opened, or the address not listened on.
    """
    require_installed(["ismrmrd"], "serve", "qsm-serve")
    from qsm_deploy.runtime.serve.server import MrdServer
    from qsm_deploy.runtime.serve.turns import open_taking_turns

    began = time.monotonic()
    opened = open_taking_turns(maker, host, wants)
    ready_s = time.monotonic() - began
    server = MrdServer(*address, opened, limits, _log)

    stop_on_signals(server.stop, _log)
    name, port = server.address
    _log(f"ready on {name}:{port}: {opened.name}, loaded and warmed up in {ready_s:.1f} s")
    if not ipaddress.ip_address(name).is_loopback:
        who = ", ".join(map(str, limits.allowed)) or "anyone who reaches the port"
        _log(
            f"warning: {name} is not this machine alone, and the protocol has no password and no "
            f"encryption: {who} may use the server; --allow ADDRESS and a firewall keep others out"
        )
    server.serve()
    return "stopped"


def stop_on_signals(stop: Callable[[], object], log: Callable[[str], object]) -> None:
    """Have SIGTERM and SIGINT stop a server, and a second one the process."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        log("stopping; what is being reconstructed will be finished")
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


def _log(line: str) -> None:
    sys.stderr.write(f"qsm-serve: {' '.join(line.split())}\n")
    sys.stderr.flush()
