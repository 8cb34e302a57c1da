"""The whole path in one go: a head, an export, five reconstructions, and how good they are.

    python examples/demo.py demo

Runs the commands a user would type, then sets their reports side by side: two methods without a
network, two networks, one of them with data consistency too, and a plan of the other where a
flavour of TensorRT is there to build it.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from qsm_deploy.runtime.gpu.engines.tensorrt_library import installed_engines
from qsm_deploy.runtime.job.report import METRIC_TEXT


def run(program: str, *arguments: object) -> None:
    """Show a command and run it, with the programs of this environment first."""
    command = [program, *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})


def report_scores(report: Path) -> dict[str, float]:
    """Return the metrics, times and memory in a report of qsm-run."""
    content = json.loads(report.read_text())
    seconds = content["seconds"]
    return {
        "field_residual": content["field_residual"],
        **content["metrics"],
        "map_seconds": seconds.get("inference", seconds.get("inversion")),
        "total_seconds": content["total_seconds"],
        "peak_gib": content["memory"]["peak_above_baseline_bytes"] / 2**30,
    }


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """Print the scores, a method per column."""
    names = METRIC_TEXT | {
        "field_residual": "relative field residual",
        "map_seconds": "inversion or inference [s]",
        "total_seconds": "whole run [s]",
        "peak_gib": "peak memory [GiB]",
    }
    rows = list(dict.fromkeys(key for scores in columns.values() for key in scores))
    print(f"\n{'':<40}" + "".join(f"{name:>22}" for name in columns))
    for row in rows:
        cells = [f"{scores[row]:.4g}" if row in scores else "-" for scores in columns.values()]
        print(f"{names.get(row, row):<40}" + "".join(f"{cell:>22}" for cell in cells))


def main() -> None:
    """Make everything in one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, default=(160, 192, 160))
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    head, model = folder / "head", folder / "ir2qsm.onnx"
    field, mask, chi, labels = (
        head / f"{name}.nii.gz" for name in ("field", "mask", "chi", "labels")
    )
    inputs = (field, "-m", mask, "--truth", chi, "--labels", labels)
    makers = {
        "TKD": ("--method", "tkd"),
        "TV (default)": ("--method", "tv"),
        "tv-unet (bundled)": ("--method", "tv-unet"),
        "ir2qsm (demo)": (model,),
        "consistent ir2qsm": (model, "--data-consistency", "auto"),
    }

    run("qsm-phantom", head, "--shape", *args.shape, "--seed", 1, "--force")
    run("qsm-export", "--model", "ir2qsm", "-o", model, "--force")
    if installed_engines():  # a plan runs here too, on the CPU where there is no GPU
        plan = folder / "tv-unet-fp16.plan"
        run("qsm-export", "--model", "tv-unet", "--fp16", "-o", plan, "--force")
        makers["plan (tv-unet, fp16)"] = (plan,)
    columns = {}
    for title, maker in makers.items():
        name = title.split()[0].lower()
        output, figure, report = (
            folder / f"{name}_chi.{end}" for end in ("nii.gz", "png", "report.json")
        )
        outputs = ("-o", output, "--figure", figure, "--report", report, "--force")
        run("qsm-run", *maker, *inputs, *outputs)
        columns[title] = report_scores(report)
    print_table(columns)
    print("\nwritten:")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        print(f"  {path}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
