"""The memory on the card: measured in a process of its own, near what a run takes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.measure import memory_use
from qsm_deploy.export.measure.memory_use import measure_memory
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.runtime.card.card import MemoryUse, ModelCard, ReceptiveField, Tiles
from qsm_deploy.runtime.sessions.session import Backend

SPEC = REGISTRY["ir2qsm"]


@pytest.fixture(scope="module")
def card(tiny_ir2qsm) -> ModelCard:
    return provisional_card(SPEC, tiny_ir2qsm, Choices(), "none", "0" * 64)


@pytest.fixture(scope="module")
def model(tiny_ir2qsm, card, tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    path.write_bytes(with_card(onnx_from_module(tiny_ir2qsm), card))
    return path


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_run_takes_at_least_its_activations(model: Path, backend: Backend) -> None:
    use = measure_memory(model, backend, ((16, 16, 16), (96, 96, 64)))
    # at least the output and one pair of two-channel features, at most all that was ever made
    assert 4 * 5 <= use.bytes_per_voxel < 4 * 100
    assert 0 <= use.fixed_bytes < 200e6


def test_the_line_goes_through_both_measurements(card, monkeypatch) -> None:
    taken = {(8, 8, 8): 1000 + 7 * 512, (8, 8, 16): 1000 + 7 * 1024}
    monkeypatch.setattr(memory_use, "load_card", lambda path: card)
    monkeypatch.setattr(memory_use, "_peak_in_new_process", lambda *given: taken[given[-1]])
    use = measure_memory(Path("m.onnx"), "openvino", ((8, 8, 8), (8, 8, 16)))
    assert use == MemoryUse(1000, 7)


def test_shapes_fit_the_divisor_and_a_tile_is_all_there_is(card, monkeypatch) -> None:
    seen = []

    def peak(path: Path, backend: Backend, shape: tuple[int, int, int]) -> int:
        seen.append(shape)
        return 10**6

    monkeypatch.setattr(memory_use, "_peak_in_new_process", peak)
    monkeypatch.setattr(memory_use, "load_card", lambda path: replace(card, divisor=24))
    measure_memory(Path("m.onnx"), "openvino")
    assert seen == [(48, 48, 48), (120, 96, 96)]
    tiles = Tiles((8, 16, 24), (8, 16, 24), (6, 12, 18), "zero", "mean")
    tiled = replace(card, tiles=tiles, patchable="no", why_whole="tiles")
    tiled = replace(tiled, receptive_field=ReceptiveField(None, None, 1.0))
    monkeypatch.setattr(memory_use, "load_card", lambda path: tiled)
    assert measure_memory(Path("m.onnx"), "openvino") == MemoryUse(10**6 - 8 * 16 * 24, 1)
    assert seen[2:] == [(8, 16, 24)]


def test_a_failed_measurement_says_why(card, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory_use, "load_card", lambda path: card)
    with pytest.raises(ExportError, match=r"openvino at \(8, 8, 8\) failed.*no such model file"):
        measure_memory(tmp_path / "none.onnx", "openvino", ((8, 8, 8), (8, 8, 16)))


def test_the_measuring_process_stays_lean(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from qsm_deploy.export.measure.memory_use import peak_bytes;"
        f"peak_bytes(Path({os.fspath(model)!r}), 'onnxruntime', (8, 8, 8));"
        "print([m for m in ('torch', 'onnx', 'openvino') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
