"""The sockets: one thread for each host, bounded in number, time and memory."""

import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np

from qsm_deploy.kernels.errors import ProtocolError, UsageError
from qsm_deploy.runtime.console.peak_memory import return_freed_memory, rss_bytes
from qsm_deploy.runtime.serve.codec import Buffer, Decoder, close_frame, text_frame
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.mrd_session import MrdSession
from qsm_deploy.runtime.serve.turns import TakingTurns

SCRAP_BYTES = 1 << 16
BACKLOG = 16
MOST_LINGERS = 5  # of a client that keeps sending after its session failed


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
        name = self._listener.getsockname()
        self.address = str(name[0]), int(name[1])
        self._wake, self._woken = socket.socketpair()
        self._lock = threading.Lock()
        self._receiving: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._stopping = False
        self._served = self._failed = 0

    def serve(self) -> None:
        """Answer sessions until :meth:`stop`, then finish those that are being answered."""
        while not self._stopping:
            ready, _, _ = select.select([self._listener, self._woken], [], [])
            if self._listener in ready and not self._stopping:
                with suppress(OSError):  # the client is gone already
                    connection, peer = self._listener.accept()
                    self._welcome(connection, f"{peer[0]}:{peer[1]}")
        self._listener.close()
        while threads := list(self._threads):
            for thread in threads:
                thread.join()
        self._woken.close()
        self._wake.close()

    def stop(self) -> None:
        """Take no more sessions; those still being received end, those being answered do not."""
        self._stopping = True
        with suppress(OSError):
            self._wake.send(b"!")
        with self._lock:
            for connection in self._receiving:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)

    def _welcome(self, connection: socket.socket, peer: str) -> None:
        """Give a client its thread; tell it to come back if there are too many already."""
        others = len(self._threads)
        if others >= 2 * self._limits.clients:
            connection.close()
            return
        handle = self._refuse if others >= self._limits.clients else self._handle

        def run() -> None:
            try:
                handle(connection, peer)
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # no more threads in this process; the next client may have one
            self._threads.discard(thread)
            connection.close()

    def _refuse(self, connection: socket.socket, peer: str) -> None:
        line = f"{self._limits.clients} sessions are open, as many as allowed; try later"
        with connection, suppress(OSError):
            self._send(connection, [text_frame("ERR", line), close_frame()])
            self._hang_up(connection)
        self._log(f"{peer}: refused, {self._limits.clients} sessions are open")

    def _handle(self, connection: socket.socket, peer: str) -> None:
        began = time.monotonic()
        session = MrdSession(self._limits)
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # lines at once
                self._converse(connection, session)
        except OSError as error:
            session.error = session.error or f"the client is gone ({error})"
        finally:
            self._report(session, peer, time.monotonic() - began)
            session.images.clear()
            return_freed_memory()

    def _converse(self, connection: socket.socket, session: MrdSession) -> None:
        try:
            self._receive(connection, session)
            self._send(connection, session.answer(self._reconstructor))
        except OSError:
            raise  # there is nobody to tell
        except Exception as error:
            stopped = isinstance(error, ProtocolError) and self._stopping
            reason = ProtocolError("the server is shutting down") if stopped else error
            self._send(connection, [session.reason(reason)])
            if not session.complete:
                self._drain(connection)  # a client that still sends does not take its images
            self._send(connection, session.ending())
        self._hang_up(connection)

    def _receive(self, connection: socket.socket, session: MrdSession) -> None:
        with self._lock:
            self._receiving.add(connection)
        decoder = Decoder(self._limits)
        deadline = time.monotonic() + self._limits.session_seconds
        try:
            while not session.complete and not self._stopping:
                piece = self._read(connection, decoder, deadline)
                message = decoder.feed(piece)
                if message is not None:
                    session.receive(message)
        finally:
            with self._lock:
                self._receiving.discard(connection)
        if not session.complete:
            raise ProtocolError("the server is shutting down")

    def _read(self, connection: socket.socket, decoder: Decoder, deadline: float) -> memoryview:
        """Return the bytes that the decoder wants next."""
        # memory that was only announced is not touched, and so not taken
        piece, got = np.empty(decoder.wanted, dtype=np.uint8).data, 0
        while got < len(piece):
            self._allow(connection, deadline)
            try:
                count = connection.recv_into(piece[got:])
            except TimeoutError:
                raise ProtocolError(
                    f"nothing came for {self._limits.idle_seconds:g} s, or the session took more "
                    f"than {self._limits.session_seconds:g} s"
                ) from None
            if count == 0:
                raise decoder.ended(got) or ProtocolError("the connection ended without CLOSE (4)")
            got += count
        return piece

    def _send(self, connection: socket.socket, frames: Iterable[Buffer]) -> None:
        spent = 0.0
        for frame in frames:
            view = memoryview(frame)
            while view:
                before = time.monotonic()
                self._allow(connection, before + self._limits.session_seconds - spent)
                view = view[connection.send(view) :]
                spent += time.monotonic() - before

    def _allow(self, connection: socket.socket, deadline: float) -> None:
        """Let the next call wait as long as the limits allow."""
        left = deadline - time.monotonic()
        connection.settimeout(max(1e-3, min(self._limits.idle_seconds, left)))

    def _hang_up(self, connection: socket.socket) -> None:
        # closing with unread bytes would reset the connection, and with it what is on its way
        connection.shutdown(socket.SHUT_WR)
        self._drain(connection)

    def _drain(self, connection: socket.socket) -> None:
        """Take and drop what a client still sends, until it is silent or has sent long enough."""
        deadline = time.monotonic() + MOST_LINGERS * self._limits.linger_seconds
        connection.settimeout(self._limits.linger_seconds)
        with suppress(OSError):
            while time.monotonic() < deadline and connection.recv(SCRAP_BYTES):
                pass

    def _report(self, session: MrdSession, peer: str, seconds: float) -> None:
        with self._lock:
            self._served += 1
            self._failed += session.error is not None
            counts = f"{self._served} sessions, {self._failed} failed"
        sys.stderr.write(session.trace)
        result = "ok" if session.error is None else f"failed: {session.error}"
        self._log(
            f"{peer}: {session.summary}; {len(session.images)} images, {seconds:.2f} s, {result}; "
            f"{counts}, {rss_bytes() / 2**20:.0f} MiB"
        )
