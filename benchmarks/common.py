"""What every benchmark has: its arguments, a line of JSON for each row, and a file of results."""

import argparse
import json
from pathlib import Path
from typing import Any, TypeVar

from qsm_deploy.export.bench.machine import machine

Row = dict[str, Any]
AnyRow = TypeVar("AnyRow")


def parser(doc: str | None, *, repeats: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with ``-o`` and, where something is repeated, ``--repeats``."""
    p = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    p.add_argument("-o", "--output", type=Path)
    if repeats is not None:
        p.add_argument("--repeats", type=int, default=repeats, help=f"default {repeats}")
    return p


def say(row: AnyRow) -> AnyRow:
    """Print a row at once, and return it."""
    print(json.dumps(row), flush=True)
    return row


def write(output: Path | None, rows: Any, **facts: Any) -> None:
    """Write rows with the machine and what else holds for all of them, if there is a file."""
    if output is not None:
        result = {"machine": machine(), **facts, "rows": rows}
        output.write_text(json.dumps(result, indent=1) + "\n")
