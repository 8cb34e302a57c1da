"""What is taken from the network: MR images, of who is allowed, into the studies."""

import hashlib
import ipaddress
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
    RLELossless,
)
from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from qsm_deploy.kernels.errors import DataError, MemoryLimitError, UsageError
from qsm_deploy.runtime.serve.dicom.entities import Entity, Peer
from qsm_deploy.runtime.serve.dicom.port import LONGEST_PDU, BoundedSocket, Port
from qsm_deploy.runtime.serve.dicom.studies import Studies
from qsm_deploy.runtime.serve.dicom.tls import Tls
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.seldom import Seldom
from qsm_deploy.runtime.serve.texts import one_line

IMAGES = (MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage)
# those that lose nothing, since a phase that lost something is none; the first in common is taken
SYNTAXES = [
    *(ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless),
    *(JPEGLosslessSV1, JPEGLossless, JPEGLSLossless, JPEG2000Lossless),
]
SUCCESS, OUT_OF_RESOURCES, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000
UNKNOWN_CALLER, BUSY = (1, 1, 3), (2, 3, 2)  # result, source and reason of a rejection
STUDY, INSTANCE, SERIES_NUMBER = map(Tag, ("StudyInstanceUID", "SOPInstanceUID", "SeriesNumber"))
AFTER_HEADER = Tag("FloatPixelData")
NAME_CHARACTERS = 32
POLL_S = 0.2
STOPPING = "the server is shutting down"


class Receiver:
    """A storage provider on a port, open when the constructor returns.

    Parameters
    ----------
    own
        What it is called, and where it listens; port 0 takes a free one.
    peers
        Who may send; all if there are none.
    limits
        What a client may ask for, of its addresses those of the peers.
    tls
        How connections are encrypted, if they are.
    studies
        Takes the images.
    log
        Takes a line about what begins and what is refused.

    Raises
    ------
    UsageError
        If the address cannot be listened on.
    """

    def __init__(
        self,
        own: Entity,
        peers: Sequence[Peer],
        limits: Limits,
        tls: Tls | None,
        studies: Studies,
        log: Callable[[str], object],
    ) -> None:
        self._peers, self._studies, self._log, self._seldom = peers, studies, log, Seldom(log)
        ae = ApplicationEntity(own.title)
        ae.require_called_aet = True
        ae.maximum_associations = 2 * limits.clients  # the port counts
        ae.maximum_pdu_size = LONGEST_PDU // 8
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = limits.idle_seconds
        ae.add_supported_context(Verification)
        for kind in IMAGES:
            ae.add_supported_context(kind, SYNTAXES)
        try:
            self._port = Port(
                ae,
                (own.host, own.port),
                tls.incoming if tls else None,
                [(evt.EVT_REQUESTED, self._requested), (evt.EVT_C_STORE, self._store)],
                limits,
                self._seldom,
            )
        except OSError as error:
            raise UsageError(
                f"cannot listen on {own.host}:{own.port} ({error.strerror}); pass another --dicom"
            ) from None
        name = self._port.server_address
        self.entity = Entity(own.title, str(name[0]), int(name[1]))
        self._stopping = False
        self._thread = threading.Thread(target=self._listen)

    def start(self) -> None:
        """Take clients, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more; what is being received ends."""
        self._stopping = True

    def join(self) -> None:
        """Wait until the last client is gone."""
        self._thread.join()

    def _listen(self) -> None:
        self._port.timeout = POLL_S
        while not self._stopping:
            self._port.handle_request()
            self._port.service_actions()
        self._port.places.end_receiving(STOPPING)
        self._port.server_close()

    def _requested(self, event: evt.Event) -> None:
        """Reject an association of who is not allowed, or has no place."""
        association, client = event.assoc, _socket(event).client
        assert association.requestor.primitive is not None  # it is what was requested
        title = str(association.requestor.primitive.calling_ae_title).strip()
        association.requestor.ae_title = title
        sender = ipaddress.ip_address(client.address)
        if self._peers and not any(peer.is_sender(title, sender) for peer in self._peers):
            client.reason = None
            self._seldom("title", f"{_name(event)}: refused, it is not allowed")
            association.acse.send_reject(*UNKNOWN_CALLER)
        elif client.reason is not None:
            association.acse.send_reject(*BUSY)
        else:
            return
        association.kill()

    def _store(self, event: evt.Event) -> int:
        """Keep an image, and return the status that its sender is told."""
        connection = _socket(event)
        connection.client.silent_since = math.inf
        request: Any = event.request
        data = request.DataSet or BytesIO()
        try:
            return self._kept(event, data)
        finally:
            connection.client.silent_since = time.monotonic()
            with suppress(OSError):
                connection.keep(-data.getbuffer().nbytes)

    def _kept(self, event: evt.Event, data: BytesIO) -> int:
        try:
            study, name = _names(data, event.context.transfer_syntax)
            head = bytes(128) + b"DICM" + encode_file_meta(event.file_meta)
        except DataError as error:
            self._seldom("object", f"{_name(event)}: an image is refused, {error}")
            return NOT_UNDERSTOOD
        try:
            with data.getbuffer() as pixels:
                first = self._studies.take(study, name, head, pixels)
        except (MemoryLimitError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._seldom("spool", f"{_name(event)}: an image is refused, {reason}")
            return OUT_OF_RESOURCES
        if first is not None:
            self._log(f"study {first.number}: images arrive from {_name(event)}")
        return SUCCESS


def _socket(event: evt.Event) -> BoundedSocket:
    connection: Any = event.assoc.dul.socket
    assert isinstance(connection, BoundedSocket)
    return connection


def _name(event: evt.Event) -> str:
    return f"{one_line(str(event.assoc.requestor.ae_title))}@{_socket(event).client.address}"


def _names(data: BytesIO, syntax: UID) -> tuple[str, str]:
    """Return what stands for the study of an image in names, and a name of its file.

    Nothing of it but digits of ours and the series number, which the log tells.

    Raises
    ------
    DataError
        If it cannot be read, or says not what it is.
    """
    data.seek(0)
    try:
        said = read_dataset(
            data,
            syntax.is_implicit_VR,
            syntax.is_little_endian,
            stop_when=lambda tag, vr, length: tag >= AFTER_HEADER,
            specific_tags=[STUDY, INSTANCE, SERIES_NUMBER],
        )
        study, instance, series = (_raw(said, n) for n in (STUDY, INSTANCE, SERIES_NUMBER))
    except Exception as error:  # of many kinds, for bytes that are no DICOM
        raise DataError(f"it cannot be read ({type(error).__name__})") from None
    if not (study and instance):
        raise DataError("it does not say of which study it is, or which image")
    number = series.decode("ascii", "replace")
    shown = number if number.isascii() and number.isdecimal() and len(number) < 10 else "0"
    study_name, name = (hashlib.sha256(n).hexdigest()[:NAME_CHARACTERS] for n in (study, instance))
    return study_name, f"{int(shown)}-{name}.dcm"


def _raw(said: Dataset, tag: int) -> bytes:
    """Return what an element holds, unread: pydicom warns of values, and shows them."""
    if tag not in said:
        return b""
    value = said.get_item(tag).value
    return (value if isinstance(value, bytes) else str(value).encode()).strip(b" \0")
