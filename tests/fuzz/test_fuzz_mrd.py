"""Damaged sessions of hosts: always CLOSE, always the images, and no map that is silently another.

Through the codec and the session as the server drives them, without a socket and a network.
"""

import ctypes
import json
import math
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest

from qsm_deploy.kernels.errors import ProtocolError
from qsm_deploy.runtime.card.card import GeometryLimits
from qsm_deploy.runtime.console.peak_memory import rss_bytes
from qsm_deploy.runtime.reconstruction.inversion import Made, Needs
from qsm_deploy.runtime.serve.codec import (
    Decoder,
    Id,
    Image,
    ImageHeader,
    WaveformHeader,
    close_frame,
    image_frames,
)
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.mrd_session import MrdSession
from qsm_deploy.runtime.serve.texts import LINE_CHARACTERS
from tests.fuzz.damage import STRANGE, damaged, damaged_json

pytestmark = pytest.mark.slow

LIMITS = Limits(
    message_bytes=1 << 18, text_bytes=1 << 16, matrix=64, images=100, session_bytes=1 << 20
)
SHAPE = (10, 9, 8)  # of which erosion leaves some
IMAGE = struct.pack("<H", Id.IMAGE)
TEXT = struct.pack("<H", Id.TEXT)
LONGEST_S, MOST_BYTES = 10.0, 1 << 28
NUMBERS = (
    b"nan",
    b"-inf",
    b"1e400",
    b"1e38",
    b"1e-300",
    b"0",
    b"-1",
    b"",
    b"1_0",
    "\uff11".encode(),
)
# nothing in the map depends on these
FREE_FIELDS = (
    *("version", "flags", "measurement_uid", "patient_table_position", "slice", "image_index"),
    *("acquisition_time_stamp", "physiology_time_stamp", "user_int", "user_float"),
)
HEADER = b"""<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
<subjectInformation><patientName>%s</patientName></subjectInformation>
<acquisitionSystemInformation><systemFieldStrength_T>3</systemFieldStrength_T>
</acquisitionSystemInformation><experimentalConditions><H1resonanceFrequency_Hz>127731000
</H1resonanceFrequency_Hz></experimentalConditions>
<sequenceParameters><TE>6</TE><TE>12</TE><TE>18</TE></sequenceParameters></ismrmrdHeader>"""


@dataclass
class Slice:
    """One image before it is written."""

    head: ImageHeader
    pixels: bytes
    values: dict[str, bytes]
    attributes: bytes | None = None  # in place of what is made of the values

    def message(self) -> bytes:
        text = self.attributes
        if text is None:
            metas = b"".join(
                b"<meta><name>%s</name><value>%s</value></meta>" % (name.encode(), value)
                for name, value in self.values.items()
            )
            text = b"<ismrmrdMeta>" + metas + b"</ismrmrdMeta>"
        return IMAGE + bytes(self.head) + struct.pack("<Q", len(text)) + text + self.pixels


@dataclass
class Sent:
    """A session before it is written."""

    config: bytes
    parameters: dict
    slices: list[Slice]
    header: bytes = HEADER % b"A"
    json: str | None = None  # in place of the parameters
    more: list[bytes] = field(default_factory=list)

    def messages(self) -> list[bytes]:
        text = json.dumps({"version": "1.1.0", "parameters": self.parameters})
        text = text if self.json is None else self.json
        return [
            struct.pack("<H", Id.CONFIG_FILE) + self.config[:1024].ljust(1024, b"\0"),
            _text(Id.HEADER, self.header),
            _text(Id.TEXT, text.encode("utf-8", "surrogatepass")),
            *(one.message() for one in self.slices),
            *self.more,
            close_frame(),
        ]


def _text(id_: Id, text: bytes) -> bytes:
    return struct.pack("<HI", id_, len(text)) + text


class Geometric:
    """Stands in for the reconstructor: the field times a number for its geometry."""

    name, busy = "geometric", False
    needs = Needs(name, "local_field_ppm", range(1, 2), GeometryLimits(None, None, None, None))
    turn = staticmethod(nullcontext)

    def named(self, method):
        return self

    def make(self, scan, stages):
        numbers = [*scan.geometry.voxel_size_mm, *scan.geometry.b0_direction]
        factor = np.float32(np.dot(numbers, [0.3, 0.2, 0.4, 0.1, 0.1, 0.3]))
        return Made(factor * scan.measured[0], {"notes": []})


