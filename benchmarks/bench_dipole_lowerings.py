"""The dipole operator as graphs hold it, in ONNX Runtime and OpenVINO, against fast transforms.

    python benchmarks/bench_dipole_lowerings.py -o benchmarks/results/dipole_lowerings.json

Each row is a process of its own: its peak is the rise from before the graph is opened, with the
input in place, to after the runs. Errors are against ``torch.fft`` in float64 with the multiplier
in float64. A row says how many cores other processes kept busy while it was timed; above a tenth or
so its times are worth little.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from common import parser, say, write
from numpy.typing import NDArray

from qsm_deploy.export.bench.machine import Others
from qsm_deploy.kernels.cuda_library import MultiplierName
from qsm_deploy.kernels.dipole import dipole_convolve, tikhonov, tkd
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.console.peak_memory import peak_rss_bytes, reset_peak, rss_bytes

THRESHOLD, LAM = 0.12, 0.01
GEOMETRIES = {
    "axial 1 mm": ((1.0, 1.0, 1.0), (0.0, 0.0, 1.0)),
    "oblique anisotropic": ((0.86, 0.86, 2.0), (0.3, -0.5, 0.8)),
}
SIZES = (64, 96, 128, 160, 192, 256, 257)
CONTENDERS = (
    *("matmul onnxruntime", "matmul openvino", "function onnxruntime"),
    *("torch.fft", "scipy"),
)
ALL_MULTIPLIERS_AT = 96
Array = NDArray[np.float32]


def write_graphs(folder: Path) -> None:
    """Write the operator with each multiplier in each lowering."""
    from torch import Tensor

    from qsm_deploy.export.dipole.op import dipole_conv
    from qsm_deploy.export.graph.dipole_lowering import lower_dipole
    from qsm_deploy.export.graph.onnx_export import onnx_from_module
    from qsm_deploy.export.networks.network import LOCAL_FIELD, VOXEL_SIZE, Network
    from qsm_deploy.runtime.card.card import TensorInfo

    class Operator(Network):
        inputs = (LOCAL_FIELD, VOXEL_SIZE, TensorInfo("b0_direction", "1", (3,)))
        divisor = 1

        def __init__(self, multiplier: MultiplierName) -> None:
            super().__init__()
            self.multiplier = multiplier

        def forward(self, x: Tensor, voxel_size_mm: Tensor, b0_direction: Tensor) -> Tensor:
            chosen = {"threshold": THRESHOLD, "lam": LAM}
            return dipole_conv(x, voxel_size_mm, b0_direction, self.multiplier, **chosen)

    for multiplier in get_args(MultiplierName):
        traced = onnx_from_module(Operator(multiplier).eval(), "plugin")
        for dipole_op in ("matmul", "function"):
            data = lower_dipole(traced, dipole_op).SerializeToString()
            (folder / f"{dipole_op} {multiplier}.onnx").write_bytes(data)


def operator(
    contender: str, multiplier: MultiplierName, geometry: Geometry, folder: Path
) -> Callable[[Array], Array]:
    """Return what maps a volume to the operator's output, opened."""
    vectors = [np.float32(geometry.voxel_size_mm), np.float32(geometry.b0_direction)]
    kind, *backend = contender.split()
    path = folder / f"{kind} {multiplier}.onnx"
    if kind == "scipy":
        functions: dict[str, Callable[[Array], Array]] = {
            "dipole": lambda x: dipole_convolve(x, geometry),
            "dipole_squared": lambda x: dipole_convolve(x, geometry, power=2),
            "tkd": lambda x: tkd(x, geometry, threshold=THRESHOLD),
            "tikhonov": lambda x: tikhonov(x, geometry, lam=LAM),
        }
        return functions[multiplier]
    if kind == "torch.fft":
        import torch

        from qsm_deploy.export.dipole.op import dipole_conv

        tensors = [torch.from_numpy(v) for v in vectors]
        return lambda x: dipole_conv(
            torch.from_numpy(x)[None, None], *tensors, multiplier, threshold=THRESHOLD, lam=LAM
        ).numpy()[0, 0]
    if backend == ["onnxruntime"]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.enable_mem_pattern = False
        session = onnxruntime.InferenceSession(path, options)
        names = [value.name for value in session.get_inputs()]
        return lambda x: session.run(
            None, dict(zip(names, [x[None, None], *vectors], strict=True))
        )[0][0, 0]
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    shapes = [[1, 1, *geometry.shape], [3], [3]]
    model.reshape(dict(zip([i.get_any_name() for i in model.inputs], shapes, strict=True)))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x[None, None], *vectors], share_inputs=True)[0][0, 0]


