"""Numbers in MATLAB 5 files, also in structures, which ``save`` writes with -v6 and -v7.

scipy reads them too, but a damaged byte in the wrong place ends the process (a type code indexes
a C table unchecked), and numbers are a small part of the format.

MathWorks, "MAT-File Format" (2024), chapter 1.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.export.checkpoints.file_kind import refuse_inflated
from qsm_deploy.kernels.errors import WeightsError

HEADER_BYTES, TAG_BYTES = 128, 8
VERSION_5, VERSION_7_3 = 0x0100, 0x0200
BYTE_ORDERS = {b"IM": "<", b"MI": ">"}
MATRIX, COMPRESSED = 14, 15
NUMBERS = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"},
    **{7: "f4", 9: "f8", 12: "i8", 13: "u8"},
}
NUMERIC_CLASSES = range(6, 16)  # double, single and the integers; not text or cells
STRUCTURE = 2
DEEPEST = 8  # structures in each other
COMPLEX = 0x0800


def load_mat(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of real numbers in a MATLAB 5 file, without axes of length one.

    Those in a structure have its name before theirs, as in ``all.chi.mean``; arrays of structures
    are passed over.

    Raises
    ------
    WeightsError
        If the file is damaged, or of another kind or version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    order = BYTE_ORDERS.get(data[HEADER_BYTES - 2 : HEADER_BYTES])
    version = struct.unpack_from(f"{order}H", data, HEADER_BYTES - 4)[0] if order else None
    if version == VERSION_7_3:
        raise WeightsError(f"{path}: a MATLAB 7.3 file; save it again with save(..., '-v7')")
    if order is None or version != VERSION_5:
        raise WeightsError(f"{path}: not a MATLAB 5 file; save it again with save(..., '-v7')")
    try:
        return dict(_variables(data[HEADER_BYTES:], order, path))
    except (struct.error, zlib.error, ValueError, LookupError) as error:
        raise WeightsError(f"{path}: a truncated or damaged MATLAB file") from error


def _variables(data: bytes, order: str, path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    for kind, content in _elements(data, order):
        if kind == COMPRESSED:
            kind, content = next(_elements(_inflated(content, order, path), order), (0, b""))
        if kind != MATRIX:
            raise ValueError(f"element of type {kind}")
        yield from _numbers(content, order)


def _inflated(packed: bytes, order: str, path: Path) -> bytes:
    """Return an element that was compressed, with its checksum looked at."""
    tag = zlib.decompressobj().decompress(packed, TAG_BYTES)
    (count,) = struct.unpack_from(f"{order}I", tag, TAG_BYTES // 2)
    refuse_inflated(path, count)
    inflating = zlib.decompressobj()
    content = inflating.decompress(packed, TAG_BYTES + count)
    if inflating.decompress(inflating.unconsumed_tail, 1) or not inflating.eof:
        raise ValueError("not what its tag announces")
    return content


def _numbers(
    matrix: bytes, order: str, within: tuple[str, ...] = ()
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Give name and values of a matrix, or nothing if it is not one of real numbers.

    ``within`` are the names of the structures around it and its own, which stands in these.
    """
    if not matrix:  # MATLAB's for an empty field
        return
    (_, flags), *parts = _elements(matrix, order)
    (flag,) = struct.unpack_from(f"{order}I", flags)
    if flag & 0xFF == STRUCTURE and len(within) < DEEPEST:
        yield from _fields(parts, order, within)
    if flag & 0xFF not in NUMERIC_CLASSES or flag & COMPLEX:
        return
    (_, shape), (_, name), (kind, values) = parts
    array = np.frombuffer(values, np.dtype(order + NUMBERS[kind]))
    array = array.reshape(np.frombuffer(shape, np.dtype(f"{order}i4")), order="F").squeeze()
    names = within or (name.decode("ascii"),)
    if all(names):  # what objects refer to stands in a matrix without one
        yield ".".join(names), array.astype(array.dtype.newbyteorder("="))


def _fields(
    parts: list[tuple[int, bytes]], order: str, within: tuple[str, ...]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Give what is in a structure, if it is a single one."""
    (_, shape), (_, name), (_, length), (_, names), *values = parts
    if np.frombuffer(shape, np.dtype(f"{order}i4")).prod() != 1:
        return
    (each,) = struct.unpack_from(f"{order}i", length)
    fields = [names[at : at + each] for at in range(0, len(names), each)]
    outer = within or (name.decode("ascii"),)
    for field, (_, value) in zip(fields, values, strict=True):
        inner = field.partition(b"\0")[0].decode("ascii")
        yield from _numbers(value, order, (*outer, inner))


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Split data into elements: a tag with type and length, then the content."""
    at = 0
    while at < len(data):
        (kind,) = struct.unpack_from(f"{order}I", data, at)
        if kind >> 16:  # up to four bytes stand in the tag itself, which then is half as long
            kind, count, start = kind & 0xFFFF, kind >> 16, at + 4
            end = start + 4
        else:
            (count,) = struct.unpack_from(f"{order}I", data, at + 4)
            start = at + 8
            end = start + count + (0 if kind == COMPRESSED else -count % 8)
        if start + count > min(end, len(data)):
            raise ValueError("an element longer than what holds it")
        yield kind, data[start : start + count]
        at = end