@dataclass
class Talk:
    """A session, and what the server would have said to it."""

    session: MrdSession
    frames: list[bytes]
    originals: bytes  # those images that came whole

    @property
    def texts(self) -> list[str]:
        return [f[6:-1].decode() for f in self.frames if f.startswith(TEXT)]

    @property
    def warned(self) -> bool:
        return any(text.startswith("WRN") for text in self.texts)

    @property
    def map(self) -> list[bytes]:
        made = [f for f in self.frames if f.startswith(IMAGE) and b"QSM chi [ppb]" in f]
        return [f[-2 * math.prod(ImageHeader.from_buffer_copy(f[2:]).matrix_size) :] for f in made]


def talk(data: bytes) -> Talk:
    """Do with a stream what the server does, and check what holds for every stream."""
    began, session, decoder = time.monotonic(), MrdSession(LIMITS), Decoder(LIMITS)
    position = start = 0
    originals = b""
    frames: list[bytes] = []
    try:
        while not session.complete:
            assert decoder.wanted <= LIMITS.message_bytes
            piece = data[position : position + decoder.wanted]
            if len(piece) < decoder.wanted:
                raise decoder.ended(len(piece)) or ProtocolError("no CLOSE")
            position += len(piece)
            message = decoder.feed(piece)
            if message is not None:
                session.receive(message)
                originals += data[start:position] if isinstance(message, Image) else b""
                start = position
        frames += map(bytes, session.answer(Geometric()))
    except ProtocolError as error:
        frames += [session.reason(error), *map(bytes, session.ending())]
    found = Talk(session, frames, originals)
    assert time.monotonic() - began < LONGEST_S
    assert not session.trace, session.trace
    assert [f == close_frame() for f in frames] == [False] * (len(frames) - 1) + [True]
    assert all(text.isprintable() for text in found.texts)
    assert all(len(text) < LINE_CHARACTERS + 10 for text in found.texts)
    assert (session.error is None) == (not any(text.startswith("ERR") for text in found.texts))
    assert session.error is None or not found.map
    asked = session._parameters
    if originals and (session.error or asked is None or asked.send_original):
        assert b"".join(frames).count(originals) == 1
    assert session.error is not None or len(found.map) > 0 or not session.images
    return found


def _slices(volume: np.ndarray, *, image_type: int, series: int, contrast: int = 0, **values):
    spacing, slices = 2.0, []
    for k in range(volume.shape[2]):
        head = ImageHeader()
        head.version, head.slice, head.contrast, head.image_index = 1, k, contrast, k + 1
        head.image_type, head.image_series_index = image_type, series
        head.field_of_view[:] = [volume.shape[0], volume.shape[1], spacing]
        head.position[:] = [1, 2, spacing * k]
        head.read_dir[0] = head.phase_dir[1] = head.slice_dir[2] = 1
        message = image_frames(head, {}, np.ascontiguousarray(volume[:, :, k].T[None]))
        head = ImageHeader.from_buffer_copy(message[2:])
        slices.append(
            Slice(
                head,
                message[-volume[:, :, k].nbytes :],
                {
                    "ProtocolName": b"head",
                    "ImageRowDir": b"1</value><value>0</value><value>0",
                    "ImageColumnDir": b"0</value><value>1</value><value>0",
                    **{name: value.encode() for name, value in values.items()},
                    "EchoNumber": b"%d" % (contrast + 1),
                    "ImageComments": b"none",
                },
            )
        )
    return slices


def of_field() -> Sent:
    """Return a local field, stored as whole numbers."""
    rng = np.random.default_rng(5)
    stored = np.zeros(SHAPE, dtype=np.int16)
    stored[1:-1, 1:-1, 1:-1] = np.rint(rng.normal(0, 20, (8, 7, 6)))  # even would be a phase's
    scale = {"RescaleSlope": "0.5", "RescaleIntercept": "0"}
    return Sent(b"dipole", {"units": "ppb"}, _slices(stored, image_type=3, series=1, **scale))


