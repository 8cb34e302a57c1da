"""``qsm-check``: an engine beside its reference, in ppb, and whether that is within budget."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsm_deploy.calibration.budgets import DEFAULTS, METRICS, parse_budget
from qsm_deploy.kernels.errors import AccuracyError
from qsm_deploy.runtime.console.command import Parser, add_version, needs_extra, run_command
from qsm_deploy.runtime.job.arguments import (
    FIELD,
    add_device,
    add_physics,
    memory_size,
    patch_size,
    thread_count,
)
from qsm_deploy.runtime.sessions.session import CHOICES

NAME = "qsm-check"
# what is passed on as it is
CHECKED = (
    *("reference", "normalisation", "budget", "shapes", "patch"),
    *("backend", "device", "plan_cache", "threads", "html", "force"),
)
EPILOG = """\
examples:
  qsm-check tv-unet-fp16.onnx
  qsm-check ir2qsm.onnx --reference model_IR2Unet.pth field.nii.gz -m mask.nii.gz --html check.html
  qsm-check tv-unet-bf16.onnx --reference tv-unet.onnx phantom --budget max_ppb=20 --json

metrics for --budget METRIC=VALUE, larger is worse:
{metrics}

defaults:
{defaults}

exit codes: 0 within budget, 2 usage, 3 data or geometry, 4 model or device, 5 a budget is exceeded,
6 memory, 7 weights, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parser().parse_intermixed_args(argv)
    failed: list[AccuracyError] = []

    def check() -> str:
        with needs_extra("export", NAME):
            from qsm_deploy.export.check.job import PHANTOM, Subject, run_check
            from qsm_deploy.export.check.text import error_text, result_text
            from qsm_deploy.runtime.console.terminal import TerminalLog
            from qsm_deploy.runtime.job.request import reading_from
            from qsm_deploy.runtime.reconstruction.inversion import Wants
            from qsm_deploy.runtime.scan.scan import ScanFiles

            named = tuple(Path(name) for name in arguments.fields if name != PHANTOM)
            files = ScanFiles(named, arguments.mask, arguments.truth, arguments.labels)
            wants = Wants(
                allow_geometry=arguments.allow_geometry,
                memory_limit=arguments.memory_limit,
            )
            reading = reading_from(**_named(arguments, ("params", *FIELD)))
            checked = run_check(
                arguments.engine,
                Subject(files, reading, wants, draws=PHANTOM in arguments.fields or not named),
                TerminalLog(quiet=arguments.quiet),
                **_named(arguments, CHECKED),
            )
        if checked.failures:
            failed.append(AccuracyError(error_text(checked.failures)))
        return json.dumps(checked.document) if arguments.json else result_text(checked.document)

    def judge() -> str:
        raise failed[0]

    code = run_command(NAME, check)
    # what was found goes to stdout even where it is too much
    return run_command(NAME, judge) if failed and code == 0 else code


def _named(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    width = max(map(len, METRICS))
    p = Parser(
        prog=NAME,
        usage=f"{NAME} ENGINE [FIELD ...] [--reference REF] [options]",
        description="Compare an engine with the PyTorch network that it was made of, or with "
        "another\nengine of it, and fail if they differ by more than a budget.",
        epilog=EPILOG.format(
            metrics="\n".join(f"  {name:<{width}}  {text}" for name, text in METRICS.items()),
            defaults="\n".join(
                f"  {precision:<6} " + ", ".join(f"{m}={v:g}" for m, v in budgets.items())
                for precision, budgets in DEFAULTS.items()
            ),
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    # fmt: off
    add("engine", type=Path, metavar="ENGINE", help="an .onnx file or a .plan of qsm-export")
    add("fields", nargs="*", default=[], metavar="FIELD",
        help="phantom: drawn heads with labels, truth and a calcification (the default), or a "
        "field (.nii or .nii.gz; for some networks one for each orientation, or a phase), or both")
    add("--reference", action="append", default=[], metavar="REF",
        help="pytorch: the bundled weights (the default where there are some); weights, repeated "
        "for a network in several files; or an .onnx file or a .plan")
    add("--normalisation", action="append", type=Path, default=[], metavar="FILE",
        help="the authors' file of means, deviations and settings, as for qsm-export; repeat it")
    add("-m", "--mask", type=Path, help="of FIELD, non-zero inside the brain")
    add("--truth", type=Path, help="true susceptibility [ppm] of FIELD")
    add("--labels", type=Path, help="regions of FIELD, numbered as in the 2019 challenge")
    add("--budget", action="append", type=_budget, default=[], metavar="METRIC=VALUE",
        help="what a metric may be, in place of its default or besides; repeat it")
    # fmt: on
    add_physics(p.add_argument_group("the field"))
    _add_runs(p.add_argument_group("what is run"))
    _add_outputs(p.add_argument_group("outputs"))
    add_version(p)
    return p


def _add_runs(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    # fmt: off
    add("--shapes", metavar="MIN,OPT,MAX",
        help="of the heads, of boxes of FIELD (MIN) and patches (OPT), each as 64 or 64x96x80; "
        "default what a plan was built for, else 32,64,96x112x96")
    add("--patch", type=patch_size, default="auto", metavar="auto|off|N",
        help="auto: the whole volume and patches of OPT; off: the whole volume; N: patches of N")
    add("--memory-limit", type=memory_size, metavar="SIZE",
        help="such as 6G; default four fifths of what is free")
    add("--backend", choices=(*CHOICES, "pytorch"), default="auto",
        help="one way to run the engine; auto: all that tell its precision's accuracy (default)")
    add_device(group)
    add("--threads", type=thread_count, default=0, help="CPU threads, default all cores")
    # fmt: on


def _add_outputs(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    # fmt: off
    add("--html", type=Path, metavar="FILE", help="a report on one page, for any browser")
    add("--json", action="store_true", help="everything as one JSON object on stdout")
    add("--force", action="store_true", help="overwrite an existing report")
    add("-q", "--quiet", action="store_true", help="no progress on stderr")
    # fmt: on


def _budget(text: str) -> tuple[str, float]:
    try:
        return parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
