"""A plan as a file: the engine, the ONNX graph that it was built from, and a footer for both.

``docs/plan-file.md`` is the format. Plans of the former form are an engine alone.
"""

import os
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
OF_ENGINE = ("engine", "versions", "gpu", "shapes", PROMISE)  # options of its card, not the graph's


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
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END) - FOOTER.size
            file.seek(max(end, 0))
            footer = file.read()
            file.seek(0)
            if end < 0 or not footer.endswith(MAGIC):
                return _former(file.read(), path)
            at, length, graph_at, graph_length, *digests, form, zero, _ = FOOTER.unpack(footer)
            if (form, zero) != (FORM, 0):
                raise EngineError(
                    f"{path}: a plan file of form {form}, this version reads form {FORM}: "
                    "update qsm-deploy, or export it again"
                )
            if not (at == 0 < length == graph_at < graph_at + graph_length == end):
                raise EngineError(
                    f"{path}: damaged: its footer tells of an engine of {length} bytes at {at} and "
                    f"a graph of {graph_length} at {graph_at}, where {end} are; copy or export it "
                    "again"
                )
            plan = PlanFile(file.read(length), file.read(graph_length))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for name, digest in zip(("engine", "graph"), digests, strict=True):
        if sha256(getattr(plan, name)).digest() != digest:
            raise EngineError(
                f"{path}: damaged: its {name} is not what was written (SHA-256); "
                "copy or export it again"
            )
    return plan


def _former(data: bytes, path: Path) -> PlanFile:
    if PROMISED in data:
        raise EngineError(f"{path}: truncated: its end is missing; copy or export it again")
    return PlanFile(data, None)