def of_echoes() -> Sent:
    """Return phase and magnitude of three echoes, and a mask."""
    x, y, z = (np.linspace(-1, 1, n) for n in SHAPE)
    field_hz = 20 * np.add.outer(np.add.outer(x, y), z)
    field_hz[3:5, 3, 2:4] += 6  # what is left without background
    slices = []
    for n, time_s in enumerate((0.006, 0.012, 0.018)):
        phase = np.rint((field_hz * time_s + 0.5) % 1 * 4095).astype(np.uint16)
        phase[0, 0, :2] = 0, 4095
        words = {"ImageType": "ORIGINAL\\PRIMARY\\P\\ND"}
        slices += _slices(phase, image_type=2, series=2, contrast=n, **words)
        words = {"ImageType": "ORIGINAL\\PRIMARY\\M\\ND"}
        signal = np.full(SHAPE, 500, dtype=np.uint16)
        slices += _slices(signal, image_type=1, series=1, contrast=n, **words)
    mask = np.zeros(SHAPE, dtype=np.uint16)
    mask[1:-1, 1:-1, 1:-1] = 1
    slices += _slices(mask, image_type=1, series=3, ImageType="DERIVED\\MASK")
    return Sent(b"qsm", {"phasescale": "unsigned4096"}, slices)


BASES: dict[str, Callable[[], Sent]] = {"field": of_field, "echoes": of_echoes}


def _set_field(head: ImageHeader, name: str, dice: random.Random) -> None:
    place = getattr(ImageHeader, name)
    for n in range(place.offset, place.offset + place.size):
        if dice.random() < 0.7:
            ctypes.c_uint8.from_buffer(head, n).value = dice.choice((0, 1, 127, 128, 255))


def _one_or_all(sent: Sent, dice: random.Random) -> list[Slice]:
    return sent.slices if dice.random() < 0.3 else [dice.choice(sent.slices)]


def _harm_head(sent: Sent, dice: random.Random) -> None:
    names = [name for name, *_ in ImageHeader._fields_]
    for one in _one_or_all(sent, dice):
        _set_field(one.head, dice.choice(names), dice)


def _harm_value(sent: Sent, dice: random.Random) -> None:
    name = dice.choice(list(sent.slices[0].values))
    for one in _one_or_all(sent, dice):
        if name in one.values:
            value = one.values[name]
            harmed = dice.choice(NUMBERS) if dice.random() < 0.5 else damaged(value, dice)
            one.values[name] = harmed


def _harm_attributes(sent: Sent, dice: random.Random) -> None:
    for one in _one_or_all(sent, dice):
        message = one.message()
        one.attributes = damaged(message[208 : len(message) - len(one.pixels)], dice)


def _harm_header(sent: Sent, dice: random.Random) -> None:
    sent.header = damaged(sent.header, dice)


def _harm_config(sent: Sent, dice: random.Random) -> None:
    sent.config = damaged((b"<c>" + sent.config + b"</c>").ljust(80, b"\0"), dice)


def _harm_json(sent: Sent, dice: random.Random) -> None:
    more = {"negate": "False", "sendoriginal": "False", "config": "", "roi": [1]}
    value = {"version": "1.1.0", "parameters": sent.parameters | more}
    sent.json = damaged_json(value, dice)


def _harm_pixels(sent: Sent, dice: random.Random) -> None:
    one = dice.choice(sent.slices)
    one.pixels = damaged(one.pixels, dice)[: len(one.pixels)].ljust(len(one.pixels), b"\xff")


HARMS = (
    _harm_head, _harm_value, _harm_attributes, _harm_header, _harm_config, _harm_json,
    _harm_pixels,
)  # fmt: skip


def _shuffled(messages: list[bytes], dice: random.Random) -> bytes:
    for _ in range(dice.randrange(1, 4)):
        here, there = dice.randrange(len(messages)), dice.randrange(len(messages))
        kind = dice.randrange(4)
        if kind == 0:
            del messages[here]
        elif kind == 1:
            messages.insert(here, messages[there])
        elif kind == 2:
            messages[here], messages[there] = messages[there], messages[here]
        else:  # the length of a text or of the attributes, or the end of a header
            size = {Id.IMAGE: slice(200, 208), Id.CLOSE: slice(0, 2)}
            (number,) = struct.unpack_from("<H", messages[here])
            message = bytearray(messages[here])
            place = size.get(number, slice(2, 6))
            message[place] = damaged(bytes(message[place]), dice)[: place.stop - place.start]
            messages[here] = bytes(message)
    return b"".join(messages)


