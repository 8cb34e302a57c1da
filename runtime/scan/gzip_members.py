"""What gzip packed, read piece by piece, so that nothing takes more memory than it announced."""

import re
import zlib
from collections.abc import Iterator

GZIP_MAGIC = b"\x1f\x8b"
PIECE_BYTES = 1 << 20
MOST_AFTER = 1 << 28  # bytes after what was announced, before it is another file than that
PADDING = re.compile(rb"\0*")  # as tapes and gzip itself leave it between members


def unpacked(content: bytes, announced: int) -> tuple[bytes, list[str]]:
    """Return what gzip packed, no more than was announced, and what follows in words.

    Every member is read to its end, where gzip has its checksum. Content that is not packed stays.

    Raises
    ------
    EOFError, zlib.error
        If a member is cut short or damaged.
    ValueError
        If far more follows.
    """
    if not content.startswith(GZIP_MAGIC):
        return content[:announced], _left(len(content) - announced, "the voxels")
    kept, size, end = bytearray(), 0, 0
    for piece, at in pieces(content):
        kept += piece[: announced - len(kept)]
        size += len(piece)
        end = at
        if size - announced > MOST_AFTER:
            raise ValueError(f"announces {announced} bytes of a file that unpacks to far more")
    after_data = _left(len(content) - end, "the compressed data")
    return bytes(kept), _left(size - announced, "the voxels") + after_data


def _left(count: int, what: str) -> list[str]:
    return [f"{count} bytes after {what}"] if count > 0 else []


def pieces(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield what the members of a gzip file hold, piece by piece, and where each ends in it.

    Raises
    ------
    EOFError, zlib.error
        If a member is cut short or damaged.
    """
    at = 0
    while content.startswith(GZIP_MAGIC, at):
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            packed = member.unconsumed_tail or content[at : at + PIECE_BYTES]
            if not packed:
                raise EOFError("cut short within the compressed data")
            at += 0 if member.unconsumed_tail else len(packed)
            piece = member.decompress(packed, PIECE_BYTES)
            at -= len(member.unused_data)
            yield piece, at
        after = PADDING.match(content, at).end()  # type: ignore[union-attr]  # nothing matches too
        at = after if content.startswith(GZIP_MAGIC, after) else at
