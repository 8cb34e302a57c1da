"""The flags of ``qsm-serve --dicom``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.job.arguments import memory_size
from qsm_deploy.runtime.serve.dicom.entities import entity_from, peer_from

if TYPE_CHECKING:
    from qsm_deploy.runtime.serve.dicom.running import DicomOptions

Read = TypeVar("Read")
OF_DICOM = ("send_to", "settle", "spool", "quota", "tls_cert", "tls_key", "tls_ca")
OF_MRD = ("host", "port", "openrecon", "force", "session_seconds")


def add_dicom(group: "argparse._ArgumentGroup", positive_seconds: Callable[[str], float]) -> None:
    """Add them."""
    add = group.add_argument
    # fmt: off
    add("--dicom", type=read_by(entity_from), metavar="AE@HOST:PORT",
        help="take studies by C-STORE under this title, and listen there instead")
    add("--send-to", type=read_by(entity_from), metavar="AE@HOST:PORT",
        help="where the maps go")
    add("--settle", type=positive_seconds, metavar="S",
        help="a study is begun when nothing of it came for so long (default: 30)")
    add("--spool", type=Path, metavar="DIR",
        help="private folder for images until their map is made and for maps until they are sent "
        "(default: one of the user's state)")
    add("--quota", type=memory_size, metavar="SIZE",
        help="most bytes in it, further images are refused (default: 20G)")
    add("--tls-cert", type=Path, metavar="FILE", help="certificate in PEM: encrypts both sides")
    add("--tls-key", type=Path, metavar="FILE", help="its key")
    add("--tls-ca", type=Path, metavar="FILE",
        help="certificates of who must have signed that of whoever sends, and of --send-to")
    # fmt: on


def options_from(arguments: argparse.Namespace) -> "DicomOptions | None":
    """Return what the flags say; ``None`` is a server for MRD.

    Raises
    ------
    UsageError
        If flags of the other server are given, or one is missing.
    """
    is_dicom = arguments.dicom is not None
    for name in OF_MRD if is_dicom else OF_DICOM:
        if not any(getattr(arguments, name) is unsaid for unsaid in (None, False)):  # 0 is said
            why = "is not for --dicom" if is_dicom else "needs --dicom AE@HOST:PORT"
            raise UsageError(f"--{name.replace('_', '-')} {why}; drop it")
    if not is_dicom:
        return None
    if arguments.send_to is None:
        raise UsageError("--dicom needs --send-to AE@HOST:PORT, where the maps go")
    if not arguments.send_to.port > 0:
        raise UsageError(f"--send-to {arguments.send_to}: port 0 is none to send to")
    certificate, key, authority = (arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    if (certificate is None) != (key is None) or (authority and not certificate):
        raise UsageError("--tls-cert FILE and --tls-key FILE go together, and --tls-ca with them")
    from qsm_deploy.runtime.serve.dicom.running import QUOTA, SETTLE_S, DicomOptions

    return DicomOptions(
        arguments.dicom,
        arguments.send_to,
        arguments.allow or (),
        arguments.settle or SETTLE_S,
        arguments.spool,
        arguments.quota or QUOTA,
        None if certificate is None else (certificate, key, authority),
    )


def read_by(reader: Callable[[str], Read]) -> Callable[[str], Read]:
    """Return a reader of a flag, whose errors are argparse's."""

    def read(text: str) -> Read:
        try:
            return reader(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


peer = read_by(peer_from)
