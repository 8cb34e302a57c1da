"""How much damaged input and how many kills the tests try, and what became of them.

python benchmarks/bench_reliability.py -o benchmarks/results/reliability.json

A test fails at the first traceback, hang, wrong exit code or other map without a word, and where
one fails nothing is written: the results are those of a run in which there was none.
"""

import datetime
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from common import Row, parser, say, write

ROOT = Path(__file__).parents[1]
LONGEST_S = 7200
FAULTS = ("tracebacks", "hangs", "wrong_exit_codes", "silent_wrong")


def main() -> None:
    """Run the tests, add up what they note, print and write."""
    args = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts")
        command = [sys.executable, "-m", "pytest", "-v", "-n0", f"--counts={counts}"]
        subprocess.run(command, check=True, cwd=ROOT, timeout=LONGEST_S)
        noted = [json.loads(line) for line in counts.read_text().splitlines()]
    write_sum(noted, args.output)


def write_sum(noted: list[Row], output: Path | None) -> None:
    """Write what the tests noted, with one row for each kind of damage."""
    rows: dict[str, Counter[str]] = {}
    for one in noted:
        rows.setdefault(one.pop("what"), Counter()).update(one)
    total = {key: sum(row[key] for row in rows.values()) for key in ("inputs", "kills")}
    total |= dict.fromkeys(FAULTS, 0)
    made = [say({"what": what, **row}) for what, row in sorted(rows.items())]
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    write(output, made, date=date, total=say(total))


if __name__ == "__main__":
    main()
