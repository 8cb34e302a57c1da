"""Everything that needs a GPU, in one command: correctness, times, memory; one JSON file.

    python -m benchmarks.gpu.suite -o benchmarks/results/gpu_NAME.json
    python -m benchmarks.gpu.suite --section kernels,pipeline --minutes 4
    python -m benchmarks.gpu.suite --pretend      # without a GPU: every row once, nothing counts

From the root of the checkout; without the package installed: ``PYTHONPATH=.dev``. Sections stand in
the order of their worth, each with its minutes, after which no row of it begins; the one that runs
then goes on to its end. Each row is printed and written as it comes. What cannot load is a row
that says why.

Every section needs PyTorch built for CUDA, nvcc, CMake, cuda-bindings, pytest, scipy, tqdm, onnx,
onnxscript, safetensors, h5py and nibabel; CuPy is measured where it is installed, as are TensorRT,
TensorRT for RTX and onnxruntime-gpu. Nothing from outside the repository is read.

Times are of whole reconstructions with the field in host memory, by the wall clock, one contender
after the other.
"""

import faulthandler
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common import Row, parser, say, write
from benchmarks.gpu import engines, kernels, pipeline, training
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.networks import ROOT, Networks
from benchmarks.gpu.pipeline import Rows

SECTIONS: dict[str, tuple[float, Callable[[Machine, Networks], Rows]]] = {
    "kernels": (1.8, kernels.rows),
    "pipeline": (1.8, pipeline.rows),
    "tensorrt": (3.0, partial(engines.rows, libraries=("tensorrt-rtx", "tensorrt"))),
    "onnxruntime": (1.5, partial(engines.rows, libraries=(engines.ONNX_RUNTIME,))),
    "training": (2.5, training.rows),
    "compiled": (2.0, pipeline.compiled_rows),
}
LONGEST_ROW = 5.0  # minutes, after which what hangs ends everything


class Suite:
    """Rows as they come, each written at once; what fails is a row too."""

    def __init__(self, output: Path | None, machine: Machine) -> None:
        self.output, self.facts = output, {"gpu": machine.facts()}
        self.pretended = {"pretended": True} if machine.pretended else {}
        self.rows: list[Row] = []

    def run(self, section: str, rows: Rows, minutes: float) -> None:
        """Measure one row after the other, until the minutes are over."""
        ends = time.monotonic() + 60 * minutes
        for name, measure in rows:
            facts: Row = {"section": section, "name": name, **self.pretended}
            began = time.monotonic()
            if began > ends:
                facts |= {"ok": False, "why": "the time was over"}
            else:
                faulthandler.dump_traceback_later(60 * LONGEST_ROW, exit=True)
                facts |= result(measure)
                faulthandler.cancel_dump_traceback_later()
            facts["took_seconds"] = round(time.monotonic() - began, 2)
            self.rows.append(say(facts))
            write(self.output, self.rows, **self.facts)


def result(measure: Callable[[], Row]) -> Row:
    """Return what was measured, or why it was not."""
    try:
        return {"ok": True} | measure()
    except Exception as error:  # whatever it is, the other rows must come
        reason = (str(error).strip() or "no reason").splitlines()[0]
        return {"ok": False, "why": f"{type(error).__name__}: {reason}"[:400]}


def main() -> None:
    """Measure, print and write; ends with an error where a pretended row failed."""
    p = parser(__doc__)
    p.add_argument("--section", default=",".join(SECTIONS), help="some, by name, in any order")
    p.add_argument("--minutes", type=float, default=15.0, help="for all of them together")
    p.add_argument("--pretend", action="store_true", help="on a made-up GPU")
    args = p.parse_args()
    chosen = args.section.split(",")
    if unknown := set(chosen) - SECTIONS.keys():
        p.error(f"--section {min(unknown)}: one of {', '.join(SECTIONS)}")
    if args.pretend and args.output and (ROOT / "benchmarks") in args.output.resolve().parents:
        p.error(f"-o {args.output}: what is pretended is no result")
    ends = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        if args.pretend:
            from benchmarks.gpu.pretend import PretendedMachine as Machine
        else:
            from benchmarks.gpu.machine import Machine
        machine = Machine(Path(folder))
        suite = Suite(args.output, machine)
        networks = Networks(machine, args.output or Path(folder) / "trained")
        for section in chosen:
            minutes, rows = SECTIONS[section]
            left = (ends - time.monotonic()) / 60
            suite.run(section, rows(machine, networks), min(minutes, left))
    if args.pretend and not all(row["ok"] for row in suite.rows):
        raise SystemExit("a row failed")


if __name__ == "__main__":
    main()