def write_reference(folder: Path, multiplier: MultiplierName, geometry: Geometry) -> None:
    """Write a volume and what the operator makes of it in float64."""
    import torch

    from qsm_deploy.export.dipole.op import dipole_conv

    x = np.random.default_rng(0).standard_normal(geometry.shape, dtype=np.float32)
    np.save(folder / "x.npy", x)
    # the geometry as float32 holds it, which is what every contender gets
    vectors = [torch.tensor(v) for v in (geometry.voxel_size_mm, geometry.b0_direction)]
    volume = torch.from_numpy(x.astype(np.float64))[None, None]
    y = dipole_conv(volume, *vectors, multiplier, threshold=THRESHOLD, lam=LAM)
    np.save(folder / "y.npy", y.numpy()[0, 0])


def measure(
    contender: str, multiplier: MultiplierName, geometry: Geometry, repeats: int, folder: Path
) -> dict[str, Any]:
    """Return times, peak memory and errors; to be called in a fresh process."""
    x = np.load(folder / "x.npy")
    importer = {"torch.fft": "torch", "scipy": "scipy.fft"}.get(contender, contender.split()[-1])
    __import__(importer)
    reset_peak()
    before = rss_bytes()
    run = operator(contender, multiplier, geometry, folder)
    y = run(x).copy()  # warm-up
    seconds = []
    others = Others()
    for _ in range(repeats):
        began = time.perf_counter()
        run(x)
        seconds.append(time.perf_counter() - began)
    busy = others.busy_cores()
    peak = peak_rss_bytes() - before
    expected = np.load(folder / "y.npy")
    difference = y - expected
    return {
        "contender": contender,
        "multiplier": multiplier,
        "median_seconds": round(statistics.median(seconds), 5),
        "min_seconds": round(min(seconds), 5),
        "max_seconds": round(max(seconds), 5),
        "repeats": repeats,
        "peak_mib": round(peak / 2**20),
        "relative_error_to_float64": float(np.linalg.norm(difference) / np.linalg.norm(expected)),
        "max_abs_error_to_float64": float(np.abs(difference).max()),
        "others_busy_cores": busy,
    }


def in_new_process(folder: Path, *what: object) -> dict[str, Any]:
    """Return the row of one contender."""
    command = [sys.executable, __file__, "--row", str(folder), *map(str, what)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return say(row)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each size, geometry, multiplier and contender."""
    rows = []
    for size in SIZES:
        repeats = max(3, min(15, 2 * 10**7 // size**3))
        for name in GEOMETRIES:
            every = size == ALL_MULTIPLIERS_AT and name != "axial 1 mm"
            for multiplier in get_args(MultiplierName) if every else ("dipole",):
                write_reference(folder, multiplier, Geometry((size,) * 3, *GEOMETRIES[name]))
                for contender in CONTENDERS:
                    row = in_new_process(folder, contender, multiplier, name, size, repeats)
                    rows.append({"size": size, "geometry": name, **row})
    return rows


def main() -> None:
    """Measure, print and write."""
    p = parser(__doc__)
    p.add_argument("--row", nargs=6, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.row:
        folder, contender, multiplier, name, size, repeats = args.row
        geometry = Geometry((int(size),) * 3, *GEOMETRIES[name])
        say(measure(contender, multiplier, geometry, int(repeats), Path(folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_graphs(Path(name))
        rows = rows_of(Path(name))
    write(args.output, rows)


if __name__ == "__main__":
    main()
