"""Who gets a place: any address its share, the silent ones make room, strangers none."""

import ipaddress
import socket
import struct
import time
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import Mock

import pytest

from qsm_deploy.runtime.serve.conversation import Conversation
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.places import Client, Places
from tests.runtime.serve.waiting import wait_until

CLOSE = struct.pack("<H", 4)


@pytest.fixture
def client():
    """Return a function that makes a client who has been silent for a while."""
    with ExitStack() as opened:

        def make(address, silent_for=None):
            ours, theirs = socket.socketpair()
            opened.callback(ours.close)
            opened.callback(theirs.close)
            one = Client(ours, address, 1)
            if silent_for is not None:
                one.silent_since = time.monotonic() - silent_for
            return one

        yield make


def limits_of(clients, yield_seconds=5.0):
    return Limits(clients=clients, yield_seconds=yield_seconds)


@pytest.mark.parametrize(("clients", "share"), [(1, 1), (2, 1), (3, 2), (8, 4), (9, 5)])
def test_an_address_has_half_of_the_places(client, clients, share):
    places = Places(limits_of(clients))
    answers = [places.take(client("10.0.0.1"), in_words=True) for _ in range(share + 2)]
    assert answers[:share] == [None] * share
    assert all(f"{share} sessions of 10.0.0.1 are open" in answer for answer in answers[share:])
    if clients > share:
        assert places.take(client("10.0.0.2"), in_words=True) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%1", "fe80::2%1", True),
        ("10.0.0.1", "10.0.0.2", False),
    ],
)
def test_the_addresses_of_one_machine(client, one, other, same):
    assert (client(one).machine == client(other).machine) == same


def test_the_one_silent_for_longest_makes_room(client):
    places = Places(limits_of(4))
    here = [client("10.0.0.1", 20), client("10.0.0.1", 30)]
    there = [client("10.0.0.2", 90), client("10.0.0.2")]  # the last is being reconstructed
    assert [places.take(one, in_words=True) for one in (*here, *there)] == [None] * 4
    # of the same address, if its share is taken: it must not push others out
    assert places.take(client("10.0.0.1"), in_words=True) is None
    assert [one.reason is not None for one in (*here, *there)] == [False, True, False, False]
    # of all, if every place is taken
    assert places.take(client("10.0.0.3"), in_words=True) is None
    assert [one.reason is not None for one in (*here, *there)] == [False, True, True, False]
    assert "silent for 90.0 s, and another needs the place" in there[0].reason


def test_who_was_silent_for_a_moment_keeps_the_place(client):
    places = Places(limits_of(2))
    here = client("10.0.0.1", 4), client("10.0.0.2", 1)
    assert [places.take(one, in_words=True) for one in here] == [None] * 2
    assert places.take(client("10.0.0.3"), in_words=True).startswith("2 sessions are open")
    assert [one.reason for one in here] == [None, None]
    places.leave(here[0])
    assert places.take(client("10.0.0.3"), in_words=True) is None


def test_a_half_open_client_makes_room_and_takes_its_images(serve, quick, dipole_stream, is_well):
    running = serve(replace(quick, clients=2, idle_seconds=20, yield_seconds=0.3))
    with running.connect() as silent, silent.makefile("rb") as stream:
        silent.sendall(dipole_stream[:-2])
        is_well(running)
        answer = stream.read()
    assert b"ERR silent for " in answer
    assert b"another needs the place" in answer
    assert answer.count(struct.pack("<H", 1022)) >= 8
    assert answer.endswith(CLOSE)
    assert any("8 images" in line and "another needs the place" in line for line in running.log)


def test_a_client_that_does_not_read_makes_room(
    serve, quick, serialise, dipole_stream, mrd_images, local_field, is_well
):
    """Its answer is on the way, and it takes none of it: it is ended without words."""
    images = mrd_images(local_field, Comment="x" * 60_000)
    start = dipole_stream[: dipole_stream.index(struct.pack("<H", 1022))]
    limits = replace(quick, clients=2, idle_seconds=60, session_seconds=60, yield_seconds=0.3)
    running = serve(limits)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(running.server.address)
        slow.sendall(start + serialise(*images * 20, None))
        is_well(running)
        wait_until(lambda: len(running.log) >= 2)
    assert any("failed: silent for" in line for line in running.log)


def test_whose_session_is_ended_has_one_silence_to_take_the_rest():
    """By one byte at a time it would have the whole time of a session."""

    def send(view):
        time.sleep(0.05)
        return 1

    client = Client(Mock(send=send, recv=lambda size: b""), "10.0.0.1", 1, reason="x" * 50)
    with pytest.raises(TimeoutError):
        Conversation(client, Limits(idle_seconds=0.5)).refuse()


def test_a_byte_now_and_then_holds_no_place_for_longer_than_a_session(
    serve, quick, dipole_stream, is_well
):
    running = serve(replace(quick, clients=1, session_seconds=1.0, yield_seconds=0.5))
    with running.connect() as slow:
        began = time.monotonic()
        for n in range(1000):
            slow.sendall(dipole_stream[n : n + 1])
            with running.connect() as other, other.makefile("rb") as stream:
                refused = b"try later" in stream.read(80)
            if not refused:
                break
            time.sleep(0.05)
    assert 0.5 < time.monotonic() - began < 8
    is_well(running)


class TestAllowed:
    NETWORKS = ("10.0.0.0/24", "192.168.2.1", "2001:db8::/64")

    @pytest.mark.parametrize(
        ("address", "allowed"),
        [
            ("10.0.0.77", True),
            ("10.0.1.77", False),
            ("192.168.2.1", True),
            ("192.168.2.2", False),
            ("2001:db8::5", True),
            ("::1", False),
            ("127.0.0.1", False),
        ],
    )
    def test_addresses_and_networks(self, address, allowed):
        limits = Limits(allowed=[ipaddress.ip_network(text) for text in self.NETWORKS])
        assert limits.allows(ipaddress.ip_address(address)) == allowed
        assert Limits().allows(ipaddress.ip_address(address))

    def test_a_stranger_is_hung_up_on(self, serve, quick):
        running = serve(replace(quick, allowed=[ipaddress.ip_network("10.0.0.0/24")]))
        for _ in range(30):
            with running.connect() as connection:
                assert connection.recv(1) == b""
        (line,) = running.log
        assert line.startswith("127.0.0.1:")
        assert line.endswith("refused, its address is not allowed")

    def test_a_friend_is_answered(self, serve, quick, is_well):
        is_well(serve(replace(quick, allowed=[ipaddress.ip_network("127.0.0.0/8")])))

    def test_at_the_command_line(self):
        from qsm_deploy.runtime.serve.cli import parser

        words = ["--allow", "10.0.0.5", "--allow", "2001:db8::/32"]
        given = parser().parse_args(words).allow
        assert [one.network for one in given] == [
            ipaddress.ip_network("10.0.0.5"),
            ipaddress.ip_network("2001:db8::/32"),
        ]
