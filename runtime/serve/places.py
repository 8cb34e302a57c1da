"""Who is connected, and who makes room when there are too many."""

import ipaddress
import math
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from qsm_deploy.runtime.serve.limits import Limits

V6_HOST_BITS = 64  # whoever has one address of such a network has all of them


@dataclass(eq=False)
class Client:
    """A connection.

    Attributes
    ----------
    connection, address, port
        Its socket, and the other end's.
    receiving
        Whether it is still sending its session.
    silent_since
        When the server began to wait for it; infinite while the server does not.
    reason
        Why the server ends it, if it does.
    """

    connection: socket.socket
    address: str
    port: int
    receiving: bool = True
    silent_since: float = math.inf
    reason: str | None = None

    @property
    def machine(self) -> int:
        """What the addresses of one machine have in common."""
        address = ipaddress.ip_address(self.address)
        return int(address) >> (V6_HOST_BITS if address.version == 6 else 0)

    def end(self, reason: str, *, in_words: bool) -> None:
        """Wake the thread that waits for it, and let that say why where the client listens."""
        self.reason = reason
        with suppress(OSError):
            listens = in_words and self.receiving
            self.connection.shutdown(socket.SHUT_RD if listens else socket.SHUT_RDWR)


class Places:
    """As many as there may be sessions; a machine has some of them at most."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._lock = limits, threading.Lock()
        self._held: set[Client] = set()

    def take(self, client: Client, *, in_words: bool) -> str | None:
        """Give a client a place, that of the one silent for longest if need be.

        Parameters
        ----------
        client
            The new one.
        in_words
            Whether who makes room may take the time to be told, and to take its images back.

        Returns
        -------
        str or None
            Why it gets none.
        """
        with self._lock:
            near = {other for other in self._held if other.machine == client.machine}
            for crowd, most, whose in (
                (near, self._limits.clients_of_one, f" of {client.address}"),
                (self._held, self._limits.clients, ""),
            ):
                if len(crowd) >= most and not self._make_room(crowd, in_words=in_words):
                    return f"{most} sessions{whose} are open, as many as allowed; try later"
            self._held.add(client)
        return None

    def leave(self, client: Client) -> None:
        """Take a client's place back, if it has one."""
        with self._lock:
            self._held.discard(client)

    def end_receiving(self, reason: str) -> None:
        """End those that are still being received."""
        with self._lock:
            for client in self._held:
                if client.receiving:
                    client.end(reason, in_words=True)

    def _make_room(self, crowd: set[Client], *, in_words: bool) -> bool:
        client = min(crowd, key=lambda one: one.silent_since)
        silence = time.monotonic() - client.silent_since
        if silence < self._limits.yield_seconds:
            return False
        self._held.discard(client)
        client.end(f"silent for {silence:.1f} s, and another needs the place", in_words=in_words)
        return True
