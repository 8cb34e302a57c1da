"""Descriptors, threads and a full log: the server refuses, says so now and then, and goes on."""

import errno
import os
import signal
import socket
import threading

from qsm_deploy.runtime.serve import seldom
from qsm_deploy.runtime.serve.server import MrdServer
from tests.runtime.serve.waiting import wait_until

CLOSE = b"\x04\x00"


def no_thread(thread):
    raise RuntimeError("can't start new thread")


def read_all(connection):
    with connection.makefile("rb") as stream:
        return stream.read()


def test_no_thread_for_a_client(serve, is_well, monkeypatch):
    running = serve()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        for _ in range(20):  # more than there are places: they are given back
            with running.connect() as connection:
                answer = read_all(connection)
            assert b"ERR no thread for another session; try later" in answer
            assert answer.endswith(CLOSE)
    assert running.log == ["refusing clients: can't start new thread"]
    is_well(running)


def test_few_descriptors(server_process, dipole_stream):
    """More clients than descriptors: those beyond are told, and the places are free again."""
    flags = ("--max-clients", "200", "--idle-seconds", "100")
    with server_process(*flags, descriptors=48, failing=True) as (process, port, log):
        clients = [socket.create_connection(("127.0.0.1", port), timeout=90) for _ in range(50)]
        refused = read_all(clients[-1])
        assert b"ERR Too many open files; try later" in refused
        assert refused.endswith(CLOSE)
        assert process.poll() is None
        for client in clients:
            client.close()

        def answered():
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(dipole_stream)
                connection.shutdown(socket.SHUT_WR)
                answer = read_all(connection)
            return answer if b"try later" not in answer else None

        assert b"ERR" not in wait_until(answered)
        process.send_signal(signal.SIGTERM)
    assert log.text.count("refusing clients: Too many open files") == 1


def test_descriptors_that_even_the_spare_one_does_not_replace(serve, is_well, monkeypatch):
    """It rests between its attempts, instead of taking a whole core."""
    running, attempts = serve(), []

    def accept(listener):
        attempts.append(listener)
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", accept)
        with running.connect() as waiting:
            wait_until(lambda: len(attempts) >= 4)
            assert running.log == ["refusing clients: Too many open files in system"]
            patch.undo()
            waiting.close()
    assert len(attempts) < 20
    is_well(running)


def test_stopping_while_nothing_can_be_accepted(serve, monkeypatch):
    running = serve()

    def accept(listener):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", accept)
        with running.connect():
            wait_until(lambda: running.log)
            running.stop()


def test_a_client_that_was_gone_before_it_was_accepted(serve, is_well, monkeypatch):
    running, gone = serve(), threading.Event()

    def accept(listener):
        gone.set()
        raise ConnectionAbortedError(errno.ECONNABORTED, "Software caused connection abort")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", accept)
        with running.connect():
            assert gone.wait(10)
    is_well(running)
    assert not any("refus" in line for line in running.log)


def test_a_full_disk_for_the_log_of_refusals(engine, quick, monkeypatch):
    def log(line):
        raise OSError(errno.ENOSPC, "No space left on device")

    server = MrdServer("127.0.0.1", 0, engine, quick, log)
    thread = threading.Thread(target=server.serve)
    thread.start()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with socket.create_connection(server.address, timeout=20) as connection:
            assert b"no thread" in read_all(connection)
    assert thread.is_alive()
    server.stop()
    thread.join(20)
    assert not thread.is_alive()


def test_what_is_seldom_said_counts_what_it_left_out(monkeypatch):
    log, now = [], [1000.0]
    monkeypatch.setattr(seldom.time, "monotonic", lambda: now[0])
    say = seldom.Seldom(log.append)
    for n in range(5):
        say("one", f"line {n}")
    say("two", "another")
    now[0] += seldom.QUIET_SECONDS
    say("one", "line 5")
    say("two", "another")
    assert log == ["line 0", "another", "line 5 (4 more like it before)", "another"]
