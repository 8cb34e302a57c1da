"""Time and accuracy of one IR2QSM inference: PyTorch eager, ONNX Runtime, OpenVINO, bf16.

    python benchmarks/bench_inference.py -o benchmarks/results/inference.json

Half width with the bundled weights, full width with random ones (the time does not depend on
them), at 96^3 and 160x192x160, all on the same cores in one run, taking turns. Then a whole
``qsm-run`` of the same volume with its peak memory.
"""

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
from common import parser, say, write
from numpy.typing import NDArray
from safetensors.torch import save_file

from qsm_deploy.calibration.phantom.measured_head import scan_from_phantom
from qsm_deploy.calibration.phantom.phantom import Phantom, head_phantom
from qsm_deploy.export.bench.rounds import INFERENCE, Contender, compare, spread
from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.measure.verification import ModuleSession
from qsm_deploy.export.networks.ir2qsm import IR2QSM, network_from_state
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.reconstruction.patches import plan_whole
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import Backend, Precision, Session

BUNDLED = Path(__file__).parents[1] / "export" / "weights" / "ir2qsm-demo.safetensors"
SHAPES = ((96, 96, 96), (160, 192, 160))
LARGEST_FLOAT64 = 10**6  # voxels


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


def contenders(model: Path, state_file: Path) -> list[Contender]:
    """Return eager PyTorch, first, and the model in every backend and precision."""
    card = load_card(model)

    def session(backend: Backend, precision: Precision) -> Callable[[], Session]:
        return lambda: open_session(model, backend, precision=precision)

    def eager() -> Session:
        return ModuleSession(load_network(state_file), card)

    libraries: tuple[tuple[str, Backend, Precision], ...] = (
        ("onnxruntime", "onnxruntime", "fp32"),
        ("openvino", "openvino", "fp32"),
        ("openvino bf16", "openvino", "bf16"),
    )
    return [
        Contender("torch eager", "torch", "fp32", "cpu", card, eager, model),
        *(
            Contender(name, backend, precision, "cpu", card, session(backend, precision), model)
            for name, backend, precision in libraries
        ),
    ]


def measure(model: Path, state_file: Path, head: Phantom, repeats: int) -> list[dict[str, Any]]:
    """Return a row per contender: median and spread of the time, errors in the mask.

    Errors are against eager and, at the smaller shape, against PyTorch in float64, from which
    eager FP32 differs too. At the larger one float64 would take half an hour.
    """
    found = contenders(model, state_file)
    card, mask = found[0].card, head.mask
    scan = scan_from_phantom(card, head)
    rows = compare(found, scan, plan_whole(mask.shape, card.divisor, card.pad_front), repeats)
    references = {"eager": rows[0].chi_ppm[mask].astype(np.float64)}
    if mask.size <= LARGEST_FLOAT64:
        network = load_network(state_file).double()
        with torch.inference_mode():
            double = network(torch.from_numpy(scan.measured[None]).double()).numpy()
        references["float64"] = double[0, 0][mask]
    base = statistics.median(rows[0].seconds[INFERENCE])
    return [
        {
            "backend": row.contender.name,
            **{f"{k}_seconds": v for k, v in spread(row.seconds[INFERENCE]).items()},
            "times_faster_than_eager": round(base / statistics.median(row.seconds[INFERENCE]), 2),
            **{
                key: value
                for name, reference in references.items()
                for key, value in errors(row.chi_ppm[mask], reference, name).items()
            },
        }
        for row in rows
    ]


def errors(chi: Volume, reference: NDArray[np.float64], name: str) -> dict[str, float]:
    """Return the errors of a map against a reference."""
    return {
        f"relative_error_to_{name}": relative(chi, reference),
        f"max_abs_error_to_{name}_ppb": 1000 * float(np.abs(chi - reference).max()),
    }


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
    args = parser(__doc__, repeats=3).parse_args()
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
                inference = measure(model, state_file, head, args.repeats)
                runs = [
                    whole_run(model, folder / "field.nii.gz", folder / "mask.nii.gz", b, folder)
                    for b in ("onnxruntime", "openvino")
                ]
                row = {"width": width, "shape": shape, "inference": inference, "qsm_run": runs}
                rows.append(say(row))
    write(args.output, rows, repeats=args.repeats)


if __name__ == "__main__":
    main()
