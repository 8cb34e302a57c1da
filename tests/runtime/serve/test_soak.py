"""A server that is left running: memory, descriptors and threads come back to where they were."""

import random
import signal
import socket
import struct
from pathlib import Path

import pytest

from qsm_deploy.runtime.serve.texts import MOST_TAGS
from tests.runtime.serve.waiting import wait_until

GROWTH = 0.05  # of the memory after 50 sessions, after 200 more
WARM, MORE = 50, 200
HALF_OPEN = 3


def memory_bytes(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def means(process):
    """Return how many descriptors and threads a process has."""
    own = Path(f"/proc/{process.pid}")
    return len(list((own / "fd").iterdir())), len(list((own / "task").iterdir()))


@pytest.mark.slow
def test_two_hundred_sessions_and_as_many_hostile_ones(server_process, dipole_stream, note_counts):
    dice = random.Random(8)
    start = dipole_stream[: dipole_stream.index(struct.pack("<H", 1022))]

    def connected():
        return socket.create_connection(("127.0.0.1", port), timeout=30)

    def whole():
        with connected() as connection, connection.makefile("rb") as stream:
            connection.sendall(dipole_stream)
            answer = stream.read()
        assert b"ERR" not in answer, answer[-500:]
        assert answer.count(b"QSM chi [ppb]") == 8
        assert answer.endswith(struct.pack("<H", 4))

    def cut():
        with connected() as connection:
            connection.sendall(dipole_stream[: dice.randrange(len(dipole_stream))])

    def reset():
        with connected() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(dipole_stream)

    def garbage():
        with connected() as connection:
            connection.sendall(dice.randbytes(3000))

    def nested():
        with connected() as connection:
            connection.sendall(start + struct.pack("<HI", 3, 3 * MOST_TAGS) + b"<a>" * MOST_TAGS)

    def silent():
        half_open.append(connected())
        half_open[-1].sendall(dipole_stream[: dice.randrange(len(dipole_stream) - 2)])
        if len(half_open) > HALF_OPEN:
            half_open.pop(0).close()

    half_open, hostile = [], (cut, reset, garbage, nested, silent)

    def sessions(count):
        for n in range(count):
            whole()
            hostile[n % len(hostile)]()
        while half_open:
            half_open.pop().close()
        wait_until(lambda: means(process)[0] <= before[0], 30)
        return memory_bytes(process)

    with server_process("--max-clients", "64", failing=True) as (process, port, log):
        before = means(process)
        warm = sessions(WARM)
        threads = means(process)[1]
        last = sessions(MORE)
        after = means(process)
        process.send_signal(signal.SIGTERM)
    assert after == (before[0], threads)
    assert threads <= before[1] + 2  # of a backend, which starts some when they are needed
    assert last < (1 + GROWTH) * warm, f"{last / warm - 1:.1%} of {warm / 2**20:.0f} MiB"
    assert log.text.count(", ok; ") >= WARM + MORE
    note_counts("a server's clients: cut off, silent, garbage", inputs=WARM + MORE)
