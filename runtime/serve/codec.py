"""Messages of the ISMRMRD streaming protocol from bytes and to bytes; no input, no output.

Little-endian. Every message begins with a two-byte id; what follows has a fixed size, or states
its size, which is checked before a byte of it is asked for. The package ``ismrmrd``, whose types
these are, is imported here only.

References
----------
Inati et al., Magn Reson Med 77:411-421 (2017); the ``ismrmrd.h`` of version 1.
"""

import ctypes
import math
import re
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import DataError, ProtocolError
from qsm_deploy.runtime.serve.budget import held_bytes
from qsm_deploy.runtime.serve.limits import Limits
from qsm_deploy.runtime.serve.texts import (
    Attributes,
    decoded,
    one_line,
    parse_attributes,
    whole_attributes,
)

with warnings.catch_warnings():  # importing it changes the filters of the whole process
    from ismrmrd import Meta
    from ismrmrd.acquisition import AcquisitionHeader
    from ismrmrd.image import ImageHeader
    from ismrmrd.waveform import WaveformHeader

Level = Literal["INFO", "WRN", "ERR"]  # Siemens' log viewer colours by the first three letters
Buffer = bytes | bytearray | memoryview


class Id(IntEnum):
    """The message ids that scanner hosts send and take."""

    CONFIG_FILE = 1
    CONFIG_TEXT = 2
    HEADER = 3
    CLOSE = 4
    TEXT = 5
    ACQUISITION = 1008
    IMAGE = 1022
    WAVEFORM = 1026


CONFIG_FILE_BYTES = 1024
# of those used here, what the header cannot stand in for
ONLY_IN_ATTRIBUTES = (
    *("ImageRowDir", "ImageColumnDir", "ImageSliceNormDir"),
    *("RescaleSlope", "RescaleIntercept"),
)
OBJECT_BYTES = 2000  # of an image's objects, besides what they hold; measured
LENGTH_BYTES = 4
IMAGE_HEAD_BYTES = ctypes.sizeof(ImageHeader) + 8  # the length of the attributes follows it
# as ismrmrd.h has them; the package takes type 4 for eight bytes
PIXEL_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u2"),
    2: np.dtype("<i2"),
    3: np.dtype("<u4"),
    4: np.dtype("<i4"),
    5: np.dtype("<f4"),
    6: np.dtype("<f8"),
    7: np.dtype("<c8"),
    8: np.dtype("<c16"),
}


@dataclass(frozen=True)
class Text:
    """A message that is a string: its id tells which."""

    id: Id
    text: str


@dataclass(frozen=True)
class Image:
    """An image as it came.

    Attributes
    ----------
    head
        Its header.
    attributes
        Values by name, as text.
    pixels
        (channel, z, y, x) view of ``body``.
    frame
        The bytes of its header with the length of its attributes, and of what follows.
    fault
        What is wrong with the attributes, of which those that are whole were read.
    """

    head: Any
    attributes: Attributes
    pixels: NDArray[Any]
    frame: tuple[Buffer, Buffer]
    fault: str | None = None

    def values(self, name: str) -> list[str]:
        """Return the values of an attribute; none where it was not sent.

        Raises
        ------
        DataError
            If it was, or may have been, in what could not be read of the attributes.
        """
        if self.fault is not None and name not in self.attributes:
            text = decoded(bytes(memoryview(self.frame[1])[: -self.pixels.nbytes]))
            cut = "<ismrmrdMeta" in text and "</ismrmrdMeta" not in text
            if re.search(rf"\b{name}\b", text) or (cut and name in ONLY_IN_ATTRIBUTES):
                raise DataError(f"cannot read the attribute {name} of an image: {self.fault}")
            self.attributes[name] = []  # searched once: the text may be long
        return self.attributes.get(name, [])

    @property
    def held_bytes(self) -> int:
        """What Python holds it in."""
        texts = held_bytes(self.attributes) + held_bytes(self.fault)
        return OBJECT_BYTES + sum(len(part) for part in self.frame) + texts


@dataclass(frozen=True)
class Other:
    """A message without use here: the end of the session, raw data, or a waveform."""

    id: Id


Message = Text | Image | Other


