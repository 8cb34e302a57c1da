"""Sessions made with the ismrmrd package's own serialisation, and servers to send them to."""

import io
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from qsm_deploy.runtime.reconstruction.network import CpuNetwork
from qsm_deploy.runtime.reconstructor import Reconstructor
from qsm_deploy.runtime.serve.codec import Decoder, Image
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.mrd_session import MrdSession
from qsm_deploy.runtime.serve.server import MrdServer
from qsm_deploy.runtime.serve.turns import TakingTurns
from tests.runtime.serve.waiting import wait_until

import ismrmrd  # isort: skip  # after the codec, which keeps it from changing the warnings
from ismrmrd.serialization import ConfigFile, ProtocolDeserializer, ProtocolSerializer  # isort: skip

SHAPE = (12, 10, 8)
AXIAL = np.eye(3)
QUICK = Limits(idle_seconds=2.0, linger_seconds=0.3, session_seconds=10.0, text_bytes=1 << 16)


@dataclass
class TwiceSession:
    """Stands in for a network: twice the field; ``gate`` makes it wait."""

    card: object
    backend: str = "onnxruntime"
    version: str = "0"
    precision: str = "fp32"
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def run(self, tensors):
        self.entered.set()
        assert self.gate.wait(20)
        return 2 * tensors["local_field_ppm"]


def in_turns(session, wants=None) -> TakingTurns:
    """Return a session behind the server, which it stays reachable for."""
    turns = TakingTurns(Reconstructor(CpuNetwork(session, Path("twice.onnx"))), wants)
    turns.session = session
    return turns


@pytest.fixture(name="in_turns")
def in_turns_fixture() -> Callable[..., TakingTurns]:
    """Return what puts a session behind the server."""
    return in_turns


@pytest.fixture
def engine(card) -> TakingTurns:
    """Return a reconstructor whose map is twice the field, and its session."""
    session = TwiceSession(card)
    session.gate.set()
    return in_turns(session)


@pytest.fixture
def mrd_header() -> Callable[..., object]:
    """Return a function that makes a header."""

    def make(echo_times_ms=(5.0, 10.0, 15.0), field_strength_t=3.0, resonance_hz=127_731_000):
        xsd = ismrmrd.xsd
        system = None
        if field_strength_t is not None:
            system = xsd.acquisitionSystemInformationType(systemFieldStrength_T=field_strength_t)
        return xsd.ismrmrdHeader(
            experimentalConditions=xsd.experimentalConditionsType(
                H1resonanceFrequency_Hz=resonance_hz
            ),
            acquisitionSystemInformation=system,
            sequenceParameters=xsd.sequenceParametersType(TE=list(echo_times_ms)),
        )

    return make


@pytest.fixture
def mrd_images() -> Callable[..., list]:
    """Return a function that cuts an (x, y, z) volume into images, in interleaved order.

    ``axes`` has the LPS directions of x, y and z as rows; ``slab`` sends one image.
    """

    def make(
        volume, *, axes=AXIAL, voxel=(1.0, 1.0, 2.0), centre=(3.0, -4.0, 5.0), image_type=3,
        series=1, contrast=0, slab=False, **attributes,
    ):  # fmt: skip
        nx, ny, nz = volume.shape
        step = np.array(voxel) * np.array([nx, ny, 1 if not slab else nz])
        images = []
        for k in [0] if slab else [*range(1, nz, 2), *range(0, nz, 2)]:
            pixels = volume.transpose(2, 1, 0) if slab else volume[:, :, k].T
            image = ismrmrd.Image.from_array(np.ascontiguousarray(pixels))
            offset = 0.0 if slab else (k - (nz - 1) / 2) * voxel[2]
            image.position[:] = np.array(centre) + offset * axes[2]
            image.field_of_view[:] = step
            image.read_dir[:], image.phase_dir[:], image.slice_dir[:] = axes
            image.image_type, image.image_series_index = image_type, series
            image.contrast, image.slice, image.image_index = contrast, k, k + 1
            image.meta = ismrmrd.Meta(attributes)
            images.append(image)
        return images

    return make


@pytest.fixture
def serialise() -> Callable[..., bytes]:
    """Return a function that turns messages into a stream: a dict is JSON, ``None`` is CLOSE."""

    def run(*messages) -> bytes:
        stream = io.BytesIO()
        out = ProtocolSerializer(stream)
        for message in messages:
            if message is None:
                out.close()
            elif isinstance(message, dict):
                out.serialize(json.dumps({"version": "1.1.0", "parameters": message}))
            else:
                out.serialize(message)
        return stream.getvalue()

    return run


@pytest.fixture
def local_field() -> np.ndarray:
    """Return a small field [ppm], zero around a box, different in every voxel."""
    rng = np.random.default_rng(5)
    volume = np.zeros(SHAPE, dtype=np.float32)
    volume[2:-2, 1:-1, 1:-1] = 0.02 * rng.standard_normal((8, 8, 6), dtype=np.float32)
    return volume


@pytest.fixture
def dipole_stream(serialise, mrd_header, mrd_images, local_field) -> bytes:
    """Return a valid session of configuration dipole."""
    messages = [ConfigFile("dipole"), mrd_header(), {"units": "ppm"}, *mrd_images(local_field)]
    return serialise(*messages, None)


@pytest.fixture
def image_message() -> Callable[..., bytes]:
    """Return a function that makes an IMAGE message with any bytes as its attributes."""

    def make(image, attributes: bytes) -> bytes:
        head = struct.pack("<H", 1022) + bytes(image.getHead())
        return head + struct.pack("<Q", len(attributes)) + attributes + image.data.tobytes()

    return make


