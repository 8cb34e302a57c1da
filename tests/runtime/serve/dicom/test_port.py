"""Who may send, what is taken, and clients that are slow, silent, greedy or hostile."""

import re
import shutil
import socket
import struct
import subprocess
import time

import pytest
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    MRImageStorage,
    generate_uid,
)
from pynetdicom import AE

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.serve.dicom.entities import Entity, entity_from, peer_from
from qsm_deploy.runtime.serve.dicom.port import LONGEST_PDU
from qsm_deploy.runtime.serve.dicom.tls import tls_from
from qsm_deploy.runtime.serve.limits import Limits
from tests.runtime.serve.dicom.conftest import (
    HOST,
    QUICK,
    archive_on,
    associate,
    mr_image,
    push,
    series_of,
)
from tests.runtime.serve.waiting import wait_until


def echoes(port: int, **how) -> bool:
    """Return whether C-ECHO is answered."""
    association = associate(port, **how)
    if not association.is_established:
        return False
    answered = association.send_c_echo().get("Status") == 0x0000
    association.release()
    return answered


@pytest.mark.parametrize(
    ("allow", "calling", "called", "taken"),
    [
        ((), "ANYBODY", "QSM", True),
        ((), "ANYBODY", "QSN", False),
        (("127.0.0.1",), "ANYBODY", "QSM", True),
        (("127.0.0.0/8",), "ANYBODY", "QSM", True),
        (("10.0.0.1",), "SCANNER", "QSM", False),
        (("SCANNER@127.0.0.1",), "SCANNER", "QSM", True),
        (("SCANNER@127.0.0.1",), "scanner", "QSM", False),
        (("SCANNER@10.0.0.1", "OTHER@127.0.0.0/8"), "SCANNER", "QSM", False),
        (("SCANNER@10.0.0.1", "OTHER@127.0.0.0/8"), "OTHER", "QSM", True),
    ],
)
def test_who_may_send(serve, allow, calling, called, taken):
    running = serve(*allow)
    assert echoes(running.port, calling=calling, called=called) == taken
    assert bool(running.said("not allowed")) == (not taken and called == "QSM")


def test_what_can_be_used_is_taken_and_nothing_else(serve):
    running, ae = serve(), AE("SCANNER")
    for kind in (MRImageStorage, EnhancedMRImageStorage, CTImageStorage):
        ae.add_requested_context(kind, [JPEGLosslessSV1, ImplicitVRLittleEndian])
    ae.add_requested_context(MRImageStorage, JPEGBaseline8Bit)
    association = ae.associate(HOST, running.port, ae_title="QSM")
    taken = [(c.abstract_syntax, c.transfer_syntax[0]) for c in association.accepted_contexts]
    association.release()
    assert taken == [
        (MRImageStorage, ImplicitVRLittleEndian),  # uncompressed where there is the choice
        (EnhancedMRImageStorage, ImplicitVRLittleEndian),
    ]


@pytest.mark.parametrize(
    "text", ["QSM", "QSM@host", "@host:1", "QSM@host:70000", "QSM@::1:104", "A" * 17 + "@h:1",
             "a\\b@h:1", "Ä@h:1", "QSM@[host]:1"],
)  # fmt: skip
def test_no_entity(text):
    with pytest.raises(UsageError):
        entity_from(text)


def test_entities_and_peers():
    assert entity_from("A B@[::1]:104") == Entity("A B", "::1", 104)
    assert str(entity_from("A@[::1]:104")) == "A@[::1]:104"
    for text in ("10.0.0.1/8", "A@", "A@scanner", "@10.0.0.1"):
        with pytest.raises(UsageError):
            peer_from(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda i: delattr(i, "StudyInstanceUID"),
        lambda i: setattr(i, "StudyInstanceUID", ""),
        lambda i: setattr(i, "StudyInstanceUID", None),
    ],
)
def test_an_image_of_no_study_is_refused_and_others_are_taken(serve, change):
    running, image = serve(), mr_image(generate_uid())
    change(image)
    assert push(running.port, [image, *series_of(1)]) == [0xC000, 0x0000]
    assert running.said("does not say of which study it is")


@pytest.mark.filterwarnings("ignore:.*UI:UserWarning", "ignore:.*IS:UserWarning")
@pytest.mark.parametrize("uid", ["../../../etc/passwd", "1.2\x1b[31m", "/", "1" * 64])
def test_names_of_files_are_ours(serve, uid):
    running, image = serve(settle_s=60), mr_image("1.2.3")
    image.StudyInstanceUID = uid
    image.SeriesNumber = None
    assert push(running.port, [image]) == [0x0000]
    (path,) = running.files
    assert path.resolve().is_relative_to(running.spool.folder)
    assert re.fullmatch(r"0-[0-9a-f]{32}\.dcm", path.name)


@pytest.mark.parametrize("title", ["A\x1b[31mB", "A\nB", "Ä"])
def test_titles_cannot_colour_the_log(serve, title):
    """A hand-written request, since pynetdicom refuses to call itself so."""
    running = serve()
    with socket.create_connection((HOST, running.port)) as connection:
        connection.sendall(request(title.encode("latin1")))
        connection.settimeout(5)
        connection.recv(1000)
    assert echoes(running.port)
    assert all(line.isprintable() for line in running.log)


