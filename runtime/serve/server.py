"""The port, and one thread for each client; what runs out is refused, and tried again later."""

import errno
import ipaddress
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.peak_memory import return_freed_memory, rss_bytes
from qsm_deploy.runtime.serve.budget import Budget
from qsm_deploy.runtime.serve.codec import close_frame, text_frame
from qsm_deploy.runtime.serve.conversation import Conversation
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.mrd_session import MrdSession
from qsm_deploy.runtime.serve.places import Client, Places
from qsm_deploy.runtime.serve.seldom import Seldom
from qsm_deploy.runtime.serve.turns import TakingTurns

BACKLOG = 16
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
REST_SECONDS = 0.2  # before the next client, once something ran out
STOPPING = "the server is shutting down"


class MrdServer:
    """Listens, and answers every session with the same reconstructor.

    The port is open when the constructor returns.

    Parameters
    ----------
    host, port
        Where to listen; port 0 takes a free one.
    reconstructor
        Loaded and warmed up.
    limits
        What a client may ask for.
    log
        Takes a line about every session.

    Attributes
    ----------
    address
        Host and port that it listens on.
    budget
        The memory of its sessions.

    Raises
    ------
    UsageError
        If the address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        reconstructor: TakingTurns,
        limits: Limits,
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._reconstructor, self._limits, self._log = reconstructor, limits, log
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port} ({error.strerror}); pass another --host or --port"
            ) from None
        self._listener.setblocking(False)  # a client may be gone before it is accepted
        name = self._listener.getsockname()
        self.address = str(name[0]), int(name[1])
        self.budget = Budget(limits.all_sessions_bytes)
        self._wake, self._woken = socket.socketpair()
        self._spare = socket.socket()  # its descriptor serves to refuse who comes when none is left
        self._seldom = Seldom(log)
        self._places = Places(limits)
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._stopping = False
        self._served = self._failed = 0

    def serve(self) -> None:
        """Answer sessions until :meth:`stop`, then finish those that are being answered."""
        resting = False
        while not self._stopping:
            watched = [self._woken] if resting else [self._woken, self._listener]
            ready, _, _ = select.select(watched, [], [], REST_SECONDS if resting else None)
            resting = self._listener in ready and not self._stopping and not self._accept()
        self._listener.close()
        self._places.end_receiving(STOPPING)
        while threads := list(self._threads):
            for thread in threads:
                thread.join()
        for end in (self._woken, self._wake, self._spare):
            end.close()

    def stop(self) -> None:
        """Take no more sessions; those still being received end, those being answered do not."""
        self._stopping = True
        with suppress(OSError):
            self._wake.send(b"!")

    def _accept(self) -> bool:
        """Take the next client and return whether there were the means to."""
        try:
            connection, (address, port, *_) = self._listener.accept()
        except OSError as error:
            if error.errno not in EXHAUSTED:
                return True  # the client is gone already
            self._spare.close()
            with suppress(OSError):
                self._turn_away(self._listener.accept()[0], f"{error.strerror}; try later")
            with suppress(OSError):
                self._spare = socket.socket()
            self._seldom("accept", f"refusing clients: {error.strerror}")
            return False
        return self._welcome(Client(connection, address, port))

    def _welcome(self, client: Client) -> bool:
        """Give a client its place and its thread, or tell it to come back."""
        name = f"{client.address}:{client.port}"
        if not self._limits.allows(ipaddress.ip_address(client.address)):
            client.connection.close()
            self._seldom("allow", f"{name}: refused, its address is not allowed")
            return True
        crowded = len(self._threads) >= 2 * self._limits.clients
        client.reason = self._places.take(client, in_words=not crowded)
        if client.reason is None:
            return self._start(self._handle, client)
        self._seldom("place", f"{name}: refused, {client.reason}")
        if crowded:
            self._turn_away(client.connection, client.reason)
            return True
        return self._start(self._refuse, client)

    def _start(self, talk: Callable[[Client], None], client: Client) -> bool:
        """Run a conversation in its thread and return whether there was one."""

        def run() -> None:
            try:
                with client.connection:
                    try:
                        talk(client)
                    finally:
                        self._places.leave(client)
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            self._threads.discard(thread)
            self._places.leave(client)
            self._turn_away(client.connection, "no thread for another session; try later")
            self._seldom("thread", f"refusing clients: {error}")
            return False
        return True

    def _turn_away(self, connection: socket.socket, line: str) -> None:
        """Refuse a client without waiting for it, in words if it is quick to take them."""
        with connection, suppress(OSError):
            connection.setblocking(False)
            connection.send(text_frame("ERR", line) + close_frame())

    def _refuse(self, client: Client) -> None:
        with suppress(OSError):
            Conversation(client, self._limits).refuse()

    def _handle(self, client: Client) -> None:
        began = time.monotonic()
        session = MrdSession(self._limits)
        with self.budget.share() as hold:
            try:
                Conversation(client, self._limits).converse(session, self._reconstructor, hold)
            except OSError as error:
                gone = client.reason or f"the client is gone ({error})"
                session.error = session.error or gone
            finally:
                self._report(session, client, time.monotonic() - began)
                session.images.clear()
        return_freed_memory()

    def _report(self, session: MrdSession, client: Client, seconds: float) -> None:
        with self._lock:
            self._served += 1
            self._failed += session.error is not None
            counts = f"{self._served} sessions, {self._failed} failed"
        sys.stderr.write(session.trace)
        result = "ok" if session.error is None else f"failed: {session.error}"
        self._log(
            f"{client.address}:{client.port}: {session.summary}; {len(session.images)} images, "
            f"{seconds:.2f} s, {result}; {counts}, {rss_bytes() / 2**20:.0f} MiB"
        )
