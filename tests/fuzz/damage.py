"""Seeded damage: what a file, a stream or a JSON value becomes on its way through bad hands."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

INTERESTING = (
    *(b"\x00" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00"),
    *(b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x01", b"\n", b'"', b"\xc3\x28"),
)
STRANGE: tuple[Any, ...] = (
    *(None, True, "", "x", "\ud800", "\x00", 0, -1, 10**400, 1e308, float("nan"), float("inf")),
    *([], [1], [1, 2, 3], ["1", None, 3], {}, {"a": 1}, [[[]]]),
)


def _flip(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def _replace(content: bytearray, dice: random.Random) -> None:
    start, piece = dice.randrange(len(content)), dice.choice(INTERESTING)
    content[start : start + len(piece)] = piece


def _insert(content: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(content))
    content[start:start] = dice.choice(INTERESTING)


def _remove(content: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(content))
    del content[start : start + dice.choice((1, 4, 64, 4096))]


def _cut(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content)) :]


def _repeat(content: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(content))
    content[start:start] = content[start : start + dice.choice((4, 64, 4096))]


KINDS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _flip, _replace, _insert, _remove, _cut, _repeat,
)  # fmt: skip


def damaged(content: bytes, dice: random.Random, *, within: int | None = None) -> bytes:
    """Return bytes with one to four kinds of damage, in their first ``within`` only."""
    head = bytearray(content[:within])
    for _ in range(dice.randrange(1, 5)):
        if head:
            dice.choice(KINDS)(head, dice)
    return bytes(head) + (content[within:] if within is not None else b"")


def damaged_json(value: Any, dice: random.Random) -> str:
    """Return the JSON of a value in which something was replaced, left out, or broken as text."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    for holder, key in dice.sample(places, min(len(places), dice.randrange(1, 3))):
        if isinstance(holder, dict) and dice.random() < 0.2:
            holder.pop(key, None)
        else:
            holder[key] = dice.choice(STRANGE)
    text = json.dumps(value)
    if dice.random() < 0.2:
        text = damaged(text.encode(), dice).decode("latin-1")
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else []
    keys += range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])
