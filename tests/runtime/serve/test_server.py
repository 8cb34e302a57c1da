"""Clients that misbehave: the server says why where it can, stays up, and keeps no memory."""

import io
import socket
import struct
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.console.peak_memory import return_freed_memory, rss_bytes
from qsm_deploy.runtime.reconstructor import Host
from qsm_deploy.runtime.serve.codec import Decoder
from qsm_deploy.runtime.serve.conversation import Conversation
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.mrd_session import MrdSession
from qsm_deploy.runtime.serve.places import Client
from qsm_deploy.runtime.serve.server import MrdServer
from qsm_deploy.runtime.serve.turns import TakingTurns, open_taking_turns
from tests.runtime.serve.waiting import wait_until

import ismrmrd  # isort: skip  # after the codec, which keeps it from changing the warnings
from ismrmrd.serialization import ConfigFile  # isort: skip

CHI_SERIES = 99
SOAK_GROWTH = 0.05
few_and_many = pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])


def test_a_session_and_its_health_line(serve, is_well):
    running = serve()
    is_well(running)
    wait_until(lambda: running.log)
    (line,) = running.log
    assert "dipole, 12x10x8, voxel (1, 1, 2) mm" in line
    assert "8 images" in line
    assert "ok; 1 sessions, 0 failed" in line
    assert line.endswith("MiB")


class TestFaults:
    """A TEXT with the reason, the images that came, CLOSE; then the next client is served."""

    @pytest.mark.parametrize(
        ("end", "match"),
        [
            (b"", "the connection ended without CLOSE"),
            (struct.pack("<H", 4242), "unknown message id 4242"),
            (struct.pack("<HI", 5, 2**32 - 1), "announces 4294967295 bytes"),
            (struct.pack("<H", 1022) + b"\xff" * 206, "data type 65535"),
            (struct.pack("<H", 1022) + b"\x01" * 100, "ends in the header of a message IMAGE"),
            (b"\x04", "ends in the id of a message"),
        ],
    )
    def test_after_the_images(self, serve, dipole_stream, is_well, end, match):
        running = serve()
        answer = running.talk(dipole_stream[:-2] + end)
        assert len(answer.errors) == 1
        assert match in answer.errors[0]
        assert len(answer.images) == 8
        is_well(running)

    def test_a_client_that_waits_for_the_answer_with_its_side_open(self, serve, dipole_stream):
        running = serve()
        with running.connect() as connection, connection.makefile("rb") as stream:
            connection.sendall(dipole_stream[:-2] + struct.pack("<H", 4242))
            assert b"ERR unknown message id 4242" in stream.read()

    def test_a_client_that_goes_on_sending_after_its_error(self, serve, dipole_stream, is_well):
        running = serve()
        with running.connect() as connection, connection.makefile("rb") as stream:
            connection.sendall(dipole_stream[:-2] + struct.pack("<H", 4242) + bytes(1 << 20))
            connection.shutdown(socket.SHUT_WR)
            answer = stream.read()
        assert answer.endswith(struct.pack("<H", 4))
        assert b"unknown message id 4242" in answer
        is_well(running)

    def test_gone_at_every_message_boundary(self, serve, quick, dipole_stream, boundaries, is_well):
        running = serve(replace(quick, clients=64))
        ends = [0, *boundaries(dipole_stream)]
        for end in ends:
            with running.connect() as connection:
                connection.sendall(dipole_stream[:end])
        wait_until(lambda: len(running.log) == len(ends))
        assert not [line for line in running.log if "Error(" in line]  # nothing but known reasons
        is_well(running)

    @few_and_many
    def test_random_corruptions(self, serve, dipole_stream, is_well, count):
        running, rng = serve(), np.random.default_rng(1)
        failed = 0
        for _ in range(count):
            data = bytearray(dipole_stream)
            for position in rng.integers(0, len(data), rng.integers(1, 12)):
                data[position] = rng.integers(0, 256)
            answer = running.talk(bytes(data))
            assert answer.closed
            failed += bool(answer.errors)
            assert answer.errors or len(answer.series(CHI_SERIES)) == 8
        assert count / 20 < failed < count
        is_well(running)

    def test_a_bug_is_told_too(self, serve, engine, dipole_stream, is_well, capsys):
        running = serve()
        run, engine.session.run = engine.session.run, lambda tensors: 1 / 0
        answer = running.talk(dipole_stream)
        assert answer.errors == ["ERR ZeroDivisionError('division by zero')"]
        assert len(answer.images) == 8
        wait_until(lambda: running.log)
        assert "ZeroDivisionError" in capsys.readouterr().err
        engine.session.run = run
        is_well(running)


