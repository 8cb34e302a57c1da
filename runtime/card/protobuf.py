"""Fields of protobuf messages in a file, without protobuf: those that are wanted, others unread."""

import os
from collections.abc import Container, Iterator
from typing import BinaryIO

Span = tuple[int, int]  # of a message: its first byte, and that after its last
VARINT, LENGTH, FIXED_BYTES = 0, 2, {1: 8, 5: 4}  # how a field is held
LONGEST_VARINT = 10  # bytes
MOST_FIELDS = 2**20  # of one message; a network's graph has thousands


def whole(file: BinaryIO) -> Span:
    """Return where the message that is the whole file lies."""
    return 0, file.seek(0, os.SEEK_END)


def fields(file: BinaryIO, span: Span, wanted: Container[int]) -> Iterator[tuple[int, Span]]:
    """Yield number and place of the wanted fields of a message that have a length.

    Raises
    ------
    ValueError
        If this is no whole message, or one of more than ``MOST_FIELDS``.
    """
    at, end = span
    for _ in range(MOST_FIELDS):
        if at >= end:
            return
        file.seek(at)
        number, kind = divmod(_varint(file), 8)
        size = _varint(file) if kind in (VARINT, LENGTH) else FIXED_BYTES.get(kind, end)
        start = file.tell()
        at = start + (0 if kind == VARINT else size)
        if at > end:
            raise ValueError("a field ends beyond the message")
        if number in wanted and kind == LENGTH:
            yield number, (start, at)
    raise ValueError("too many fields")


def read(file: BinaryIO, span: Span) -> bytes:
    """Return the content of a field."""
    file.seek(span[0])
    return file.read(span[1] - span[0])


def _varint(file: BinaryIO) -> int:
    value = 0
    for n in range(LONGEST_VARINT):
        (byte,) = file.read(1)  # raises ValueError at the end
        value |= (byte & 0x7F) << 7 * n
        if byte < 0x80:
            return value
    raise ValueError("a number without an end")
