"""The memory of all sessions: counted as Python holds it, refused in words, given back."""

import gc
import socket
import struct
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from qsm_deploy.kernels.errors import MemoryLimitError
from qsm_deploy.runtime.serve.budget import Budget
from qsm_deploy.runtime.serve.codec import Decoder, Id
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.mrd_session import MrdSession
from tests.runtime.serve.waiting import wait_until

MIB = 1 << 20
IMAGE = struct.pack("<H", Id.IMAGE)


def meta(values):
    inside = "".join(f"<meta><name>{n}</name><value>{v}</value></meta>" for n, v in values)
    return f"<ismrmrdMeta>{inside}</ismrmrdMeta>".encode()


TEXTS = {
    "none": (b"", 1),
    "few": (meta([("a", 1)]), 1),
    "usual": (meta((f"name{n}", f"value {n}") for n in range(60)), 1000),
    "dense": (b"<ismrmrdMeta><meta><name>n</name>%s</meta></ismrmrdMeta>", 1),
    "broken": (meta((f"name{n}", f"value {n}") for n in range(60))[13:], 1),
    "names": (meta((n, "") for n in range(1000)), 1),
}


class TestShares:
    def test_what_two_hold_is_what_both_have(self):
        budget = Budget(100)
        with budget.share() as here, budget.share() as there:
            here(60)
            with pytest.raises(MemoryLimitError, match="would hold more than 100 bytes"):
                there(50)
            there(40)
            here(10)
            there(90)
            assert budget.held == 100
        assert budget.held == 0

    def test_it_is_given_back_after_an_error(self):
        budget = Budget(100)

        def fail():
            with budget.share() as hold:
                hold(70)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert budget.held == 0

    def test_less_is_never_refused(self):
        budget = Budget(100)
        with budget.share() as hold:
            hold(100)
            hold(99)
            with pytest.raises(MemoryLimitError):
                hold(101)
            assert budget.held == 99


class TestAsHeld:
    """Against what Python says that it allocated."""

    @pytest.fixture
    def stream(self, mrd_images, image_message):
        def make(text, pixels, count):
            image = mrd_images(np.zeros((pixels, 1, 1), dtype=np.float32))[0]
            return image_message(image, text) * count

        return make

    @staticmethod
    def receive(data):
        """Do what the server does with a stream, every byte in memory of its own."""
        decoder, session, position = Decoder(Limits()), MrdSession(Limits()), 0
        while position < len(data):
            piece = np.empty(decoder.wanted, dtype=np.uint8).data
            piece[:] = data[position : position + len(piece)]
            position += len(piece)
            if (message := decoder.feed(piece)) is not None:
                session.receive(message)
        return session

    @pytest.mark.parametrize("name", TEXTS)
    def test_images(self, stream, name):
        text, pixels = TEXTS[name]
        if name == "dense":
            text %= b"<value>ab</value>" * 3000
        data = stream(text, min(pixels, 1000), 60)
        self.require_counted(data)

    @pytest.mark.parametrize(
        "element", ["<a%d/>", "<a>%d</a>", "<a%d>some longer text of an element</a%d>"]
    )
    def test_headers(self, element):
        inside = "".join(element.replace("%d", str(n)) for n in range(5000))
        text = f"<ismrmrdHeader><g>{inside}</g></ismrmrdHeader>".encode()
        self.require_counted(struct.pack("<HI", Id.HEADER, len(text)) + text)

    def require_counted(self, data):
        self.receive(data)  # what is made once
        gc.collect()
        tracemalloc.start()
        try:
            session = self.receive(data)
            gc.collect()
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert 0.95 * taken < session.held_bytes < 1.3 * taken + 20_000

    def test_a_text_that_replaces_another_is_counted_once(self):
        text = b"<ismrmrdHeader><g>" + b"<a>b</a>" * 100 + b"</g></ismrmrdHeader>"
        message = struct.pack("<HI", Id.HEADER, len(text)) + text
        assert self.receive(message * 50).held_bytes == self.receive(message).held_bytes
        config = struct.pack("<HI", Id.CONFIG_TEXT, 4000) + b"x" * 4000
        file = struct.pack("<H", Id.CONFIG_FILE) + b"qsm".ljust(1024, b"\0")
        assert self.receive(config + file).held_bytes == self.receive(file).held_bytes


