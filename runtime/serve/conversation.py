"""What goes on between the server and one client, bounded in time and memory."""

import math
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import numpy as np

from qsm_deploy.kernels.errors import ProtocolError
from qsm_deploy.runtime.serve.budget import Hold
from qsm_deploy.runtime.serve.codec import Buffer, Decoder, close_frame, text_frame
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.mrd_session import MrdSession
from qsm_deploy.runtime.serve.places import Client
from qsm_deploy.runtime.serve.turns import TakingTurns

SCRAP_BYTES = 1 << 16
MOST_LINGERS = 5  # of a client that keeps sending after its session failed


class Conversation:
    """One client, from its first byte to the last of the answer.

    Parameters
    ----------
    client
        Whom with.
    limits
        What it may ask for.
    """

    def __init__(self, client: Client, limits: Limits) -> None:
        self._client, self._connection, self._limits = client, client.connection, limits

    def refuse(self) -> None:
        """Say why the client gets no session.

        Raises
        ------
        OSError
            If it is gone, or too slow.
        """
        self._send([text_frame("ERR", str(self._client.reason)), close_frame()])
        self._hang_up()

    def converse(self, session: MrdSession, reconstructor: TakingTurns, hold: Hold) -> None:
        """Receive a session and answer it.

        Raises
        ------
        OSError
            If the client is gone, or too slow to take the answer.
        """
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # lines at once
        try:
            self._receive(session, hold)
            self._send(session.answer(reconstructor))
        except OSError:
            raise  # there is nobody to tell
        except Exception as error:
            self._send([session.reason(error)])
            if not session.complete:
                self._drain()  # a client that still sends does not take its images
            self._send(session.ending())
        self._hang_up()

    def _receive(self, session: MrdSession, hold: Hold) -> None:
        decoder = Decoder(self._limits)
        deadline = time.monotonic() + self._limits.session_seconds
        while not session.complete:
            message = decoder.feed(self._read(decoder, deadline, session.held_bytes, hold))
            if message is not None:
                session.receive(message)
        self._client.receiving = False

    def _read(self, decoder: Decoder, deadline: float, held: int, hold: Hold) -> memoryview:
        """Return the bytes that the decoder wants next."""
        # memory that was only announced is not touched, and so not taken
        piece, got = np.empty(decoder.wanted, dtype=np.uint8).data, 0
        while got < len(piece):
            try:
                with self._waiting(deadline):
                    count = self._connection.recv_into(piece[got:])
            except TimeoutError:
                raise ProtocolError(
                    f"nothing came for {self._limits.idle_seconds:g} s, or the session took more "
                    f"than {self._limits.session_seconds:g} s"
                ) from None
            if self._client.reason is not None:
                raise ProtocolError(self._client.reason)
            if count == 0:
                raise decoder.ended(got) or ProtocolError("the connection ended without CLOSE (4)")
            got += count
            hold(held + got)
        return piece

    def _send(self, frames: Iterable[Buffer]) -> None:
        spent = 0.0
        limits = self._limits
        for frame in frames:
            view = memoryview(frame)
            while view:
                before = time.monotonic()
                longest = limits.idle_seconds if self._client.reason else limits.session_seconds
                with self._waiting(before + longest - spent):
                    view = view[self._connection.send(view) :]
                spent += time.monotonic() - before

    @contextmanager
    def _waiting(self, deadline: float) -> Iterator[None]:
        """Let the one call within wait for the client as long as the limits allow."""
        now = time.monotonic()
        if now >= deadline:  # a call that need not wait would never time out
            raise TimeoutError("timed out")
        self._connection.settimeout(min(self._limits.idle_seconds, deadline - now))
        self._client.silent_since = now
        try:
            yield
        finally:
            self._client.silent_since = math.inf

    def _hang_up(self) -> None:
        # closing with unread bytes would reset the connection, and with it what is on its way
        self._connection.shutdown(socket.SHUT_WR)
        self._drain()

    def _drain(self) -> None:
        """Take and drop what a client still sends, until it is silent or has sent long enough."""
        deadline = time.monotonic() + MOST_LINGERS * self._limits.linger_seconds
        self._connection.settimeout(self._limits.linger_seconds)
        with suppress(OSError):
            while time.monotonic() < deadline and self._connection.recv(SCRAP_BYTES):
                pass
