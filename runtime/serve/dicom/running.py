"""From a model and what the command line says to a running DICOM server, and to its end."""

import ipaddress
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qsm_deploy.runtime.console.command import require_installed
from qsm_deploy.runtime.console.user_cache import state_folder
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstructor import Host, Maker
from qsm_deploy.runtime.serve.dicom.entities import Entity, Peer
from qsm_deploy.runtime.serve.dicom.privacy import quiet_libraries, write_line
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.running import stop_on_signals

SETTLE_S, QUOTA = 30.0, 20 << 30
PRIVATE_UMASK = 0o077


@dataclass(frozen=True)
class DicomOptions:
    """What the command line says.

    Attributes
    ----------
    own, to
        The server, and who takes the maps.
    peers
        Who may send; all if there are none.
    settle_s
        How long a study must be quiet until it is begun [s].
    spool, quota
        Where images and maps lie, and most bytes there; without one a folder of the user's.
    tls
        Files in PEM for TLS, if connections are to be encrypted: certificate, its key, and who must
        have signed the other side's.
    """

    own: Entity
    to: Entity
    peers: Sequence[Peer] = ()
    settle_s: float = SETTLE_S
    spool: Path | None = None
    quota: int = QUOTA
    tls: tuple[Path, Path, Path | None] | None = None


def run_dicom_server(
    maker: Maker, host: Host, wants: Wants, options: DicomOptions, limits: Limits
) -> str:
    """Serve until SIGTERM or SIGINT; a second one ends at once.

    Parameters
    ----------
    maker
        The networks, or the method.
    host, wants
        Where it runs, and what is asked of every reconstruction.
    options
        What the command line says of DICOM.
    limits
        What a client may ask for.

    Returns
    -------
    str
        What to print at the end.

    Raises
    ------
    MissingDependencyError
        If the extra ``dicom`` is not installed.
    QsmDeployError
        If it cannot be opened, the spool not be used, or the address not be listened on.
    """
    require_installed(("pydicom", "pynetdicom", "dcm2niix"), "dicom", "qsm-serve --dicom")
    from qsm_deploy.runtime.serve.dicom.outbox import Outbox
    from qsm_deploy.runtime.serve.dicom.receiver import Receiver
    from qsm_deploy.runtime.serve.dicom.reconstruction import open_map_maker
    from qsm_deploy.runtime.serve.dicom.sender import send
    from qsm_deploy.runtime.serve.dicom.server import DicomServer
    from qsm_deploy.runtime.serve.dicom.spool import Spool
    from qsm_deploy.runtime.serve.dicom.studies import Studies
    from qsm_deploy.runtime.serve.dicom.tls import tls_from

    own, to = options.own, options.to
    tls = None if options.tls is None else tls_from(*options.tls)
    os.umask(PRIVATE_UMASK)
    quiet_libraries(write_line)
    began = time.monotonic()
    maps = open_map_maker(maker, host, wants, write_line)
    limits = replace(limits, allowed=[peer.network for peer in options.peers])
    folder = options.spool or state_folder() / f"spool-{own.title.encode().hex()}"
    with Spool(folder, options.quota) as spool, _temporary_files_in(spool.work):
        left = list(spool.leftovers())
        made = [study for study in left if study.map.exists()]
        waiting = [study for study in left if study not in made]
        studies = Studies(spool, options.settle_s, waiting)
        sends = partial(send, to=to, own_title=own.title, tls=None if tls is None else tls.outgoing)
        outbox = Outbox(spool, sends, write_line, made)
        receiver = Receiver(own, options.peers, limits, tls, studies, write_line)
        server = DicomServer(receiver, studies, spool, outbox, maps, write_line)

        stop_on_signals(server.stop, write_line)
        write_line(
            f"ready on {receiver.entity}: {maps.name}, loaded in {time.monotonic() - began:.1f} s; "
            f"maps go to {to}, the spool is {spool.folder}"
        )
        if left:
            write_line(f"left by a server before: {len(waiting)} studies, {len(made)} maps unsent")
        _warn(receiver.entity, options)
        server.serve()
    return "stopped"


def _warn(own: Entity, options: DicomOptions) -> None:
    """Say who may use the server, and what can be read on the way."""
    others = [e for e in (own, options.to) if not _is_this_machine(e.host)]
    if options.tls is None and others:
        write_line(
            f"warning: images and maps of patients go over the network as they are, for "
            f"{' and '.join(map(str, others))}; --tls-cert and --tls-key encrypt them"
        )
    if options.tls is not None and options.tls[2] is None:
        write_line("warning: nobody's certificate is looked at; --tls-ca FILE says whose is taken")
    if not _is_this_machine(own.host):
        who = ", ".join(map(str, options.peers)) or "anyone who reaches the port"
        write_line(
            f"warning: {own.host} is not this machine alone, and DICOM has no password: {who} may "
            "use the server; --allow AE@ADDRESS and a firewall keep others out"
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Have what is unfinished lie in a folder that is emptied, whoever makes it."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
