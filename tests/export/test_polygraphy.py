"""Polygraphy runs every exported network in ONNX Runtime, on what the example draws for it."""

import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper
from polygraphy import mod, tools

from qsm_deploy.calibration.int8.layers import int8_layers
from qsm_deploy.calibration.int8.qdq import Quantiser
from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.export.graph.precision_policy import reducible_nodes
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.measure import verification
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.runtime.card.card import ModelCard
from tests.export.table import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:SelectableGroups:DeprecationWarning:polygraphy")

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "runtime" / "models" / "tv-unet.onnx"
SCRIPT = str(ROOT / "examples" / "polygraphy" / "data_loader.py")
LOADER = ("--data-loader-script", SCRIPT)
UNOPTIMISED = ("--graph-optimization-level", "ORT_DISABLE_ALL")
SHAPES = ((19, 24, 17), (16, 32, 24))
# prior maps; a phase with numbers; a prior
QUICK = ("tv-unet", "iqsm v1", "modl-qsm split")

Polygraphy = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "SHAPES", SHAPES)
    monkeypatch.delenv("QSM_MODEL", raising=False)


@pytest.fixture
def polygraphy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Polygraphy:
    """Return what runs a command of Polygraphy: its exit code, and what it said."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["polygraphy", *map(str, words)])
        code = tools.main()
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def card_of(small) -> Callable[[str], ModelCard]:
    def card_of(case: str) -> ModelCard:
        return provisional_card(REGISTRY[case.split()[0]], small(case), Choices(), "none", "0" * 64)

    return card_of


def describes(inspected: tuple[int, str], card: ModelCard) -> bool:
    code, said = inspected
    tensors = (*card.inputs, card.output)
    return code == 0 and all(f"{t.name} [dtype=float32, shape=" in said for t in tensors)


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in SMALL]
)
def test_every_network_runs_with_and_without_optimisation(
    case: str, polygraphy: Polygraphy, card_of, traced, tmp_path: Path
) -> None:
    card, path, stored = card_of(case), tmp_path / "network.onnx", tmp_path / "outputs.json"
    path.write_bytes(with_card(traced(case), card))
    assert describes(polygraphy("inspect", "model", path), card)
    run = ("run", path, "--onnxrt", *LOADER, "--validate")
    code, said = polygraphy(*run, "--save-outputs", stored)
    assert code == 0, said
    code, said = polygraphy(*run, *UNOPTIMISED, "--load-outputs", stored, "--atol", 1e-4)
    assert code == 0, said
    assert "Passed: 2/2 iterations" in said


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_take_float32_too(
    precision: str, polygraphy: Polygraphy, card_of, traced, tmp_path: Path
) -> None:
    graph, card, path = traced("tv-unet"), card_of("tv-unet"), tmp_path / "network.onnx"
    reduced = with_precision(graph, "fp16")
    if precision == "int8":
        layers = int8_layers(graph.graph, reducible_nodes(graph.graph))
        ranges = {layer.activation: 1.0 for layer in layers}
        reduced = Quantiser.from_model(graph, layers, ranges).quantised(reduced, layers)
    path.write_bytes(with_card(reduced, card))
    assert describes(polygraphy("inspect", "model", path), card)
    code, said = polygraphy("run", path, "--onnxrt", *LOADER, "--validate")
    assert code == 0, said


def test_a_network_that_is_not_the_same_is_told_apart(
    polygraphy: Polygraphy, tmp_path: Path
) -> None:
    stored, other = tmp_path / "outputs.json", tmp_path / "other.onnx"
    assert polygraphy("run", BUNDLED, "--onnxrt", *LOADER, "--save-outputs", stored)[0] == 0
    against = ("--load-outputs", stored, "--atol", 1e-6, "--rtol", 0)
    code, said = polygraphy("run", BUNDLED, "--onnxrt", *UNOPTIMISED, *LOADER, *against)
    assert code == 0, said
    model = onnx.load(BUNDLED)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.dims))
    weights.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(weights), weights.name))
    onnx.save(model, other)
    code, said = polygraphy("run", other, "--onnxrt", *LOADER, *against)
    assert code == 1
    assert "FAILED | Output: 'chi_ppm'" in said


def test_a_bare_engine_has_its_model_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load_data = mod.import_from_script(SCRIPT, "load_data")
    monkeypatch.setattr(sys, "argv", ["polygraphy", "run", "tv-unet.engine", "--trt", *LOADER])
    with pytest.raises(SystemExit, match=r"no \.onnx or \.plan .* set QSM_MODEL"):
        next(load_data())
    monkeypatch.setenv("QSM_MODEL", str(BUNDLED))
    first, second = load_data()
    assert list(first) == list(second) == list(REGISTRY["tv-unet"].inputs)
    assert first["local_field_ppm"].shape == (1, 1, 20, 24, 20)  # rounded up to multiples of 4
