"""How long ``qsm-run --help`` takes, beside an interpreter that does nothing.

python benchmarks/bench_help.py -o benchmarks/results/help.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from qsm_deploy.export.bench.machine import machine

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "qsm-run --help": ["qsm-run", "--help"],
    "qsm-export --help": ["qsm-export", "--help"],
    "qsm-phantom --help": ["qsm-phantom", "--help"],
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeats):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    rows = [
        {"command": name, "median_seconds": round(statistics.median(s), 3), "max": round(max(s), 3)}
        for name, s in seconds.items()
    ]
    for row in rows:
        print(json.dumps(row))
    if args.output:
        result = {"machine": machine(), "repeats": args.repeats, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