class TestBugs:
    """Whatever goes wrong and wherever: the images once, byte for byte, CLOSE, one line."""

    ERRORS = (
        OSError(28, "No space"),
        MemoryError(),
        KeyError("\x1b"),
        RecursionError(),
        StopIteration(),
    )

    @pytest.fixture
    def images_come_back(self, serve, dipole_stream, boundaries, is_well, monkeypatch):
        """Return a function that tries a session; afterwards the next one is served."""

        def check(said, last=b""):
            start, *_, end = boundaries(dipole_stream)[2:-1]  # of the images
            running = serve()
            with running.connect() as connection, connection.makefile("rb") as stream:
                connection.sendall(dipole_stream[:-2] + last + dipole_stream[-2:])
                connection.shutdown(socket.SHUT_WR)
                answer = stream.read()
            assert answer.endswith(struct.pack("<H", 4))
            assert answer.count(dipole_stream[start:end]) == 1
            assert answer.count(b"ERR ") == 1
            assert said in answer
            wait_until(lambda: running.log)
            (line,) = running.log
            assert "8 images" in line
            assert "failed: " in line
            assert line.isprintable()
            monkeypatch.undo()
            is_well(running)

        return check

    @pytest.mark.parametrize("error", ERRORS, ids=repr)
    @pytest.mark.parametrize(
        "place",
        [
            "mrd_session.parse_header",
            "mrd_session.parameters_from",
            "mrd_session.require_config",
            "dipole_config.field_volume",
            "turns.TakingTurns.make",
            "mrd_session.encode_chi",
            "mrd_session.chi_frames",
        ],
    )
    def test_a_step_that_fails(self, images_come_back, monkeypatch, place, error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(f"qsm_deploy.runtime.serve.{place}", fail)
        said = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        images_come_back(said.encode())

    def test_a_network_that_fails(self, images_come_back, engine, monkeypatch):
        monkeypatch.setattr(engine.session, "run", lambda tensors: Path("/no/library").stat())
        images_come_back(b"No such file")

    @pytest.mark.parametrize("error", [MemoryError(), KeyError("\x1b")], ids=repr)
    def test_a_message_after_the_images(self, images_come_back, serialise, monkeypatch, error):
        def fail(*_):
            raise error

        monkeypatch.setattr(Decoder, "_waveform_head", fail)
        wave = serialise(ismrmrd.Waveform.from_array(np.ones((3, 5), dtype=np.uint32)))
        images_come_back(b"memory" if isinstance(error, MemoryError) else b"KeyError", wave)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_log_that_fails(self, engine, quick, dipole_stream):
        def log(line):
            raise OSError("no space for the log")

        server = MrdServer("127.0.0.1", 0, engine, quick, log)
        thread = threading.Thread(target=server.serve)
        thread.start()
        for _ in range(2 * quick.clients + 1):
            with socket.create_connection(server.address, timeout=20) as connection:
                connection.sendall(dipole_stream)
                connection.shutdown(socket.SHUT_WR)
                with connection.makefile("rb") as stream:
                    assert stream.read().endswith(struct.pack("<H", 4))
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


class TestTime:
    def test_a_silent_client(self, serve, quick, dipole_stream, is_well):
        running = serve(replace(quick, idle_seconds=1))
        with running.connect() as connection, connection.makefile("rb") as stream:
            connection.sendall(dipole_stream[:5000])
            assert b"ERR nothing came for 1 s" in stream.read()
        is_well(running)

    def test_a_client_that_sends_drop_by_drop(self, serve, quick, dipole_stream):
        running = serve(replace(quick, idle_seconds=5, session_seconds=0.6))
        with running.connect() as connection, connection.makefile("rb") as stream:
            began = time.monotonic()
            while time.monotonic() < began + 0.8:
                connection.sendall(dipole_stream[:1])
                dipole_stream = dipole_stream[1:]
                time.sleep(0.05)
            assert b"took more than 0.6 s" in stream.read()

    @pytest.mark.parametrize("way", ["sends", "takes"])
    def test_a_client_that_never_lets_the_server_wait(self, engine, dipole_stream, way):
        """No call times out, and the time of the session ends nevertheless."""
        limits = Limits(session_seconds=1, all_sessions_bytes=1 << 30)
        began, stream = time.monotonic(), io.BytesIO(dipole_stream)
        note = struct.pack("<HI", 5, 1) + b"."

        def receive(place):
            assert time.monotonic() - began < 5
            if way == "sends" and stream.tell() == len(dipole_stream) - 2:
                place[:] = (note * 2)[receive.at : receive.at + len(place)]
                receive.at = (receive.at + len(place)) % len(note)
                return len(place)
            return stream.readinto(place)

        def send(view):
            assert time.monotonic() - began < 5
            if way == "sends":
                return len(view)
            time.sleep(0.001)  # or a fast machine has sent all of it in time
            return 1

        receive.at = 0
        connection = Mock(recv_into=receive, send=send, recv=lambda size: b"")
        session, client = MrdSession(limits), Client(connection, "10.0.0.1", 1)
        expected = pytest.raises(TimeoutError) if way == "takes" else nullcontext()
        with expected:
            Conversation(client, limits).converse(session, engine, lambda size: None)
        assert session.complete == (way == "takes")
        assert session.complete or "took more than 1 s" in session.error

    @pytest.mark.parametrize("pause", [0, 0.05], ids=["at once", "drop by drop"])
    def test_a_client_that_takes_too_long_to_read(
        self, serve, quick, serialise, mrd_images, mrd_header, pause
    ):
        """As long as it takes something it is not silent; its time ends nevertheless."""
        volume = np.zeros((200, 200, 60), dtype=np.float32)
        start = serialise(ConfigFile("dipole"), mrd_header(), {"units": "ppm"})
        running = serve(replace(quick, idle_seconds=5, session_seconds=1.0))
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(running.server.address)
            connection.sendall(start + serialise(*mrd_images(volume), None))
            while not running.log and pause:
                connection.recv(100)
                time.sleep(pause)
            wait_until(lambda: running.log)
        (line,) = running.log
        assert "the client is gone (timed out)" in line
        assert float(line.split(" images, ")[1].split(" s")[0]) < 4

    def test_a_client_that_never_reads(
        self, serve, quick, serialise, mrd_images, mrd_header, is_well
    ):
        volume = np.random.default_rng(0).standard_normal((200, 200, 60), dtype=np.float32) * 0.01
        start = serialise(ConfigFile("dipole"), mrd_header(), {"units": "ppm"})
        stream = start + serialise(*mrd_images(volume), None)
        running = serve(replace(quick, idle_seconds=0.5))
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(running.server.address)
            connection.sendall(stream)
            wait_until(lambda: running.log)
        assert "the client is gone (timed out)" in running.log[0]
        is_well(running)

    def test_a_client_that_vanishes_while_its_map_is_made(
        self, serve, engine, dipole_stream, is_well
    ):
        engine.session.gate.clear()
        running = serve()
        with running.connect() as connection:
            connection.sendall(dipole_stream)
            assert engine.session.entered.wait(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        engine.session.gate.set()
        wait_until(lambda: running.log)
        assert "failed: the client is gone" in running.log[0]
        is_well(running)


class TestTogether:
    def test_two_clients_queue_on_one_engine(self, serve, engine, dipole_stream):
        running, answers = serve(), []
        engine.session.gate.clear()
        clients = [
            threading.Thread(target=lambda: answers.append(running.talk(dipole_stream)))
            for _ in range(2)
        ]
        clients[0].start()
        assert engine.session.entered.wait(10)
        clients[1].start()
        time.sleep(0.3)
        assert answers == []
        engine.session.gate.set()
        for client in clients:
            client.join(20)
        assert [(a.errors, len(a.series(CHI_SERIES))) for a in answers] == 2 * [([], 8)]
        waiting = "INFO another session is being reconstructed; waiting"
        assert sum(waiting in answer.texts for answer in answers) == 1

    def test_one_that_is_slow_to_read_holds_nobody_up(self, serve, dipole_stream, is_well):
        running = serve()
        with running.connect() as slow:
            slow.sendall(dipole_stream)  # and does not read
            is_well(running)

    def test_more_clients_than_allowed(self, serve, quick, dipole_stream, is_well):
        running = serve(replace(quick, clients=1))
        with running.connect() as first, first.makefile("rb") as stream:
            time.sleep(0.1)
            with running.connect() as second, second.makefile("rb") as refused:
                assert b"1 sessions of 127.0.0.1 are open, as many as allowed" in refused.read()
            first.sendall(dipole_stream)
            first.shutdown(socket.SHUT_WR)
            assert stream.read().endswith(struct.pack("<H", 4))
        wait_until(lambda: any("ok" in line for line in running.log))
        time.sleep(0.1)
        is_well(running)


class TestStopping:
    def test_the_running_volume_is_finished(self, serve, engine, dipole_stream):
        running, answers = serve(), []
        engine.session.gate.clear()
        client = threading.Thread(target=lambda: answers.append(running.talk(dipole_stream)))
        client.start()
        assert engine.session.entered.wait(10)
        running.server.stop()
        time.sleep(0.2)
        with pytest.raises(OSError, match="refused"):
            running.connect().close()
        assert running.thread.is_alive()
        engine.session.gate.set()
        client.join(20)
        running.thread.join(20)
        assert not running.thread.is_alive()
        assert (answers[0].errors, len(answers[0].series(CHI_SERIES))) == ([], 8)

    def test_a_session_that_is_still_being_sent_ends(self, serve, dipole_stream):
        running = serve()
        with running.connect() as connection, connection.makefile("rb") as stream:
            connection.sendall(dipole_stream[:5000])
            time.sleep(0.2)
            running.server.stop()
            answer = stream.read()
        assert b"ERR the server is shutting down" in answer
        assert answer.endswith(struct.pack("<H", 4))
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_an_address_in_use(serve, engine, quick):
    host, port = serve().server.address
    with pytest.raises(UsageError, match="cannot listen on"):
        MrdServer(host, port, engine, quick)


@pytest.mark.slow
def test_memory_does_not_grow(serve, dipole_stream):
    """Valid, truncated and corrupt sessions in turn, after as many as fill every cache."""
    running, rng = serve(), np.random.default_rng(3)

    def sessions(count):
        for n in range(count):
            data = bytearray(dipole_stream)
            if n % 4 == 1:
                data = data[: rng.integers(0, len(data))]
            elif n % 4 == 3:
                data[rng.integers(0, len(data))] ^= 255
            assert running.talk(bytes(data)).closed
        wait_until(lambda: not running.server._threads)
        return_freed_memory()
        return rss_bytes()

    before = sessions(50)
    assert sessions(200) < (1 + SOAK_GROWTH) * before


def test_the_engine_is_opened_once_and_warmed_up(card, write_model):
    engine = open_taking_turns([write_model(card)], Host("onnxruntime"))
    assert isinstance(engine, TakingTurns)
    assert engine.name.startswith("twice fp32, onnxruntime ")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"task": "phase->chi", "inputs": "phase_rad"},
            "takes phase_rad and gives chi_ppm; the",
        ),
        (
            {"inputs": 2},
            "takes 2 fields and gives chi_ppm; the server needs a network of",
        ),
    ],
)
def test_networks_that_are_not_for_the_server(card, write_model, change, match):
    from qsm_deploy.runtime.card.card import TensorInfo

    inputs = change.pop("inputs")
    if inputs == 2:
        change["inputs"] = (TensorInfo("local_field_ppm", "ppm", ("n", 2, "x", "y", "z")),)
    else:
        change["inputs"] = (TensorInfo(inputs, "rad", ("n", 1, "x", "y", "z")),)
    with pytest.raises(UsageError, match=match):
        open_taking_turns([write_model(replace(card, **change))], Host("onnxruntime"))
