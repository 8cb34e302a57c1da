"""Time and accuracy of one IR2QSM inference: PyTorch eager, ONNX Runtime, OpenVINO, bf16.

    python benchmarks/bench_inference.py -o benchmarks/results/inference.json

Half width with the bundled weights, full width with random ones (the time does not depend on
them), at 96^3 and 160x192x160, all on the same cores in one run, taking turns. Then a whole
``qsm-run`` of the same volume with its peak memory.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from qsm_deploy.calibration.phantom import head_phantom
from qsm_deploy.export.checkpoints import load_state
from qsm_deploy.export.machine import machine
from qsm_deploy.export.networks.ir2qsm import IR2QSM, network_from_state
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.nifti import nifti_bytes
from qsm_deploy.runtime.session import open_session

BUNDLED = Path(__file__).parents[1] / "export" / "weights" / "ir2qsm-demo.safetensors"
SHAPES = ((96, 96, 96), (160, 192, 160))
LARGEST_FLOAT64 = 10**6  # voxels
Volume = NDArray[np.float32]


def weights(folder: Path) -> dict[str, Path]:
    """Return the weights of both widths; random ones, of a sensible size, for the full width."""
    torch.manual_seed(0)
    full = IR2QSM(channels=(16, 32, 64, 128))
    path = folder / "full.safetensors"
    save_file({k: v.contiguous() for k, v in full.state_dict().items()}, path)
    return {"half": BUNDLED, "full": path}


def load_network(state_file: Path) -> IR2QSM:
    """Return the PyTorch network, ready for inference."""
    return network_from_state(load_state(state_file), Choices({"residual": "input"}))


def contenders(model: Path, state_file: Path) -> dict[str, Callable[[Volume], Volume]]:
    """Return what maps a (1, 1, x, y, z) field to chi, by name."""
    network = load_network(state_file)

    def eager(field: Volume) -> Volume:
        with torch.inference_mode():
            output: Volume = network(torch.from_numpy(field)).numpy()
        return output

    sessions = {
        "onnxruntime": open_session(model, "onnxruntime"),
        "openvino": open_session(model, "openvino"),
        "openvino bf16": open_session(model, "openvino", precision="bf16"),
    }
    runs = {
        name: lambda field, s=session: s.run({"local_field_ppm": field})
        for name, session in sessions.items()
    }
    return {"torch eager": eager, **runs}


def measure(model: Path, state_file: Path, field: Volume, repeats: int) -> list[dict[str, Any]]:
    """Return a row per contender: median and spread of the time, errors.

    Errors are against eager and, at the smaller shape, against PyTorch in float64, from which
    eager FP32 differs too. At the larger one float64 would take half an hour.
    """
    runs = contenders(model, state_file)
    outputs = {name: run(field) for name, run in runs.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run(field)
            seconds[name].append(time.perf_counter() - began)
    doubles = {}
    if field.size <= LARGEST_FLOAT64:
        network = load_network(state_file).double()
        with torch.inference_mode():
            double = network(torch.from_numpy(field).double()).numpy()
        doubles = {
            name: {
                "relative_error_to_float64": relative(output, double),
                "max_abs_error_to_float64_ppb": 1000 * float(np.abs(output - double).max()),
            }
            for name, output in outputs.items()
        }
    eager = outputs["torch eager"].astype(np.float64)
    base = statistics.median(seconds["torch eager"])
    return [
        {
            "backend": name,
            "median_seconds": round(statistics.median(seconds[name]), 3),
            "min_seconds": round(min(seconds[name]), 3),
            "max_seconds": round(max(seconds[name]), 3),
            "times_faster_than_eager": round(base / statistics.median(seconds[name]), 2),
            "relative_error_to_eager": relative(outputs[name], eager),
            "max_abs_error_to_eager_ppb": 1000 * float(np.abs(outputs[name] - eager).max()),
            **doubles.get(name, {}),
        }
        for name in runs
    ]


def relative(output: NDArray[np.floating], reference: NDArray[np.float64]) -> float:
    """Return the norm of the difference relative to the reference's."""
    return float(np.linalg.norm(output - reference) / np.linalg.norm(reference))


def whole_run(model: Path, field: Path, mask: Path, backend: str, folder: Path) -> dict[str, Any]:
    """Return total time and peak memory of one qsm-run."""
    command = ["qsm-run", model, field, "-m", mask, "-o", folder / "chi.nii.gz", "--force"]
    command += ["--report", folder / "run.json", "--backend", backend, "--quiet"]
    began = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    elapsed = time.perf_counter() - began
    report = json.loads((folder / "run.json").read_text())
    return {
        "backend": backend,
        "process_seconds": round(elapsed, 2),
        "stage_seconds": report["seconds"],
        "peak_gib": round(report["memory"]["peak_above_baseline_bytes"] / 2**30, 3),
        "predicted_gib": round(report["memory"]["predicted_peak_bytes"] / 2**30, 3),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="after one to warm up")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for width, state_file in weights(folder).items():
            model = folder / f"{width}.onnx"
            export = ["qsm-export", "--model", "ir2qsm", "--weights", state_file, "-o", model]
            subprocess.run([*map(str, export), "--gate-ppb", "1", "--quiet"], check=True)
            for shape in SHAPES:
                head = head_phantom(Geometry(shape), seed=77)
                for stem, volume in (("field", head.local_field_ppm), ("mask", head.mask * 1)):
                    path = folder / f"{stem}.nii.gz"
                    path.write_bytes(nifti_bytes(volume.astype(np.float32), np.eye(4)))
                field = head.local_field_ppm[None, None]
                inference = measure(model, state_file, field, args.repeats)
                runs = [
                    whole_run(model, folder / "field.nii.gz", folder / "mask.nii.gz", b, folder)
                    for b in ("onnxruntime", "openvino")
                ]
                rows.append(
                    {"width": width, "shape": shape, "inference": inference, "qsm_run": runs}
                )
                print(json.dumps(rows[-1]), flush=True)
    if args.output:
        result = {"machine": machine(), "repeats": args.repeats, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
