"""A plan as a file: the engine, the ONNX graph that it was built from, and a footer for both.

``docs/plan-file.md`` is the format. Plans of the former form are an engine alone.
"""

import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from qsm_deploy.kernels.errors import DataError, EngineError

MAGIC = b"QSMPLAN\0"
FORM = 1
# offset and length of the engine, the same of the graph, their SHA-256, form, 0, magic
FOOTER = struct.Struct("<4Q32s32sII8s")
# in the card of an engine that a graph belongs to, so that a file without its end is no former one
PROMISE = "plan"
PROMISED = f'"{PROMISE}":"{FORM}"'.encode()


@dataclass(frozen=True)
class PlanFile:
    """The parts of a plan; ``graph`` is ``None`` in the former form."""

    engine: bytes
    graph: bytes | None


def plan_bytes(engine: bytes, graph: bytes) -> bytes:
    """Return a plan; the card in its engine must say ``PROMISE`` among its options."""
    lengths = (0, len(engine), len(engine), len(graph))
    digests = (sha256(part).digest() for part in (engine, graph))
    return engine + graph + FOOTER.pack(*lengths, *digests, FORM, 0, MAGIC)


def read_plan(path: Path) -> PlanFile:
    """Return the parts of a plan, which are as they were written.

    Raises
    ------
    DataError
        If the file cannot be read.
    EngineError
        If it is truncated, damaged, or of a form that is not known here.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not data.endswith(MAGIC) or len(data) < FOOTER.size:
        if PROMISED in data:
            raise EngineError(f"{path}: truncated: its end is missing; copy or export it again")
        return PlanFile(data, None)
    end = len(data) - FOOTER.size
    at, length, graph_at, graph_length, *digests, form, zero, _ = FOOTER.unpack(data[end:])
    if (form, zero) != (FORM, 0):
        raise EngineError(
            f"{path}: a plan file of form {form}, this version reads form {FORM}: "
            "update qsm-deploy, or export it again"
        )
    if not (at == 0 < length == graph_at < graph_at + graph_length == end):
        raise EngineError(
            f"{path}: damaged: its footer tells of an engine of {length} bytes at {at} and a "
            f"graph of {graph_length} at {graph_at}, where {end} are; copy or export it again"
        )
    parts = data[:length], data[graph_at:end]
    for part, name, digest in zip(parts, ("engine", "graph"), digests, strict=True):
        if sha256(part).digest() != digest:
            raise EngineError(
                f"{path}: damaged: its {name} is not what was written (SHA-256); "
                "copy or export it again"
            )
    return PlanFile(*parts)