def request(title: bytes) -> bytes:
    """Return an A-ASSOCIATE-RQ for C-ECHO."""

    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(content)) + content

    syntaxes = item(0x30, b"1.2.840.10008.1.1") + item(0x40, b"1.2.840.10008.1.2")
    items = item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x20, b"\1\0\0\0" + syntaxes)
    items += item(0x50, item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3"))
    head = struct.pack(">Hxx16s16s32x", 1, b"QSM".ljust(16), title.ljust(16))
    return struct.pack(">BxL", 1, len(head + items)) + head + items


def aborted_in_the_middle(port: int) -> None:
    """Send half of an image, and be gone."""
    association, image = associate(port), mr_image(generate_uid())
    image.add_new("PixelData", "OW", bytes(1 << 20))
    link, sent = association.dul.socket, []
    send = link.send

    def break_off(data: bytes) -> None:
        sent.append(data)
        send(data)
        if len(sent) == 4:
            link.socket.shutdown(socket.SHUT_RDWR)

    link.send = break_off
    assert "Status" not in association.send_c_store(image)


def test_an_association_that_breaks_off_leaves_no_half_file(serve):
    running = serve(settle_s=60)
    aborted_in_the_middle(running.port)
    assert echoes(running.port)
    assert not running.files
    assert not list(running.spool.work.iterdir())


def test_announcing_a_gigabyte_ends_the_connection(serve):
    running = serve()
    with socket.create_connection((HOST, running.port)) as connection:
        connection.sendall(struct.pack(">BxL", 4, LONGEST_PDU + 1))
        connection.settimeout(5)
        assert connection.recv(100) == b""
    assert "announced" in running.wait_for("ended")
    assert echoes(running.port)


def test_an_object_beyond_the_memory_ends_the_connection(serve):
    running = serve(limits=Limits(session_bytes=30_000, idle_seconds=2), settle_s=60)
    big = mr_image(generate_uid())
    big.add_new("PixelData", "OW", bytes(60_000))
    assert push(running.port, [big]) == [None]
    assert "more than 30000 bytes" in running.wait_for("ended")
    # and what was taken is counted no longer
    assert push(running.port, [mr_image("1.2.3", n) for n in range(40)]) == [0x0000] * 40


@pytest.mark.parametrize("start", [b"", b"\1\0\0", struct.pack(">BxL", 1, 200) + b"abc"])
def test_silent_clients_hold_nobody_up(serve, start):
    running, began = serve(), time.monotonic()
    silent = [socket.create_connection((HOST, running.port)) for _ in range(4)]
    for connection in silent:
        connection.sendall(start)
    wait_until(lambda: echoes(running.port))
    assert time.monotonic() - began < QUICK.idle_seconds + 2
    wait_until(lambda: all(ended(connection) for connection in silent))
    for connection in silent:
        connection.close()


def ended(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return connection.recv(100) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_stopping_ends_associations_that_are_open(serve):
    running = serve()
    association = associate(running.port)
    assert association.is_established
    began = time.monotonic()
    running.stop()
    assert time.monotonic() - began < 2
    wait_until(lambda: not association.is_established)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Return a function that gives the contexts of a certificate, and whose others it takes."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    for whose in ("ours", "theirs"):
        for command in (
            f"{new} -keyout {whose}.key -out {whose}.pem -subj /CN={whose}",
            f"{new} -keyout leaf-{whose}.key -out leaf-{whose}.pem -subj /CN=leaf -CA {whose}.pem "
            f"-CAkey {whose}.key -addext subjectAltName=IP:{HOST} "
            "-addext basicConstraints=CA:FALSE",
        ):
            subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return lambda who, whose: tls_from(
        folder / f"leaf-{who}.pem", folder / f"leaf-{who}.key", folder / f"{whose}.pem"
    )


def test_tls_on_both_sides(serve, certificates):
    ours, theirs = certificates("ours", "ours"), certificates("theirs", "ours")
    with archive_on(tls=ours.incoming) as archive:
        running = serve(tls=ours, to=Entity("PACS", HOST, archive.port))
        assert push(running.port, series_of(2), tls=(ours.outgoing, HOST)) == [0, 0]
        running.wait_for("sent, 2 images")
    assert not echoes(running.port)  # without TLS
    assert not echoes(running.port, tls=(theirs.outgoing, HOST))  # with another's certificate
    assert echoes(running.port, tls=(ours.outgoing, HOST))
    assert running.said("no TLS")


def test_a_destination_whose_certificate_is_not_accepted_gets_nothing(serve, certificates):
    ours, theirs = certificates("ours", "ours"), certificates("theirs", "theirs")
    with archive_on(tls=theirs.incoming) as archive:
        running = serve(tls=ours, to=Entity("PACS", HOST, archive.port))
        push(running.port, series_of(1), tls=(ours.outgoing, HOST))
        assert "its certificate is not accepted" in running.wait_for("not sent")
    assert not archive.images


def test_a_client_that_does_not_shake_hands_holds_nobody_up(serve, certificates):
    ours = certificates("ours", "ours")
    running = serve(tls=ours)
    with socket.create_connection((HOST, running.port)):
        assert echoes(running.port, tls=(ours.outgoing, HOST))


def test_files_that_are_no_certificates(tmp_path):
    wrong = tmp_path / "wrong.pem"
    with pytest.raises(DataError, match="No such file"):
        tls_from(wrong, wrong, None)
    wrong.write_text("nothing")
    with pytest.raises(DataError, match="no certificate and its key"):
        tls_from(wrong, wrong, None)
