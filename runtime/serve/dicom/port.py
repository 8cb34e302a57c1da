"""The port: who connects is bounded in number, in memory and in time, before a word is read.

pynetdicom alone reads as many bytes as a client announces, waits for the rest of them for ever, and
shakes hands for TLS before it looks at the next client.
"""

import ipaddress
import socket
import ssl
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pynetdicom.transport import (
    AssociationSocket,
    RequestHandler,
    ThreadedAssociationServer,
)

from qsm_deploy.kernels.errors import MemoryLimitError
from qsm_deploy.runtime.serve.budget import Budget, Hold
from qsm_deploy.runtime.serve.dicom.privacy import place_of
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.places import Client, Places
from qsm_deploy.runtime.serve.seldom import Seldom

if TYPE_CHECKING:
    from pynetdicom.ae import ApplicationEntity
    from pynetdicom.association import Association
    from pynetdicom.events import EventHandlerType

LONGEST_PDU = 1 << 20  # bytes; of those with data clients are asked for an eighth
PIECE = 1 << 16
HANDSHAKE_S = 10.0
REST_S = 0.2  # before the next client, once something ran out


class BoundedSocket(AssociationSocket):
    """The connection of an association, and what it may hold.

    Parameters
    ----------
    association
        Whose it is.
    client
        The other side.
    limits, hold
        What it may send, and who is told of it.
    """

    def __init__(
        self, association: "Association", client: Client, limits: Limits, hold: Hold
    ) -> None:
        super().__init__(association, client_socket=client.connection)
        self.client, self._limits, self._hold, self._held = client, limits, hold, 0

    def recv(self, nr_bytes: int) -> bytearray:
        """Return so many bytes, or what there was when the client went.

        Raises
        ------
        OSError
            If they are too many, or too slow.
        """
        connection, began = self.client.connection, time.monotonic()
        if nr_bytes > LONGEST_PDU:
            raise self._end(f"announced {nr_bytes} bytes at once")
        self.keep(nr_bytes)
        received = bytearray()
        try:
            while len(received) < nr_bytes:
                left_s = began + self._limits.idle_seconds - time.monotonic()
                if left_s <= 0:
                    raise self._end("too slow")
                connection.settimeout(left_s)
                piece = connection.recv(min(PIECE, nr_bytes - len(received)))
                if not piece:
                    break
                received += piece
        finally:
            with suppress(OSError):
                connection.settimeout(self._limits.idle_seconds)
        self.client.silent_since = time.monotonic()
        return received

    def keep(self, size: int) -> None:
        """Count bytes that are held, or with a minus no longer.

        Raises
        ------
        OSError
            If they are too many.
        """
        self._held = max(0, self._held + size)
        if self._held > self._limits.session_bytes:
            raise self._end(f"an object of more than {self._limits.session_bytes} bytes")
        try:
            self._hold(self._held)
        except MemoryLimitError as error:
            raise self._end(str(error)) from None

    def _end(self, reason: str) -> OSError:
        self.client.reason = reason
        return OSError(reason)


class Talk(RequestHandler):
    """One client from its connection to its end, in a thread of its own."""

    server: "Port"

    def handle(self) -> None:
        """Give it its place, shake hands, and let pynetdicom do the rest."""
        server = self.server
        self.client = Client(self.request, str(address_of(self.client_address)), self.remote.port)
        self.client.silent_since = time.monotonic()
        server.talking.add(self.client)
        try:
            self.request.settimeout(HANDSHAKE_S)
            if server.ssl_context is not None:
                self.request.do_handshake()
            self.client.reason = server.places.take(self.client, in_words=True)
            self.request.settimeout(server.limits.idle_seconds)
            with server.budget.share() as self.hold:
                association = self._create_association()
                association.start()
                association.join()
        except OSError as error:
            why = getattr(error, "reason", None) or error.strerror or "no answer"
            self.client.reason = f"no TLS ({why})"
        finally:
            server.places.leave(self.client)
            server.talking.discard(self.client)
            if self.client.reason is not None:
                server.seldom("end", f"{self.client.address}: ended, {self.client.reason}")
            server.shutdown_request(self.request)

    def _create_association(self) -> "Association":
        association = super()._create_association()
        association.dul.event_queue.get_nowait()  # of the socket that this one takes the place of
        association.dul.socket = BoundedSocket(
            association, self.client, self.server.limits, self.hold
        )
        return association


class Port(ThreadedAssociationServer):
    """Listens, and turns away whoever is not allowed or too many.

    Parameters
    ----------
    ae
        What is listened for.
    address
        Host and port.
    tls
        How connections are encrypted, if they are.
    handlers
        What pynetdicom calls, and when.
    limits
        What clients may ask for.
    seldom
        Takes a line about those that are turned away.

    Raises
    ------
    OSError
        If the address cannot be listened on.
    """

    def __init__(
        self,
        ae: "ApplicationEntity",
        address: tuple[str, int],
        tls: ssl.SSLContext | None,
        handlers: "list[EventHandlerType]",
        limits: Limits,
        seldom: Seldom,
    ) -> None:
        self.limits, self.seldom, self.talking = limits, seldom, set[Client]()
        self.places, self.budget = Places(limits), Budget(limits.all_sessions_bytes)
        contexts = ae.supported_contexts
        super().__init__(ae, address, ae.ae_title, contexts, tls, handlers, Talk)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Return a client; its handshake is for its own thread."""
        assert self.socket is not None
        try:
            connection, address = self.socket.accept()
            if self.ssl_context is not None:
                connection = self.ssl_context.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
        except OSError:
            time.sleep(REST_S)
            raise
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether a client may speak."""
        address = address_of(client_address)
        if not self.limits.allows(address):
            self.seldom("allow", f"{address}: refused, its address is not allowed")
            return False
        if len(self.talking) >= 2 * self.limits.clients:
            self.seldom("place", f"{address}: refused, too many connections are open")
            return False
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say that something failed, and nothing of what came."""
        error = sys.exc_info()[1]
        reason = "no reason" if error is None else place_of(error)
        self.seldom("fault", f"{address_of(client_address)}: ended, {reason}")


def address_of(client: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address of a client, of IPv4 where it came over IPv6."""
    address = ipaddress.ip_address(client[0].partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
