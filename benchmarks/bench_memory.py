"""The peak memory of qsm-run under a memory limit, each run in a process of its own.

    python benchmarks/bench_memory.py MODEL.onnx ... -o benchmarks/results/memory.json

Every backend, size and file, whole and in patches, with limits from what the prediction says is
just enough downwards. A run keeps to its limit, or is refused.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, parser, say, write

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.errors import MemoryLimitError
from qsm_deploy.kernels.geometry import Geometry, Shape
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.job.memory_limit import PLANNED_SHARE
from qsm_deploy.runtime.scan.nifti import nifti_bytes

SHAPES: tuple[Shape, ...] = ((48, 48, 48), (160, 192, 160))
BACKENDS = ("onnxruntime", "openvino")
# shares of the least limit that the whole volume is run with
LIMITS = (("off", 1.0), ("off", 0.9), ("auto", 0.9), ("auto", 0.6))
MIB = 1 << 20
# prints the peak [bytes] last; a run resets it for every stage, which is kept from it here
PROGRAM = """
import re, sys
from pathlib import Path
from qsm_deploy.runtime import cli
from qsm_deploy.runtime.console import peak_memory
peak_memory.CLEAR_REFS = Path("/dev/null")
code = cli.main(sys.argv[1:])
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", peak_memory.STATUS.read_text())[1]))
sys.exit(code)
"""


def write_head(folder: Path, shape: Shape, seed: int = 9) -> list[str | Path]:
    """Write field and mask of a head, and return how qsm-run takes them."""
    head = head_phantom(Geometry(shape), seed=seed)
    field, mask = (folder / f"{name}.nii.gz" for name in ("field", "mask"))
    field.write_bytes(nifti_bytes(head.local_field_ppm, np.eye(4)))
    mask.write_bytes(nifti_bytes(head.mask.astype(np.uint8), np.eye(4)))
    return [field, "-m", mask, "-o", folder / "chi.nii.gz", "--force", "--json"]


def run(*words: object) -> tuple[int, int, float, dict[str, Any]]:
    """Return exit code, peak [bytes], time [s] and report of a run in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *said, peak = done.stdout.splitlines()
    if done.returncode not in (0, MemoryLimitError.exit_code):
        raise RuntimeError(done.stderr)
    report = json.loads(said[0]) if said else {}
    return done.returncode, int(peak), time.perf_counter() - began, report


def predicted_whole(way: tuple[Path, str], scan: list[str | Path]) -> float:
    """Return the least limit that a whole volume is run with [bytes]."""
    words = [way[0], *scan, "--backend", way[1]]
    plan = run(*words, "--dry-run")[-1]["plan"]
    alone = run(*words, "--memory-limit", "1M")[1]  # refused before anything is loaded
    return alone + MIB + plan["predicted_peak_bytes"] / PLANNED_SHARE


def limited(words: list[object], limit: int) -> Row:
    """Return how a run under a limit went."""
    code, peak, seconds, report = run(*words, "--memory-limit", limit)
    row: Row = {"limit_mib": limit // MIB, "exit_code": code, "peak_mib": round(peak / MIB)}
    row |= {"kept": peak <= limit, "seconds": round(seconds, 1)}
    if report:
        plan, memory = report["plan"], report["memory"]
        predicted = memory["baseline_bytes"] + plan["predicted_peak_bytes"]
        row |= {"predicted_mib": round(predicted / MIB), "computed": report["model"]["precision"]}
        row |= {"patches": plan["patches"], "patch_shape": plan["patch_shape"]}
    return row


def main() -> None:
    """Measure, print and write."""
    p = parser(__doc__)
    p.add_argument("models", type=Path, nargs="+")
    args = p.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for shape in SHAPES:
            scan = write_head(Path(name), shape)
            ways = [(model, backend) for model in args.models for backend in BACKENDS]
            needed = {way: predicted_whole(way, scan) for way in ways}
            for patch, share in LIMITS:
                for model, backend in ways:
                    limit = int(share * needed[model, backend])
                    found = limited([model, *scan, "--backend", backend, "--patch", patch], limit)
                    row = {"backend": backend, "shape": shape, "file": load_card(model).precision}
                    rows.append(say({**row, "patch": patch, **found}))
                    write(args.output, rows, kept=all(row["kept"] for row in rows))


if __name__ == "__main__":
    main()