@pytest.mark.parametrize(("base", "count"), [("field", 2400), ("echoes", 600)])
def test_damaged_sessions(base, count, note_counts):
    dice, seen, before = random.Random(f"mrd {base}"), Counter(), rss_bytes()
    whole = talk(b"".join(BASES[base]().messages()))
    assert (whole.warned, whole.session.error, len(whole.map)) == (False, None, SHAPE[2])
    for n in range(count):
        sent = BASES[base]()
        way = n % 3
        if way == 0:
            for harm in dice.sample(HARMS, dice.randrange(1, 3)):
                harm(sent, dice)
            data = b"".join(sent.messages())
        elif way == 1:
            data = _shuffled(sent.messages(), dice)
        else:
            data = damaged(b"".join(sent.messages()), dice, within=dice.choice((None, 5000)))
        found = talk(data)
        seen["complete"] += found.session.complete
        seen["error"] += found.session.error is not None
        seen["images"] += len(found.originals) > 0
        seen["warned"] += found.warned
        seen["same map"] += found.map == whole.map
        seen["another map"] += bool(found.map) and found.map != whole.map
    assert rss_bytes() - before < MOST_BYTES
    assert all(seen[what] > count / 200 for what in seen), seen
    assert seen["complete"] > count / 3
    assert seen["images"] > count / 2
    maps = {"same": seen["same map"], "other": seen["another map"]}
    note_counts("sessions of hosts", inputs=count, refused=seen["error"], **maps)


def _free_attribute(sent: Sent, dice: random.Random) -> None:
    name = dice.choice(("ProtocolName", "ImageComments"))
    for one in _one_or_all(sent, dice):
        text = dice.choice((b"Sch\xe4del & Hals", b"\x83\x5c", b"TE < 5 <b>"))
        one.values[name] = damaged(text * dice.randrange(1, 20), dice)


def _free_field(sent: Sent, dice: random.Random) -> None:
    for one in _one_or_all(sent, dice):
        _set_field(one.head, dice.choice(FREE_FIELDS), dice)


def _free_parameter(sent: Sent, dice: random.Random) -> None:
    value = {dice.choice(("roi", "Zoom", "\ud800")): dice.choice(STRANGE) for _ in range(3)}
    sent.json = json.dumps({"a": dice.choice(STRANGE), "parameters": sent.parameters | value})


def _free_message(sent: Sent, dice: random.Random) -> None:
    wave = WaveformHeader(channels=1, number_of_samples=dice.randrange(5))
    samples = bytes(4 * wave.number_of_samples)
    sent.more += [struct.pack("<H", Id.WAVEFORM) + bytes(wave) + samples]
    sent.more += [_text(Id.TEXT, damaged(b"a line for people", dice))]


FREE = (_free_attribute, _free_field, _free_parameter, _free_message)


@pytest.mark.parametrize(("base", "count"), [("field", 800), ("echoes", 120)])
@pytest.mark.parametrize("harm", FREE)
def test_what_the_map_does_not_depend_on(base, count, harm, note_counts):
    dice, told = random.Random(f"free {base} {harm.__name__}"), 0
    whole = talk(b"".join(BASES[base]().messages()))
    for _ in range(count // len(FREE)):
        sent = BASES[base]()
        harm(sent, dice)
        found = talk(b"".join(sent.messages()))
        assert found.session.error is None
        assert found.map == whole.map
        told += found.warned
    assert harm in (_free_field, _free_message) or told > 0
    tries = count // len(FREE)
    note_counts("what a map does not depend on, in sessions", inputs=tries, same=tries)


@pytest.mark.parametrize(("base", "count"), [("field", 300), ("echoes", 60)])
def test_a_name_in_the_header(base, count, note_counts):
    """It may break the XML, which has what is needed; else the map is the same."""
    dice, seen = random.Random(f"name {base}"), Counter()
    whole = talk(b"".join(BASES[base]().messages()))
    for _ in range(count):
        sent = BASES[base]()
        sent.header = HEADER % damaged(b"M\xfcller & S\xf6hne \x95\x5c", dice)
        found = talk(b"".join(sent.messages()))
        assert found.session.error is not None or found.map == whole.map
        seen[found.session.error is None] += 1
    assert seen[True] > 0.9 * count
    what = "what a map does not depend on, in sessions"
    note_counts(what, inputs=count, refused=seen[False], same=seen[True])
