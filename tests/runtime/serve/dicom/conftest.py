"""Servers for DICOM on loopback, with something simple in place of a reconstruction."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification
from pynetdicom.transport import AssociationSocket

from qsm_deploy.runtime.serve.dicom.entities import Entity, peer_from
from qsm_deploy.runtime.serve.dicom.outbox import Outbox
from qsm_deploy.runtime.serve.dicom.receiver import SYNTAXES, Receiver
from qsm_deploy.runtime.serve.dicom.sender import send
from qsm_deploy.runtime.serve.dicom.server import DicomServer
from qsm_deploy.runtime.serve.dicom.spool import Spool
from qsm_deploy.runtime.serve.dicom.studies import Studies
from qsm_deploy.runtime.serve.limits import Limits
from tests.runtime.serve.waiting import wait_until

QUICK = Limits(idle_seconds=2.0, yield_seconds=0.3, clients=4)
HOST, TITLE, SETTLE_S, PAUSE_S = "127.0.0.1", "QSM", 0.5, 0.2


@pytest.fixture(autouse=True)
def closed_sockets(monkeypatch) -> None:
    """Close the sockets of pynetdicom's clients, which it leaves once the other side is gone."""

    def close(link: AssociationSocket) -> None:
        with suppress(OSError, AttributeError):
            link.socket.shutdown(socket.SHUT_RDWR)
        with suppress(OSError, AttributeError):
            link.socket.close()

    monkeypatch.setattr(AssociationSocket, "_shutdown_socket", close)


def mr_image(study: str, number: int = 1, *, series: int = 5, **more: object) -> Dataset:
    """Return a small MR image of somebody."""
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, generate_uid()
    image.StudyInstanceUID, image.SeriesInstanceUID = study, generate_uid(entropy_srcs=[study])
    image.PatientName, image.PatientID, image.PatientBirthDate = "DOE^JANE", "P-0815", "19600101"
    image.AccessionNumber, image.StudyDescription = "A77", "Kopf nativ"
    image.Modality, image.SeriesNumber, image.InstanceNumber = "MR", series, number
    image.Rows = image.Columns = 16
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation, image.SamplesPerPixel = 15, 0, 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.add_new("PixelData", "OW", bytes(512))
    for name, value in more.items():
        setattr(image, name, value)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return image


def series_of(count: int) -> list[Dataset]:
    """Return the images of one study."""
    study = generate_uid()
    return [mr_image(study, n + 1) for n in range(count)]


@dataclass
class Reconstruction:
    """Stands in for one: writes an image for each; ``gate`` makes it wait."""

    fault: Exception | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    seen: list[list[Dataset]] = field(default_factory=list)

    def __call__(self, images: Path, target: Path) -> None:
        read = [dcmread(path) for path in sorted(images.iterdir())]
        self.seen.append(sorted(read, key=lambda image: image.InstanceNumber))
        self.entered.set()
        assert self.gate.wait(20)
        if self.fault is not None:
            raise self.fault
        for image in deepcopy(read):
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            image.SeriesNumber = 501
            image.save_as(target / f"{image.InstanceNumber}.dcm")


@pytest.fixture
def reconstruction() -> Reconstruction:
    """Return one that does not wait."""
    made = Reconstruction()
    made.gate.set()
    return made


@dataclass
class Archive:
    """A storage provider of the test; says ``status`` to what comes, and never takes ``poison``."""

    port: int
    images: dict[str, Dataset] = field(default_factory=dict)
    status: int = 0x0000
    refused: set[str] = field(default_factory=set)
    poison: set[str] = field(default_factory=set)
    calling: set[str] = field(default_factory=set)

    def store(self, event: evt.Event) -> int:
        self.calling.add(event.assoc.requestor.ae_title)
        uid = event.dataset.SOPInstanceUID
        if self.status != 0x0000 or uid in self.poison:
            self.refused.add(uid)
            return self.status or 0xA900
        self.images[uid] = event.dataset
        return self.status


@contextmanager
def archive_on(port: int = 0, tls=None) -> Iterator[Archive]:
    ae = AE("PACS")
    ae.require_called_aet = True
    ae.add_supported_context(MRImageStorage, ExplicitVRLittleEndian)
    archive = Archive(port)
    server = ae.start_server(
        (HOST, port), block=False, ssl_context=tls,
        evt_handlers=[(evt.EVT_C_STORE, archive.store)],
    )  # fmt: skip
    archive.port = server.server_address[1]
    try:
        yield archive
    finally:
        ae.shutdown()


@pytest.fixture
def archive() -> Iterator[Archive]:
    """Return where the maps go."""
    with archive_on() as running:
        yield running


@dataclass
class Running:
    """A server in a thread of the test."""

    server: DicomServer
    receiver: Receiver
    spool: Spool
    log: list[str]
    thread: threading.Thread

    @property
    def port(self) -> int:
        return self.receiver.entity.port

    @property
    def files(self) -> list[Path]:
        return [path for path in self.spool.folder.glob("study-*/*/*") if path.is_file()]

    def said(self, words: str) -> list[str]:
        return [line for line in self.log if words in line]

    def wait_for(self, words: str) -> str:
        return wait_until(lambda: self.said(words))[0]

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def serve(tmp_path, reconstruction, archive) -> Iterator[Callable[..., Running]]:
    """Return a function that starts a server; the spool stays from one to the next."""
    running: list[Running] = []

    def start(
        *allow, limits=QUICK, quota=1 << 24, tls=None, to=None, settle_s=SETTLE_S,
        pause_s=PAUSE_S, reconstruct=reconstruction,
    ) -> Running:  # fmt: skip
        log: list[str] = []
        spool = Spool(tmp_path / "spool", quota).__enter__()
        left = list(spool.leftovers())
        made = [one for one in left if one.map.exists()]
        studies = Studies(spool, settle_s, [one for one in left if one not in made])
        to = to or Entity("PACS", HOST, archive.port)
        outbox = Outbox(
            spool, lambda files: send(files, to, TITLE, tls and tls.outgoing), log.append, made,
            pause_s,
        )  # fmt: skip
        peers = [peer_from(text) for text in allow]
        receiver = Receiver(Entity(TITLE, HOST, 0), peers, limits, tls, studies, log.append)
        server = DicomServer(receiver, studies, spool, outbox, reconstruct, log.append)
        thread = threading.Thread(target=lambda: (server.serve(), spool.__exit__(None, None, None)))
        thread.start()
        running.append(Running(server, receiver, spool, log, thread))
        return running[-1]

    yield start
    for one in running:
        one.stop()
    shutil.rmtree(tmp_path)


def associate(port: int, *, calling: str = "SCANNER", called: str = TITLE, tls=None):
    """Return an association with a server, which may not have been accepted."""
    ae = AE(calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    ae.add_requested_context(Verification)
    ae.add_requested_context(MRImageStorage, SYNTAXES)
    return ae.associate(HOST, port, ae_title=called, tls_args=tls)


def push(port: int, images, **how) -> list[int | None]:
    """Send images in one association and return their statuses, ``None`` where there is none."""
    association = associate(port, **how)
    assert association.is_established
    try:
        return [association.send_c_store(image).get("Status") for image in images]
    finally:
        if association.is_established:
            association.release()
