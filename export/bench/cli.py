"""``qsm-bench``: how fast an engine is, beside others and beside what the device can do."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qsm_deploy.runtime.console.command import add_version, needs_extra, run_command
from qsm_deploy.runtime.job.arguments import (
    add_backend,
    host_from,
    patch_size,
    positive_count,
)

NAME = "qsm-bench"
EPILOG = """\
examples:
  qsm-bench tv-unet.onnx --shape 160 192 160
  qsm-bench ir2qsm.onnx --shape 96 96 96 --against torch onnxruntime --weights model_IR2Unet.pth
  qsm-bench ir2qsm.onnx --shape 96 96 96 --against ir2qsm-fp16.onnx --json

exit codes: 0 done, 2 usage, 3 files, 4 model or backend, 6 memory, 7 weights, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parser().parse_args(argv)

    def command() -> str:
        with needs_extra("export", NAME):
            from qsm_deploy.export.bench.contenders import Lineup, find_contenders
            from qsm_deploy.export.bench.job import run_bench
            from qsm_deploy.export.bench.text import bench_text
            from qsm_deploy.runtime.console.terminal import TerminalLog

            given = (arguments.weights, arguments.normalisation)
            lineup = Lineup(arguments.engine, arguments.against, *given, host_from(arguments))
            log = TerminalLog(quiet=arguments.quiet)
            result = run_bench(
                find_contenders(lineup, log),
                tuple(arguments.shape),
                log,
                weights=arguments.weights,
                normalisation=arguments.normalisation,
                repeats=arguments.repeats,
                patch=arguments.patch,
                threads=arguments.threads,
            )
            return json.dumps(result) if arguments.json else bench_text(result)

    return run_command(NAME, command)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(
        prog=NAME,
        description="Reconstruct a drawn head with an engine, time every stage, and compare speed, "
        "memory and accuracy with other engines and with PyTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    # fmt: off
    add("engine", type=Path, metavar="ENGINE", help="an .onnx file or a .plan of qsm-export")
    add("--shape", nargs=3, type=positive_count, metavar=("X", "Y", "Z"), required=True,
        help="voxels of the head along each axis, 1 mm each")
    add("--against", nargs="+", default=[], metavar="torch|onnxruntime|openvino|ENGINE2",
        help="what else to run, in turns: PyTorch, the engine in another library, another engine")
    add("--weights", type=Path, nargs="+", default=[], metavar="FILE",
        help="what the engine was made of, for PyTorch; else the bundled weights, if it was those")
    add("--normalisation", type=Path, nargs="+", default=[], metavar="FILE",
        help="the authors' file of means, deviations and settings, as for qsm-export")
    add("--repeats", type=positive_count, default=5, metavar="N",
        help="timed reconstructions of each, after one to warm up (default 5)")
    add("--patch", type=patch_size, default="auto", metavar="auto|off|N",
        help="as for qsm-run; every contender runs the same patches")
    add("--json", action="store_true", help="everything as one JSON line on stdout")
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    # fmt: on
    add_backend(p.add_argument_group("backend, the precision that of ENGINE alone"))
    add_version(p)
    return p


if __name__ == "__main__":
    sys.exit(main())
