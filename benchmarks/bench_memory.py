"""Predicted against measured peak memory of qsm-run, each run in a process of its own.

    python benchmarks/bench_memory.py MODEL.onnx ... -o benchmarks/results/memory.json

At shapes that no prediction was fitted to, both backends, whole and patched. A ``plain`` run
only reconstructs and writes; the ``full`` one also reports, compares with a truth and draws.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import parser, say, write

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.nifti import nifti_bytes

SHAPES = ((48, 48, 48), (96, 112, 96), (112, 128, 104), (150, 176, 131), (176, 208, 160))
MODES = {
    "whole": ["--patch", "off"],
    "patch 64": ["--patch", "64"],
    "patch 96": ["--patch", "96", "--overlap", "16"],
}
PLAIN_STAGES = ("load", "prepare", "inference", "anchor", "write")


def write_head(folder: Path, shape: tuple[int, int, int], seed: int = 9) -> None:
    """Write field, mask, truth and labels of a head."""
    head = head_phantom(Geometry(shape), seed=seed)
    volumes = {"field": head.local_field_ppm, "mask": head.mask.astype(np.uint8)}
    volumes |= {"truth": head.chi_ppm, "labels": head.labels}
    for name, volume in volumes.items():
        (folder / f"{name}.nii.gz").write_bytes(nifti_bytes(volume, np.eye(4)))


def run(model: Path, folder: Path, backend: str, flags: list[str]) -> dict[str, Any]:
    """Run once with everything on and return the report."""
    paths = {n: folder / f"{n}.nii.gz" for n in ("field", "mask", "truth", "labels")}
    command = ["qsm-run", model, paths["field"], "-m", paths["mask"], "--force", "--json"]
    command += ["--truth", paths["truth"], "--labels", paths["labels"]]
    command += ["-o", folder / "chi.nii.gz", "--figure", folder / "chi.png"]
    command += ["--backend", backend, *flags]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def comparison(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return predicted and measured peaks [MB] of the plain and the full run."""
    predicted = report["plan"]["predicted_stage_bytes"]
    measured = report["memory"]["stage_peak_bytes"]
    row: dict[str, Any] = {}
    for kind, stages in (("plain", PLAIN_STAGES), ("full", tuple(predicted))):
        expected = max(predicted[stage] for stage in stages if stage in predicted)
        seen = max(measured[stage] for stage in stages if stage in measured)
        row[f"{kind}_predicted_mb"] = round(expected / 1e6)
        row[f"{kind}_measured_mb"] = round(seen / 1e6)
        row[f"{kind}_ratio"] = round(expected / seen, 3)
    row["stages_mb"] = {s: (round(predicted[s] / 1e6), round(measured[s] / 1e6)) for s in predicted}
    return row


def main() -> None:
    """Measure, print and write."""
    p = parser(__doc__)
    p.add_argument("models", type=Path, nargs="+")
    args = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in SHAPES:
            write_head(folder, shape)
            for model in args.models:
                for backend in ("onnxruntime", "openvino"):
                    for mode, flags in MODES.items():
                        report = run(model, folder, backend, flags)
                        row = {"model": model.stem, "shape": shape, "backend": backend}
                        rows.append(say({**row, "mode": mode, **comparison(report)}))
    off = max(abs(row[f"{kind}_ratio"] - 1) for row in rows for kind in ("plain", "full"))
    print(f"largest deviation {100 * off:.0f} %")
    write(args.output, rows, largest_deviation=round(off, 3))


if __name__ == "__main__":
    main()
