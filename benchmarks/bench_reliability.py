"""How much damaged input and how many kills the tests try, and what became of them.

python benchmarks/bench_reliability.py -o benchmarks/results/reliability.json

A test fails at the first traceback, hang, wrong exit code or other map without a word.
"""

import datetime
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from common import parser, say, write

ROOT = Path(__file__).parents[1]
LONGEST_S = 7200
TESTS = ("tests", "failures", "errors", "skipped")


def main() -> None:
    """Run the tests, add up what they note, print and write."""
    args = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, results = Path(folder, "counts"), Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "-v", "-n0"]
        command += [f"--counts={counts}", f"--junit-xml={results}"]
        subprocess.run(command, check=False, cwd=ROOT, timeout=LONGEST_S)
        suite = ElementTree.parse(results).getroot().find("testsuite")
        noted = [json.loads(line) for line in counts.read_text().splitlines()]
    assert suite is not None
    rows: dict[str, Counter[str]] = {}
    for one in noted:
        rows.setdefault(one.pop("what"), Counter()).update(one)
    total = {key: sum(row[key] for row in rows.values()) for key in ("inputs", "kills")}
    total |= {key: int(suite.get(key, 0)) for key in TESTS}
    made = [say({"what": what, **row}) for what, row in sorted(rows.items())]
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    write(args.output, made, date=date, total=say(total))


if __name__ == "__main__":
    main()