@dataclass
class Frames:
    """An answer as it goes out."""

    frames: list[bytes]
    session: MrdSession

    @property
    def data(self) -> bytes:
        return b"".join(self.frames)

    @property
    def texts(self) -> list[str]:
        return [f[6:-1].decode() for f in self.frames if f[:2] == struct.pack("<H", 5)]

    @property
    def told(self) -> list[str]:
        return [text for text in self.texts if not text.startswith("INFO")]

    @property
    def map(self) -> list[bytes]:
        return [f for f in self.frames if f[:2] == struct.pack("<H", 1022) and b"QSM chi" in f]


@pytest.fixture
def answered(decoded, engine) -> Callable[..., Frames]:
    """Return a function that answers a stream."""

    def run(stream: bytes) -> Frames:
        session = MrdSession(Limits())
        for message in decoded(stream):
            session.receive(message)
        frames = [bytes(frame) for frame in session.answer(engine)]
        assert frames[-1] == struct.pack("<H", 4)
        return Frames(frames, session)

    return run


@pytest.fixture
def boundaries() -> Callable[[bytes], list[int]]:
    """Return a function that tells where the messages of a stream end."""

    def find(data: bytes) -> list[int]:
        decoder, position, ends = Decoder(Limits()), 0, []
        while position < len(data):
            wanted = decoder.wanted
            if decoder.feed(data[position : position + wanted]) is not None:
                ends.append(position + wanted)
            position += wanted
        return ends

    return find


@pytest.fixture
def decoded() -> Callable[..., list]:
    """Return a function that decodes a whole stream."""

    def run(data: bytes, limits: Limits = QUICK) -> list:
        decoder, position, messages = Decoder(limits), 0, []
        while position < len(data):
            piece = data[position : position + decoder.wanted]
            if len(piece) < decoder.wanted:
                raise decoder.ended(len(piece))
            position += len(piece)
            if (message := decoder.feed(piece)) is not None:
                messages.append(message)
        if (error := decoder.ended(0)) is not None:
            raise error
        return messages

    return run


@pytest.fixture
def codec_images(decoded, serialise, mrd_images) -> Callable[..., list[Image]]:
    """Return a function that gives the images of a volume as the server sees them."""
    return lambda volume, **what: decoded(serialise(*mrd_images(volume, **what)))


@dataclass
class Answer:
    """What a server said, read with the ismrmrd package."""

    texts: list[str] = field(default_factory=list)
    images: list = field(default_factory=list)
    closed: bool = False

    @property
    def errors(self) -> list[str]:
        return [text for text in self.texts if text.startswith("ERR")]

    def series(self, number: int) -> list:
        return [image for image in self.images if image.image_series_index == number]


def read_answer(stream) -> Answer:
    answer = Answer()
    for message in ProtocolDeserializer(stream).deserialize():
        if isinstance(message, str):
            answer.texts.append(message.removesuffix("\0"))
        else:
            answer.images.append(message)
    answer.closed = True
    assert stream.read() == b""  # CLOSE is last
    return answer


@dataclass
class Running:
    """A server in a thread of the test."""

    server: MrdServer
    log: list[str]
    thread: threading.Thread

    def connect(self) -> socket.socket:
        return socket.create_connection(self.server.address, timeout=20)

    def talk(self, data: bytes) -> Answer:
        """Send a stream, say that nothing follows, and read the answer."""
        with self.connect() as connection, connection.makefile("rb") as stream:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return read_answer(stream)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def serve(engine) -> Iterator[Callable[..., Running]]:
    """Return a function that starts a server."""
    running: list[Running] = []

    def start(limits: Limits = QUICK, engine: TakingTurns = engine) -> Running:
        log: list[str] = []
        server = MrdServer("127.0.0.1", 0, engine, limits, log.append)
        thread = threading.Thread(target=server.serve)
        thread.start()
        running.append(Running(server, log, thread))
        return running[-1]

    yield start
    for one in running:
        one.stop()


@dataclass
class Log:
    """What a server process wrote to stderr; whole once it ended."""

    text: str = ""


@pytest.fixture(scope="session")
def server_process() -> Callable[..., object]:
    """Return a context manager that runs qsm-serve on a free port.

    At its end the process must have stopped as SIGTERM, which the test sends, asks for.
    """

    @contextmanager
    def run(*flags: str, failing: bool = False, descriptors: int | None = None):
        command = [sys.executable, "-m", "qsm_deploy.runtime.serve.cli", "--port", "0", *flags]
        if descriptors is not None:
            command = ["/bin/sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
        log, read = Log(), threading.Event()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:

            def follow():
                for line in process.stderr:
                    log.text += line
                read.set()

            try:
                ready = process.stderr.readline()
                assert "ready on " in ready
                assert ("tv-unet fp32" if "tv-unet" in flags else "tv (total") in ready
                threading.Thread(target=follow, daemon=True).start()
                yield process, int(ready.split("ready on ")[1].split(":")[1]), log
                assert (process.wait(30), process.stdout.read()) == (0, "stopped\n")
            finally:
                process.kill()
        assert read.wait(10)
        assert "what is being reconstructed will be finished" in log.text
        assert ("failed:" in log.text) == failing
        assert "Traceback" not in log.text

    return run


@pytest.fixture
def quick() -> Limits:
    """Return the limits of the tests."""
    return QUICK


@pytest.fixture
def is_well(dipole_stream) -> Callable[[Running], None]:
    """Return a function that has a valid session answered."""

    def check(running):
        def answered():
            answer = running.talk(dipole_stream)
            # sessions before this one may still be ending on a busy machine
            return None if any("try later" in line for line in answer.errors) else answer

        answer = wait_until(answered)
        assert (answer.errors, len(answer.series(99)), answer.closed) == ([], 8, True)

    return check