class Decoder:
    """Turns a stream into messages, piece by piece.

    ``wanted`` says how many bytes the next call of :meth:`feed` takes; a piece never spans two
    messages.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._id = Id.CLOSE
        self._expect(2, "id", self._begin)

    def _expect(self, wanted: int, part: str, take: Callable[[Buffer], Message | None]) -> None:
        self.wanted, self._part, self._take = wanted, part, take

    def feed(self, piece: Buffer) -> Message | None:
        """Take exactly ``wanted`` bytes and return the message that they complete.

        Raises
        ------
        ProtocolError
            If the id is unknown, a size is beyond the limits, or the content is malformed.
        """
        assert len(piece) == self.wanted
        message = self._take(piece)
        if message is not None:
            self._expect(2, "id", self._begin)
        return message

    def ended(self, received: int) -> ProtocolError | None:
        """Return what to say of a stream that ends now; ``None`` between two messages."""
        if self._part == "id" and received == 0:
            return None
        name = "a message" if self._part == "id" else f"a message {self._id.name}"
        return ProtocolError(
            f"the stream ends in the {self._part} of {name}: {received} of {self.wanted} bytes"
        )

    def _begin(self, piece: Buffer) -> Message | None:
        (number,) = struct.unpack("<H", piece)
        if number not in Id.__members__.values():
            known = ", ".join(f"{i} {i.name}" for i in Id)
            raise ProtocolError(f"unknown message id {number}; this server knows {known}")
        self._id = Id(number)
        if self._id == Id.CLOSE:
            return Other(self._id)
        if self._id == Id.CONFIG_FILE:
            self._expect(CONFIG_FILE_BYTES, "name", self._text)
        elif self._id == Id.IMAGE:
            self._expect(IMAGE_HEAD_BYTES, "header", self._image_head)
        elif self._id == Id.ACQUISITION:
            self._expect(ctypes.sizeof(AcquisitionHeader), "header", self._acquisition_head)
        elif self._id == Id.WAVEFORM:
            self._expect(ctypes.sizeof(WaveformHeader), "header", self._waveform_head)
        else:
            self._expect(LENGTH_BYTES, "length", self._length)
        return None

    def _length(self, piece: Buffer) -> Message | None:
        (length,) = struct.unpack("<I", piece)
        self._require_size(length, self._limits.text_bytes)
        self._expect(length, "text", self._text)
        return self._text(b"") if length == 0 else None

    def _text(self, piece: Buffer) -> Message:
        return Text(self._id, decoded(bytes(piece)).rstrip("\0"))

    def _image_head(self, piece: Buffer) -> Message | None:
        head = ImageHeader.from_buffer_copy(piece)
        (attributes,) = struct.unpack("<Q", piece[-8:])
        x, y, z = (int(n) for n in head.matrix_size)
        shape = (int(head.channels), z, y, x)
        if head.data_type not in PIXEL_TYPES:
            raise ProtocolError(f"an image of data type {head.data_type}; 1 to 8 are known")
        if not 1 <= min(shape) <= max(shape) <= self._limits.matrix:
            raise ProtocolError(
                f"an image of matrix {x} x {y} x {z} and {head.channels} channels; each must be "
                f"1 to {self._limits.matrix}"
            )
        kind = PIXEL_TYPES[head.data_type]
        # Python's integers: a product of hostile sizes must not overflow
        pixels = math.prod(shape) * kind.itemsize
        self._require_size(attributes, self._limits.text_bytes)
        self._require_size(attributes + pixels, self._limits.message_bytes)

        def image(body: Buffer) -> Message:
            view = np.frombuffer(body, kind, offset=attributes).reshape(shape)
            text = decoded(bytes(memoryview(body)[:attributes]))
            try:
                return Image(head, parse_attributes(text), view, (piece, body))
            except ProtocolError as error:  # the image itself is whole
                return Image(head, whole_attributes(text), view, (piece, body), str(error))

        self._expect(attributes + pixels, "pixels", image)
        return None

    def _acquisition_head(self, piece: Buffer) -> Message | None:
        head = AcquisitionHeader.from_buffer_copy(piece)
        words = head.trajectory_dimensions + 2 * head.active_channels
        return self._skip(4 * words * head.number_of_samples)

    def _waveform_head(self, piece: Buffer) -> Message | None:
        head = WaveformHeader.from_buffer_copy(piece)
        return self._skip(4 * head.channels * head.number_of_samples)

    def _skip(self, size: int) -> Message | None:
        self._require_size(size, self._limits.message_bytes)
        if size == 0:
            return Other(self._id)
        self._expect(size, "samples", lambda _: Other(self._id))
        return None

    def _require_size(self, size: int, limit: int) -> None:
        if size > limit:
            raise ProtocolError(
                f"a message {self._id.name} announces {size} bytes; this server takes {limit}"
            )


def text_frame(level: Level, text: str) -> bytes:
    """Return a TEXT message, one log line; hosts read the level off its first three letters."""
    line = f"{level} {one_line(text)}\0".encode()
    return struct.pack("<HI", Id.TEXT, len(line)) + line


def close_frame() -> bytes:
    """Return a CLOSE message."""
    return struct.pack("<H", Id.CLOSE)


def image_frames(head: Any, attributes: Mapping[str, Sequence[str]], pixels: NDArray[Any]) -> bytes:
    """Return an IMAGE message.

    Parameters
    ----------
    head
        Its header; type, size and length of the attributes are taken from what follows.
    attributes
        Values by name.
    pixels
        (z, y, x) array of one of the protocol's types.
    """
    meta = Meta({name: list(values) for name, values in attributes.items()})
    text: bytes = meta.serialize().encode()
    head = ImageHeader.from_buffer_copy(head)
    head.data_type = next(n for n, kind in PIXEL_TYPES.items() if kind == pixels.dtype)
    head.channels = 1
    head.matrix_size[:] = pixels.shape[::-1]
    head.attribute_string_len = len(text)
    start = struct.pack("<H", Id.IMAGE) + bytes(head) + struct.pack("<Q", len(text))
    return start + text + pixels.tobytes()


def resent_frames(image: Image) -> tuple[Buffer, ...]:
    """Return the IMAGE message that an image came in, byte for byte."""
    head, body = image.frame
    return struct.pack("<H", Id.IMAGE) + bytes(head), body
