"""How long ``qsm-run --help`` takes, beside an interpreter that does nothing.

python benchmarks/bench_help.py -o benchmarks/results/help.json
"""

import statistics
import subprocess
import sys
import time

from common import parser, say, write

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "qsm-run --help": ["qsm-run", "--help"],
    "qsm-export --help": ["qsm-export", "--help"],
    "qsm-phantom --help": ["qsm-phantom", "--help"],
}


def main() -> None:
    """Measure, print and write."""
    args = parser(__doc__, repeats=20).parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeats):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, s in seconds.items():
        found = {"median_seconds": round(statistics.median(s), 3), "max": round(max(s), 3)}
        rows.append(say({"command": name, **found}))
    write(args.output, rows, repeats=args.repeats)


if __name__ == "__main__":
    main()
