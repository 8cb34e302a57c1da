"""What patches cost: time, memory, and the patched map against the whole-volume one, by qsm-run.

python benchmarks/bench_patches.py MODEL.onnx ... -o benchmarks/results/patches.json
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from bench_memory import PLAIN_STAGES, write_head
from common import parser, say, write

from qsm_deploy.kernels.geometry import Mask, Volume
from qsm_deploy.runtime.metrics.metrics import nrmse

SEED = 801
MODES: tuple[list[str], ...] = (
    ["--patch", "off"],
    ["--patch", "96"],
    ["--patch", "64"],
    ["--patch", "128"],
    ["--patch", "96", "--overlap", "32"],
    ["--patch", "64", "--overlap", "32"],
)


def main() -> None:
    """Measure, print and write."""
    p = parser(__doc__)
    p.add_argument("models", type=Path, nargs="+")
    p.add_argument("--shape", type=int, nargs=3, default=(160, 192, 160))
    args = p.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_head(folder, tuple(args.shape), SEED)
        mask, truth = loaded(folder / "mask.nii.gz") > 0, loaded(folder / "truth.nii.gz")
        for model in args.models:
            for flags in MODES:
                report = run(model, folder, flags)
                chi = loaded(folder / "map.nii.gz")
                if flags == MODES[0]:
                    whole = chi
                errors = difference(chi, whole, mask)
                errors["nrmse_to_truth_percent"] = round(nrmse(chi, truth, mask), 2)
                rows.append(say(row_of(report) | errors))
                write(args.output, rows, shape=args.shape, seed=SEED, backend="openvino")


def run(model: Path, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Make a map and return the report."""
    command = ["qsm-run", model, folder / "field.nii.gz", "-m", folder / "mask.nii.gz", *flags]
    command += ["-o", folder / "map.nii.gz", "--force", "--json", "--backend", "openvino"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def row_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of patches, time, and memory of making and writing the map."""
    plan = report["plan"]
    return {
        "network": report["model"]["network"],
        "weights_sha256": report["model"]["weights_sha256"][:8],
        **{key: plan[key] for key in ("patch_shape", "overlap", "blend", "patches", "exact")},
        "seconds": {stage: round(took, 2) for stage, took in report["seconds"].items()},
        "predicted_mb": megabytes(plan["predicted_stage_bytes"]),
        "measured_mb": megabytes(report["memory"]["stage_peak_bytes"]),
    }


def megabytes(stage_bytes: dict[str, float]) -> int:
    """Return the most that a stage takes."""
    return round(max(stage_bytes[stage] for stage in PLAIN_STAGES if stage in stage_bytes) / 1e6)


def difference(chi: Volume, whole: Volume, mask: Mask) -> dict[str, float]:
    """Return how far a map is from that of the whole volume."""
    off_ppb = 1000 * np.abs(chi - whole)[mask]
    found = {
        "median_ppb": np.median(off_ppb),
        "p999_ppb": np.quantile(off_ppb, 0.999),
        "max_ppb": off_ppb.max(),
        "nrmse_to_whole_percent": nrmse(chi, whole, mask),
    }
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def loaded(path: Path) -> Volume:
    """Return the volume of a file."""
    image = nib.nifti1.load(path)
    return np.asarray(image.dataobj, dtype=np.float32)


if __name__ == "__main__":
    main()
