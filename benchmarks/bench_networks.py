"""Time, memory and parity of the published networks at 96^3, each as ``qsm-run`` runs it.

    python -m benchmarks.bench_networks -o benchmarks/results/networks.json

Published size, random weights (neither depends on them), a head phantom of 1 mm. For each network
PyTorch eager first, then the file in every backend, on the same cores, taking turns; a whole run
of ``qsm-run`` for its peak memory. Both parts of NeXtQSM are one row, as they run.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import parser, say, write
from qsm_deploy.calibration.phantom.phantom import Phantom, head_phantom
from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.measure.memory_use import measure_memory
from qsm_deploy.export.measure.verification import ModuleSession
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.card.card import MemoryUse, ModelCard
from qsm_deploy.runtime.model import Model, open_model
from qsm_deploy.runtime.reconstruction.network import CpuNetwork
from qsm_deploy.runtime.reconstructor import Reconstructor
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from qsm_deploy.runtime.sessions.open import installed_backends
from tests.export.table import NETWORKS

SIDE = 96
NAMES = ("iqfm", "bfrnet", "nextqsm", "chi-sepnet", "susep-net", "qsmgan", "autoqsm", "xqsm")
ECHO_TIME_S, FIELD_STRENGTH_T = 0.02, 3.0
REPEATS = 2
Row = dict[str, Any]


def networks_of(name: str) -> list[tuple[Network, ModelCard]]:
    """Return the modules of a network at its published size, with cards."""
    found = []
    for make in NETWORKS[name].graphs:
        torch.manual_seed(0)
        network = make().eval()
        card = provisional_card(REGISTRY[name], network, Choices(), "none", "0" * 64)
        found.append((network, replace(card, memory={"pytorch": MemoryUse(0, 1)})))
    return found


def written(networks: list[tuple[Network, ModelCard]], folder: Path) -> list[Path]:
    """Return the files of modules, with the memory of each backend in their cards."""
    paths = []
    for n, (network, card) in enumerate(networks):
        path, graph = folder / f"part{n}.onnx", onnx_from_module(network)
        path.write_bytes(with_card(graph, card))
        memory = {backend: measure_memory(path, backend) for backend in installed_backends()}
        path.write_bytes(with_card(graph, replace(card, memory=memory)))
        paths.append(path)
    return paths


def volumes_of(head: Phantom, folder: Path) -> dict[str, Path]:
    """Return the files that networks take, by name."""
    rng = np.random.default_rng(0)
    phase = np.angle(np.exp(1j * (50 * head.local_field_ppm))).astype(np.float32)
    values = {
        "field": head.local_field_ppm,
        "phase": phase + 1e-4 * rng.random(phase.shape, dtype=np.float32),
        "chi": head.chi_ppm,
        "r2prime": 100 * np.abs(head.chi_ppm),
        "mask": head.mask.astype(np.uint8),
    }
    for name, volume in values.items():
        data = nifti_bytes(volume, np.eye(4), compress=False)
        (folder / f"{name}.nii").write_bytes(data)
    return {name: folder / f"{name}.nii" for name in values}


def options_of(card: ModelCard, files: dict[str, Path]) -> dict[str, Any]:
    """Return what is passed besides the field, by the names of flags."""
    options: dict[str, Any] = {"mask": files["mask"]}
    if card.inputs[0].name == "phase_rad":
        options |= {"echo_time": ECHO_TIME_S, "field_strength": FIELD_STRENGTH_T}
    taken = {tensor.name for tensor in card.inputs}
    besides = {"chi_ppm": "chi", "r2prime_hz": "r2prime"}
    return options | {flag: files[flag] for name, flag in besides.items() if name in taken}


def timed(run: Callable[[], dict[str, Volume]]) -> tuple[float, dict[str, Volume]]:
    """Return seconds and maps."""
    start = time.perf_counter()
    maps = run()
    return time.perf_counter() - start, maps


def _maps(model: Model, field: Path, options: dict[str, Any]) -> dict[str, Volume]:
    return model.run(field, **options).maps


def row_of(name: str, files: dict[str, Path], folder: Path) -> Row:
    """Return what is measured of one network."""
    networks = networks_of(name)
    paths = written(networks, folder)
    first = networks[0][1]
    field = files["phase" if first.inputs[0].name == "phase_rad" else "field"]
    options = options_of(first, files)
    chain: Reconstructor | None = None
    for (network, card), path in zip(networks, paths, strict=True):
        chain = Reconstructor(CpuNetwork(ModuleSession(network, card), path), before=chain)
    assert chain is not None
    contenders = {"pytorch": Model(chain, ())}
    contenders |= {b: open_model(paths, backend=b) for b in installed_backends()}
    seconds: dict[str, list[float]] = {backend: [] for backend in contenders}
    maps: dict[str, dict[str, Volume]] = {}
    for _ in range(REPEATS):
        for backend, model in contenders.items():
            taken, maps[backend] = timed(partial(_maps, model, field, options))
            seconds[backend].append(taken)
    exact = maps.pop("pytorch")
    report = folder / "report.json"
    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in options.items()]
    command = [sys.executable, "-m", "qsm_deploy.runtime.cli", *map(str, paths), str(field), *flags]
    command += ["-q", "--force", "-o", str(folder / "map.nii"), "--report", str(report)]
    subprocess.run(command, check=True)
    said = json.loads(report.read_text())
    return {
        "network": name,
        "task": " ".join(card.task for _, card in networks),
        "parameters": REGISTRY[name].parameters,
        "seconds": {backend: min(times) for backend, times in seconds.items()},
        "max_ppb_of_pytorch": {
            backend: max(1e3 * float(np.abs(made[key] - exact[key]).max()) for key in exact)
            for backend, made in maps.items()
        },
        "largest_ppb": max(1e3 * float(np.abs(volume).max()) for volume in exact.values()),
        "runs": said["plan"]["patches"],
        "peak_mb": said["memory"]["peak_above_baseline_bytes"] / 1e6,
        "predicted_mb": said["memory"]["predicted_peak_bytes"] / 1e6,
        "backend_of_memory": said["backend"]["name"],
    }


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__).parse_args()
    head = head_phantom(Geometry((SIDE,) * 3), seed=7)
    rows = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            row = row_of(name, volumes_of(head, Path(folder)), Path(folder))
        rows.append(say(row))
    write(arguments.output, rows, side=SIDE)


if __name__ == "__main__":
    main()
