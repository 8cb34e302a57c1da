"""``qsm-export --dipole-op``: the files of an unrolled network, and what their cards say."""

from pathlib import Path
from typing import get_args

import onnx
import pytest
import torch

from qsm_deploy.export.cli import main
from qsm_deploy.export.graph.dipole_lowering import DEFAULT, DipoleOp
from qsm_deploy.export.measure import verification
from qsm_deploy.export.networks.lpcnn import LPCNN
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.networks.wide_resnet import wide_resnet
from qsm_deploy.runtime.card.card import METADATA_KEY, parse_card

RAN = {
    "matmul": ["onnxruntime", "openvino"],
    "function": ["onnxruntime"],
    "plugin": [],
}


@pytest.fixture(scope="module")
def weights(formula_state, tmp_path_factory) -> Path:
    network = LPCNN(wide_resnet(1, width=2, blocks=1))
    path: Path = tmp_path_factory.mktemp("weights") / "tiny.pkl"
    torch.save(formula_state(network.state_dict()), path)
    return path


def export(weights: Path, output: Path, *arguments: str) -> int:
    return main(["--model", "lpcnn", "--weights", str(weights), "-o", str(output), *arguments])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dipole_op", RAN)
def test_the_card_tells_how_it_was_written_and_where_it_ran(
    dipole_op: str, weights: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(verification, "SHAPES", ((24, 20, 17),))
    assert export(weights, tmp_path / "a.onnx", "--dipole-op", dipole_op) == 0
    out, err = capsys.readouterr()
    card = parse_card((tmp_path / "a.json").read_text())
    assert card.options == {"form": "unrolled", "orientations": "1", "dipole_op": dipole_op}
    assert sorted(card.memory) == RAN[dipole_op]
    nowhere = dipole_op == "plugin"
    instead = "in the matmul lowering; the file itself was not run"
    assert (instead in card.verified.reference) == nowhere
    assert (instead in err) == nowhere
    assert ("the file itself was not run" in out) == nowhere
    refusing = [b for b in RAN["matmul"] if b not in RAN[dipole_op]]
    assert all(backend in card.verified.reference for backend in RAN[dipole_op])
    assert (f"cannot run a file with --dipole-op {dipole_op}" in err) == bool(refusing)
    model = onnx.load(tmp_path / "a.onnx")
    used = {node.op_type for node in model.graph.node}
    assert ("DipoleConv" in used) == (dipole_op in ("function", "plugin"))
    assert "DFT" not in used
    assert bool(model.functions) == (dipole_op == "function")
    stored = {p.key: p.value for p in model.metadata_props}[METADATA_KEY]
    assert parse_card(stored) == card


@pytest.mark.parametrize("network", ["lpcnn", "modl-qsm"])
def test_the_choice_is_known_to_the_registry(network: str) -> None:
    spec = REGISTRY[network]
    assert spec.options["dipole_op"] == get_args(DipoleOp)
    assert spec.chosen_options({})["dipole_op"] == DEFAULT
    assert "dipole_op" not in spec.chosen_options({"form": "split"})
    having = {name for name, other in REGISTRY.items() if "dipole_op" in other.options}
    assert having == {"lpcnn", "modl-qsm"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "ir2qsm", "--dipole-op", "matmul"],
            "--dipole-op matmul is no option of ir2qsm",
        ),
        (
            ["--model", "lpcnn", "--form", "split", "--dipole-op", "matmul"],
            "--dipole-op matmul needs --form unrolled of lpcnn, not --form split",
        ),
    ],
)
def test_where_there_is_no_such_choice(arguments: list[str], message: str, capsys) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("unknown", ["fft", "dft"])
def test_an_unknown_one_is_refused(unknown: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "lpcnn", "--dipole-op", unknown])
    assert caught.value.code == 2
    assert "'matmul', 'function', 'plugin'" in capsys.readouterr().err


def test_a_plan_with_the_plugin_for_the_flavour_that_takes_none_is_refused_at_once(
    weights: Path, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    flags = ("--dipole-op", "plugin", "--engine", "tensorrt-rtx")
    assert export(weights, tmp_path / "a.plan", *flags) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == (
        "qsm-export: error: tensorrt-rtx takes no plugins, which --dipole-op plugin needs; export "
        "with --dipole-op matmul, or with --engine tensorrt"
    )
    assert "tracing" not in err
    assert not list(tmp_path.iterdir())
