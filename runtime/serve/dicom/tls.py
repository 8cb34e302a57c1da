"""Certificates: what is shown to the other side, and what is asked of it."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qsm_deploy.kernels.errors import DataError
from qsm_deploy.runtime.console.inputs import require_no_pipe


@dataclass(frozen=True)
class Tls:
    """How connections are encrypted, those that come and those that go out.

    Attributes
    ----------
    incoming, outgoing
        Contexts of the two.
    """

    incoming: ssl.SSLContext
    outgoing: ssl.SSLContext


def tls_from(certificate: Path, key: Path, authority: Path | None) -> Tls:
    """Return the contexts of PEM files, for TLS 1.2 and later.

    Parameters
    ----------
    certificate, key
        What is shown to both sides.
    authority
        Who must have signed the other side's; without it none is asked for.

    Raises
    ------
    DataError
        If a file is missing, or is not what it should be.
    """
    incoming = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    outgoing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority is None:
        outgoing.check_hostname = False
        outgoing.verify_mode = ssl.CERT_NONE
    else:
        incoming.verify_mode = ssl.CERT_REQUIRED
    for context in (incoming, outgoing):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load(context, certificate, key, authority)
    return Tls(incoming, outgoing)


def _load(context: ssl.SSLContext, certificate: Path, key: Path, authority: Path | None) -> None:
    for path in filter(None, (certificate, key, authority)):
        require_no_pipe(path)
        try:
            path.open("rb").close()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; name a PEM file") from error
    try:
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except (ssl.SSLError, ValueError) as error:
        raise DataError(
            f"{certificate} and {key} are no certificate and its key ({_reason(error)}); both are "
            "PEM files"
        ) from error
    if authority is not None:
        try:
            context.load_verify_locations(authority)
        except (ssl.SSLError, ValueError) as error:
            raise DataError(f"{authority} holds no certificates ({_reason(error)})") from error


def _refuse_password() -> NoReturn:
    raise ValueError("the key is encrypted, and nobody is there to say its password")


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)
