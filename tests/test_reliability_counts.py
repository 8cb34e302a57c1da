"""docs/reliability.md has the counts of benchmarks/results/reliability.json, and all of them."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
DAMAGED, KILLED = ("inputs", "refused", "same", "other"), ("kills", "writing")


def number(cell: str) -> int:
    """Return the number that a cell begins with, 0 for none."""
    return int(re.match(r"[\d,]*", cell)[0].replace(",", "") or 0)


def test_every_count_has_its_line() -> None:
    result = json.loads((ROOT / "benchmarks/results/reliability.json").read_text())
    text = (ROOT / "docs/reliability.md").read_text()
    told = {}
    for line in text.splitlines():
        what, *cells = [cell.strip() for cell in LINK.sub(r"\1", line).strip("|").split("|")]
        told[what] = [*map(number, cells)]
    for row in result["rows"]:
        keys = KILLED if "kills" in row else DAMAGED
        assert told[row["what"]][: len(keys)] == [row.get(key, 0) for key in keys], row
    assert {what for what, cells in told.items() if any(cells)} <= {
        r["what"] for r in result["rows"]
    }
    for key in ("inputs", "kills"):
        assert result["total"][key] == sum(row.get(key, 0) for row in result["rows"])
        assert f"{result['total'][key]:,} " in text
    assert [result["total"][key] for key in ("failures", "errors")] == [0, 0]
