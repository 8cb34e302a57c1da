"""The card in a model file, ONNX or a plan, without the library that made it or runs it."""

import json
import os
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from qsm_deploy.kernels.errors import CardError, DataError, EngineError
from qsm_deploy.runtime.card.card import MAX_BYTES, METADATA_KEY, ModelCard, parse_card
from qsm_deploy.runtime.card.plan_file import OF_ENGINE, PROMISE, PlanFile, read_plan

ONNX, PLAN = ".onnx", ".plan"
FIRST_FIELD = re.compile(rb'{"(anchor|axes|constants)":')  # of the canonical form
ONNX_FIRST_BYTE = b"\x08"  # the tag of ir_version, which libraries without it report at length
METADATA_PROPS, ENTRY_KEY, ENTRY_VALUE = 14, 1, 2  # fields of onnx.proto
Span = tuple[int, int]  # of a message: its first byte, and that after its last
VARINT, LENGTH, FIXED_BYTES = 0, 2, {1: 8, 5: 4}  # how protobuf holds a field
LONGEST_VARINT = 10  # bytes
MOST_TAG = 2**32 - 1
MOST_FIELDS = 2**20  # of one message; a network's graph has thousands


def load_card(path: Path) -> ModelCard:
    """Return the card of an ONNX file or a plan.

    Of an ONNX file the graph is skipped, not read: what it holds is for who runs it to check. Of a
    plan it is the engine's card.

    Raises
    ------
    DataError
        If the file is missing.
    EngineError
        If it is neither, or damaged.
    CardError
        If there is no card, as where a plan is cut off before it, or it is malformed.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such model file")
    if path.suffix == PLAN:
        return open_plan(path)[1]
    if path.suffix != ONNX:
        raise EngineError(f"{path}: neither an .onnx model nor a .plan; make one with qsm-export")
    with path.open("rb") as file:
        _require_onnx(file.read(1), path)
        return card_from(_metadata(file, path).get(METADATA_KEY), path)


def open_plan(path: Path) -> tuple[PlanFile, ModelCard]:
    """Return the parts of a plan, and the card of its engine.

    Raises
    ------
    DataError, EngineError
        As :func:`qsm_deploy.runtime.card.plan_file.read_plan`.
    CardError
        If it has no card, or engine and graph are of two networks.
    """
    plan = read_plan(path)
    card = card_in_plan(plan.engine, path)
    if plan.graph is not None:
        _require_onnx(plan.graph[:1], path)
        inside = card_from(_metadata(BytesIO(plan.graph), path).get(METADATA_KEY), path)
        if PROMISE not in card.options or _of_network(card) != _of_network(inside):
            raise CardError(
                f"{path}: its engine and its graph have different cards; export it again"
            )
    return plan, card


def _of_network(card: ModelCard) -> ModelCard:
    """Return what the cards of an engine and of its graph must agree on."""
    options = {name: value for name, value in card.options.items() if name not in OF_ENGINE}
    return replace(card, options=options, memory={})


@contextmanager
def onnx_file(path: Path) -> Iterator[Path]:
    """Yield the name of an ONNX file, which for that in a plan is of a file in memory.

    From bytes OpenVINO drops inputs that nothing uses.

    Raises
    ------
    DataError
        If the file is missing.
    EngineError
        If it is neither, by name or first byte, damaged, or a plan of the former form.
    CardError
        If a plan has no card, or two that differ.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such model file")
    if path.suffix != PLAN:
        with path.open("rb") as opened:
            _require_onnx(opened.read(1) if path.suffix == ONNX else b"", path)
        yield path
        return
    plan, card = open_plan(path)
    if plan.graph is None:
        raise _no_graph(card, path)
    with open(os.memfd_create("graph"), "wb") as file:
        file.write(plan.graph)
        file.flush()
        yield Path(f"/proc/self/fd/{file.fileno()}")


def graph_in(path: Path) -> bytes:
    """Return an ONNX file, or the one in a plan.

    Raises
    ------
    DataError, EngineError, CardError
        As :func:`onnx_file`.
    """
    with onnx_file(path) as file:
        return file.read_bytes()


def _require_onnx(first: bytes, path: Path) -> None:
    if first != ONNX_FIRST_BYTE:
        raise EngineError(f"{path}: not an .onnx model; make one with qsm-export")


def card_from(text: str | None, path: Path) -> ModelCard:
    """Return the card that a file holds as text; ``path`` is for messages.

    Raises
    ------
    CardError
        If there is none, it is malformed, or longer than any that is written.
    """
    if not text:
        raise CardError(
            f"{path} has no model card; export it with qsm-export (--onnx if others made it)"
        )
    if len(text) > MAX_BYTES:
        raise CardError(f"{path}: the model's card has {len(text)} bytes, at most {MAX_BYTES} fit")
    try:
        return parse_card(text)
    except CardError as error:
        raise CardError(f"{path}: {error}") from None


def read_card(path: Path, text: str | None, inputs: list[str], outputs: list[str]) -> ModelCard:
    """Return the card in a model's metadata, checked against the graph's names.

    Raises
    ------
    CardError
        If there is none, or it names other inputs or outputs than the graph has.
    """
    card = card_from(text, path)
    stated = [tensor.name for tensor in card.inputs]
    gives = [tensor.name for tensor in card.outputs]
    if sorted(stated) != sorted(inputs) or gives != outputs:
        raise CardError(
            f"{path}: the card contradicts the graph: inputs {stated} -> {', '.join(gives)}, "
            f"the graph has {inputs} -> {', '.join(outputs)}; export it again"
        )
    return card


def card_in_plan(data: bytes, path: Path) -> ModelCard:
    """Return the card in the bytes of a plan; ``path`` is for messages.

    Raises
    ------
    CardError
        As :func:`load_card`.
    """
    found = FIRST_FIELD.search(data)
    text = data[found.start() :][:MAX_BYTES].decode("latin-1") if found else ""
    try:
        _, length = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        raise CardError(
            f"{path} has no whole model card: it is truncated, or not a plan of qsm-export; "
            "export it again"
        ) from None
    return card_from(text[:length], path)


def _no_graph(card: ModelCard, path: Path) -> EngineError:
    """Return what to say of a plan of the former form, which is for one kind of GPU alone."""
    engine = card.options.get("engine", "TensorRT")
    return EngineError(
        f"{path}: a plan of {card.network} in {card.precision} for {engine}, of the former form: "
        "without a graph it runs on the GPU that it was built for only; export it again"
    )


def not_whole(path: Path) -> EngineError:
    """Return what to say of an ONNX file that is no whole protobuf message."""
    return EngineError(
        f"{path}: not a valid .onnx model, truncated or damaged: cannot load it; export it again"
    )


def _metadata(file: BinaryIO, path: Path) -> dict[str, str]:
    """Return the metadata of an ONNX file."""
    found = {}
    try:
        for _, entry in fields(file, whole(file), (METADATA_PROPS,)):
            pair = {
                number: read(file, text).decode()
                for number, text in fields(file, entry, (ENTRY_KEY, ENTRY_VALUE))
            }
            found[pair.get(ENTRY_KEY, "")] = pair.get(ENTRY_VALUE, "")
    except ValueError:
        raise not_whole(path) from None
    return found


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
        if (tag := _varint(file)) > MOST_TAG:
            raise ValueError("a field number that libraries cut off")
        number, kind = divmod(tag, 8)
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
