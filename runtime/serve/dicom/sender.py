"""A map to where it is wanted: every image of it, or it is not sent."""

import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_deploy.runtime.serve.dicom.entities import Entity

if TYPE_CHECKING:
    from pynetdicom.association import Association

CONNECT_S, ANSWER_S = 10.0, 60.0
TAKEN = (0x0000, 0xB000, 0xB006, 0xB007)  # the last three with something changed or doubted


def send(
    files: Sequence[Path], to: Entity, own_title: str, tls: ssl.SSLContext | None = None
) -> str | None:
    """Send files in one association.

    Parameters
    ----------
    files
        Each of one object; whoever has it already takes it again as the same.
    to
        Who takes them.
    own_title
        What the sender calls itself.
    tls
        How the connection is encrypted, if it is.

    Returns
    -------
    str or None
        Why they were not all taken.
    """
    from pydicom import dcmread
    from pydicom.uid import ImplicitVRLittleEndian
    from pynetdicom.ae import ApplicationEntity

    ae = ApplicationEntity(own_title)
    ae.connection_timeout = CONNECT_S
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ANSWER_S
    heads = [dcmread(path, stop_before_pixels=True, specific_tags=[]) for path in files]
    kinds = {(h.file_meta.MediaStorageSOPClassUID, h.file_meta.TransferSyntaxUID) for h in heads}
    for kind, syntax in sorted(kinds):
        ae.add_requested_context(kind, [syntax, ImplicitVRLittleEndian])
    try:
        association = ae.associate(
            to.host, to.port, ae_title=to.title, tls_args=(tls, to.host) if tls else None
        )
    except (OSError, RuntimeError) as error:  # a name that is unknown, no thread
        return f"{to}: {getattr(error, 'strerror', None) or type(error).__name__}"
    try:
        return _all_taken(association, files, to, tls)
    finally:
        if association.is_established:
            association.release()


def _all_taken(
    association: "Association", files: Sequence[Path], to: Entity, tls: ssl.SSLContext | None
) -> str | None:
    if association.is_rejected:
        return f"{to} rejects the association: it does not know this title or address, or is busy"
    if not association.is_established:
        return f"{to}: {_why_not_reached(to, tls)}"
    for path in files:
        try:
            status = association.send_c_store(path)
        except (ValueError, RuntimeError) as error:
            if not association.is_established:
                return f"{to} ended the association"
            return f"{to} takes no such images ({type(error).__name__})"
        if "Status" not in status:
            return f"{to} ended the association, or did not answer"
        if status.Status not in TAKEN:
            return f"{to} refuses an image with status 0x{status.Status:04X}"
    return None


def _why_not_reached(to: Entity, tls: ssl.SSLContext | None) -> str:
    """Return why there is no connection, which pynetdicom does not say."""
    try:
        with socket.create_connection((to.host, to.port), CONNECT_S) as connection:
            if tls is not None:
                tls.wrap_socket(connection, server_hostname=to.host).close()
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not accepted ({error.verify_message})"
    except ssl.SSLError as error:
        return f"no TLS ({error.reason})"
    except OSError as error:
        return f"no connection ({error.strerror or 'no answer'})"
    return "it is connected and does not answer as DICOM, or wants TLS"
