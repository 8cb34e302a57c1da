"""The scheduler that a user has started, and who may speak with it.

A scheduler runs whatever whoever reaches its port sends.
"""

import ipaddress
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qsm_deploy.kernels.errors import EngineError, UsageError

if TYPE_CHECKING:
    from distributed import Client, Security

CONNECT_S = 10.0
LOGS = "distributed"
HELP = "expected local:N, slurm, or the address of a Dask scheduler such as tls://HOST:8786"


def require_safe(address: str, *, has_tls: bool, insecure: bool) -> None:
    """Refuse an address where others could speak with the scheduler, too.

    Raises
    ------
    UsageError
        If it is none, or one beyond this computer without TLS.
    """
    parts = urlsplit(address)
    try:
        is_address = parts.scheme in ("tcp", "tls") and parts.hostname and parts.port
    except ValueError:  # a port that is no number
        is_address = False
    if not is_address:
        raise UsageError(f"--cluster {address}: {HELP}")
    if (parts.scheme == "tls") != has_tls:
        raise UsageError(
            f"--cluster {address}: tls:// and --cluster-tls CA CERT KEY belong together; tcp:// is "
            "not encrypted"
        )
    if not has_tls and not insecure and not _is_loopback(parts.hostname or ""):
        raise UsageError(
            f"--cluster {address}: without TLS whoever reaches the port runs programs on all "
            "workers as their user, and reads what goes over the network; use tls:// and "
            "--cluster-tls CA CERT KEY, or pass --cluster-insecure on a network of which you trust "
            "everybody"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def security_from(files: Sequence[Path]) -> "Security":
    """Return what TLS needs, of an authority's certificate, one of its own, and its key.

    Raises
    ------
    UsageError
        If a file is not there.
    """
    from distributed import Security

    for path in files:
        if not path.is_file():
            raise UsageError(f"--cluster-tls: {path} is no file; expected CA CERT KEY, in PEM")
    ca, certificate, key = map(str, files)
    roles = ("client", "worker", "scheduler")
    own = {f"tls_{role}_cert": certificate for role in roles}
    own |= {f"tls_{role}_key": key for role in roles}
    return Security(tls_ca_file=ca, require_encryption=True, **own)


class Scheduler:
    """A scheduler that runs already.

    Parameters
    ----------
    address
        Where.
    security
        What TLS needs, if it speaks that.
    """

    most = 0

    def __init__(self, address: str, security: "Security | None") -> None:
        self._address, self._security = address, security

    def connect(self) -> "Client":
        """As :meth:`Source.connect`."""
        from distributed import Client

        # what it has to say, as that the scheduler is gone, is said by the pool
        for name in [name for name in logging.root.manager.loggerDict if name.startswith(LOGS)]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            return Client(self._address, security=self._security, timeout=CONNECT_S)
        except (OSError, TimeoutError) as error:
            raise EngineError(
                f"no scheduler answers at {self._address} ({error}); start one with `dask "
                "scheduler`, and workers with `dask worker ADDRESS`"
            ) from error

    def require_coming(self) -> None:
        """As :meth:`Source.require_coming`: the user may start one at any time."""

    def close(self) -> None:
        """As :meth:`Source.close`: it stays."""
