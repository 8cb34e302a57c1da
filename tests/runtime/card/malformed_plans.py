"""Plans that are no plans, and what is said of them; the readers in Python and in C take them all.

Every row is made of a whole plan's engine and graph.
"""

from collections.abc import Callable

from qsm_deploy.runtime.card.plan_file import FOOTER, plan_bytes

HUGE = 2**64 - 1
FIELDS = (
    *("at", "length", "graph_at", "graph_length", "engine_digest", "graph_digest"),
    *("form", "zero", "magic"),
)
Make = Callable[[bytes, bytes], bytes]


def footer(**changed: int | bytes) -> Make:
    """Return what makes a plan whose footer says something else."""

    def make(engine: bytes, graph: bytes) -> bytes:
        seen = FOOTER.unpack(plan_bytes(engine, graph)[-FOOTER.size :])
        fields = dict(zip(FIELDS, seen, strict=True)) | changed
        return engine + graph + FOOTER.pack(*fields.values())

    return make


def cut(keep: Callable[[int, int], int]) -> Make:
    """Return what makes a plan that ends earlier; takes the lengths of engine and graph."""
    return lambda engine, graph: plan_bytes(engine, graph)[: keep(len(engine), len(graph))]


def flipped(place: Callable[[int, int], int]) -> Make:
    """Return what makes a plan with one other bit."""

    def make(engine: bytes, graph: bytes) -> bytes:
        data = bytearray(plan_bytes(engine, graph))
        data[place(len(engine), len(graph))] ^= 1
        return bytes(data)

    return make


MALFORMED: dict[str, tuple[str, Make]] = {
    "nothing left": ("card", cut(lambda e, g: 0)),
    "cut in the engine's first bytes": ("card", cut(lambda e, g: 10)),
    "cut where the engine ends": ("truncated", cut(lambda e, g: e)),
    "cut in the graph": ("truncated", cut(lambda e, g: e + g // 2)),
    "cut where the footer begins": ("truncated", cut(lambda e, g: e + g)),
    "cut in the footer": ("truncated", cut(lambda e, g: e + g + 50)),
    "cut before the last byte": ("truncated", cut(lambda e, g: e + g + FOOTER.size - 1)),
    "one byte too much": ("truncated", lambda e, g: plan_bytes(e, g) + b"\n"),
    "another magic": ("truncated", footer(magic=b"QSMPLAN\1")),
    "a footer alone": ("damaged", lambda e, g: plan_bytes(e, g)[-FOOTER.size :]),
    "the magic alone": ("card", lambda e, g: plan_bytes(e, g)[-8:]),
    "an engine beyond the end": ("damaged", footer(length=10**12)),
    "a graph beyond the end": ("damaged", footer(graph_length=10**12)),
    "an engine of all bytes there are": ("damaged", footer(length=HUGE)),
    "a graph of all bytes there are": ("damaged", footer(graph_length=HUGE)),
    "offsets that add up to more than 64 bits": (
        "damaged",
        footer(graph_at=HUGE, graph_length=HUGE),
    ),
    "an engine that does not begin the file": ("damaged", footer(at=1)),
    "parts that overlap": ("damaged", footer(graph_at=5)),
    "a graph that lies in the engine": ("damaged", footer(graph_at=0, graph_length=10)),
    "no engine": ("damaged", lambda e, g: plan_bytes(b"", g)),
    "an engine without a graph": ("damaged", lambda e, g: plan_bytes(e, b"")),
    "bytes between the parts": ("damaged", lambda e, g: e + b"?" + plan_bytes(e, g)[len(e) :]),
    "another engine": ("engine is not", flipped(lambda e, g: e - 1)),
    "another graph": ("graph is not", flipped(lambda e, g: e + g - 1)),
    "another digest of the engine": ("engine is not", footer(engine_digest=bytes(32))),
    "another digest of the graph": ("graph is not", footer(graph_digest=bytes(32))),
    "a later form": ("form 2", footer(form=2)),
    "a bit that must be 0": ("form 1", footer(zero=1)),
}