class TestTogether:
    @pytest.fixture
    def big(self, dipole_stream, serialise, mrd_images):
        """Return a session of 1.3 MB without its end, as sent and as held."""
        start = dipole_stream[: dipole_stream.index(IMAGE)]
        volume = np.zeros((64, 64, 80), dtype=np.float32)
        return start + serialise(*mrd_images(volume))

    def test_what_all_hold_is_bounded(self, serve, quick, big, is_well):
        """Each is within its own limit; the one too many has what came back, others go on."""
        limits = replace(quick, all_sessions_bytes=3 * MIB, idle_seconds=20, clients=16)
        running = serve(limits)
        budget = running.server.budget
        with running.connect() as first, running.connect() as second:
            first.sendall(big)
            second.sendall(big)
            wait_until(lambda: budget.held > 2 * len(big))
            assert budget.held < 1.3 * 2 * len(big)
            answer = running.talk(big + struct.pack("<H", 4))
            assert len(answer.errors) == 1
            assert "all sessions together would hold more than 3145728 bytes" in answer.errors[0]
            assert 0 < len(answer.images) < 80
            assert answer.closed
            with first.makefile("rb") as stream:  # not one of these was harmed
                first.sendall(struct.pack("<H", 4))
                assert stream.read().endswith(struct.pack("<H", 4))
        wait_until(lambda: budget.held == 0)
        is_well(running)

    def test_what_was_announced_only_is_not_held(self, serve, quick, dipole_stream):
        running = serve(replace(quick, all_sessions_bytes=MIB, text_bytes=1 << 29))
        with running.connect() as connection:
            connection.sendall(struct.pack("<HI", 5, 1 << 28) + b"x" * 1000)
            wait_until(lambda: running.server.budget.held == 1000)
            assert running.talk(dipole_stream).errors == []

    def test_half_a_message_is_held(self, serve, quick, is_well):
        running = serve(replace(quick, all_sessions_bytes=MIB, text_bytes=1 << 29))
        with running.connect() as connection, connection.makefile("rb") as stream:
            connection.sendall(struct.pack("<HI", 5, 1 << 28) + b"x" * (2 * MIB))
            connection.shutdown(socket.SHUT_WR)
            assert b"all sessions together" in stream.read()
        wait_until(lambda: running.server.budget.held == 0)
        is_well(running)

    @pytest.mark.parametrize("end", ["cut", "garbage", "reset", "bug", "whole"])
    def test_it_is_given_back_however_a_session_ends(
        self, serve, engine, dipole_stream, monkeypatch, end
    ):
        running = serve()
        if end == "bug":
            monkeypatch.setattr(engine.session, "run", lambda tensors: 1 / 0)
        tail = {"cut": dipole_stream[-5000:-300], "garbage": b"\xff" * 99}.get(end, b"")
        with running.connect() as connection:
            if end == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stop = None if end in ("bug", "whole") else -2
            connection.sendall(dipole_stream[:stop] + tail)
        wait_until(lambda: running.log)
        wait_until(lambda: running.server.budget.held == 0)

    def test_the_default_is_half_of_what_is_free(self, monkeypatch):
        name = "qsm_deploy.runtime.reconstruction.memory.available_bytes"
        monkeypatch.setattr(name, lambda: 1000)
        assert Limits().all_sessions_bytes == 500

    def test_many_threads_lose_nothing(self):
        budget = Budget(1 << 40)

        def work():
            for n in range(300):
                with budget.share() as hold:
                    hold(n)
                    hold(2 * n)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert budget.held == 0
