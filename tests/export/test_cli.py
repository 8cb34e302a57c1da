"""``qsm-export`` as typed: what it writes, prints and refuses, and with which exit code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qsm_deploy.export import write_network
from qsm_deploy.export.cli import main
from qsm_deploy.export.measure.verification import Difference
from qsm_deploy.export.networks import network_spec, registry
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.tv_unet import TvUnet
from qsm_deploy.runtime.card.card import METADATA_KEY, parse_card
from qsm_deploy.runtime.sessions.open import open_session


@pytest.fixture(scope="module")
def exported(tiny_ir2qsm, tmp_path_factory) -> Path:
    """Return a folder with ``tiny.pth`` and what was exported from it, everything measured."""
    folder: Path = tmp_path_factory.mktemp("exported")
    torch.save(tiny_ir2qsm.state_dict(), folder / "tiny.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsm_deploy.export.measure.receptive_field.HEAD", (32, 32, 64))
        patch.setattr("qsm_deploy.export.measure.receptive_field.BOX", (32, 32, 64))
        patch.setattr(
            "qsm_deploy.export.write_network.measure_memory",
            lambda path, backend: write_network.MemoryUse(10, 20),
        )
        assert run(folder, "-o", str(folder / "a.onnx"), "--residual", "iteration") == 0
    return folder


def run(folder: Path, *arguments: str) -> int:
    return main(["--model", "ir2qsm", "--weights", str(folder / "tiny.pth"), *arguments])


def test_the_card_is_in_the_file_and_beside_it(exported: Path) -> None:
    card = parse_card((exported / "a.json").read_text())
    stored = {p.key: p.value for p in onnx.load(exported / "a.onnx").metadata_props}
    assert parse_card(stored[METADATA_KEY]) == card
    assert stored[METADATA_KEY] == card.to_json()
    for backend in ("onnxruntime", "openvino"):
        assert open_session(exported / "a.onnx", backend).card == card


def test_the_card_tells_what_was_exported_and_measured(exported: Path) -> None:
    card = parse_card((exported / "a.json").read_text())
    assert (card.network, card.divisor, card.precision) == ("ir2qsm", 4, "fp32")
    assert card.options == {"residual": "iteration"}
    assert 0 < card.verified.max_ppb < 0.01
    assert len(card.verified.shapes) == 3
    assert card.memory.keys() == {"onnxruntime", "openvino"}
    assert 0 < card.receptive_field.halo <= card.receptive_field.theoretical
    assert (card.licence, card.doi) == ("none declared", "10.1002/mp.17747")
    assert card.made_by.startswith("qsm-deploy ")


def test_the_file_computes_what_the_network_computes(exported: Path, tiny_ir2qsm) -> None:
    field = np.random.default_rng(0).standard_normal((1, 1, 8, 12, 16), dtype=np.float32) * 0.02
    network = build_network(
        registry.REGISTRY["ir2qsm"], tiny_ir2qsm.state_dict(), Choices({"residual": "iteration"})
    )
    with torch.inference_mode():
        expected = network(torch.from_numpy(field)).numpy()
    got = open_session(exported / "a.onnx", "onnxruntime").run({"local_field_ppm": field})
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.usefixtures("quick")
def test_default_name_json_and_overwriting(exported: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(exported, "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ir2qsm-fp32.json", "ir2qsm-fp32.onnx"]
    assert result["file"] == "ir2qsm-fp32.onnx"
    assert result["size_bytes"] == Path("ir2qsm-fp32.onnx").stat().st_size
    assert len(result["differences"]) == 6
    assert result["card"]["options"] == {"residual": "input"}

    before = Path("ir2qsm-fp32.onnx").stat().st_mtime_ns
    assert run(exported) == 2
    assert "--force" in capsys.readouterr().err
    assert Path("ir2qsm-fp32.onnx").stat().st_mtime_ns == before
    Path("ir2qsm-fp32.onnx").unlink()
    assert run(exported) == 2  # the card is there still
    assert run(exported, "--force") == 0
    out, err = capsys.readouterr()
    assert out.startswith("ir2qsm-fp32.onnx: ")
    assert out.count("\n") == 1
    assert "ppb of PyTorch at 48x48x48, 51x45x37, 64x32x40" in out
    assert "verifying" in err


@pytest.mark.usefixtures("quick")
def test_above_the_gate_nothing_is_left(exported: Path, tmp_path, monkeypatch, capsys) -> None:
    assert run(exported, "-o", str(tmp_path / "b.onnx"), "--gate-ppb", "1e-9") == 5
    assert "ppb" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(
        write_network,
        "measure_differences",
        lambda *arguments: [Difference("openvino", (8, 8, 8), float("nan"))],
    )
    assert run(exported, "-o", str(tmp_path / "b.onnx")) == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_failed_export_keeps_the_file_that_was_there(exported: Path, tmp_path) -> None:
    (tmp_path / "b.onnx").write_bytes(b"precious")
    assert run(exported, "-o", str(tmp_path / "b.onnx"), "--force", "--gate-ppb", "1e-9") == 5
    assert (tmp_path / "b.onnx").read_bytes() == b"precious"


@pytest.mark.usefixtures("quick")
def test_bundled_weights_are_announced(tiny_tv_unet, tmp_path, monkeypatch, capsys) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(network_spec, "WEIGHTS_FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    half = {key: value.half() for key, value in tiny_tv_unet.state_dict().items()}
    save_file(half, tmp_path / "tv-unet.safetensors")
    assert main(["--model", "tv-unet"]) == 0
    assert "taking the bundled ones" in capsys.readouterr().err.splitlines()[0]
    card = parse_card(Path("tv-unet-fp32.json").read_text())
    assert card.priors == TvUnet.priors
    assert card.licence == registry.OWN_LICENCE


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--list"),
        (["--model", "deepqsm"], 2, "no such network"),
        (["--model", "tv-unet", "--residual", "input"], 2, "no option of tv-unet"),
        (["--model", "ir2qsm", "-o", "model.pb"], 2, ".onnx"),
        (["--model", "ir2qsm"], 7, "drive.google.com"),
        (["--model", "ir2qsm", "--weights", "none.pth"], 7, "no such file"),
        (["--model", "ir2qsm", "--weights", "text.pth"], 7, "not a PyTorch file"),
        (["--model", "tv-unet", "--weights", "tiny.pth"], 7, "pass --model ir2qsm"),
        (["--model", "ir2qsm", "--weights", "tiny.pth", "-o", "no/a.onnx"], 3, "not a folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    exported, tmp_path, monkeypatch, capsys, arguments, code, message
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network_spec, "WEIGHTS_FOLDER", tmp_path)
    (tmp_path / "text.pth").write_text("these are no weights")
    (tmp_path / "tiny.pth").write_bytes((exported / "tiny.pth").read_bytes())
    before = sorted(tmp_path.iterdir())
    assert main([*arguments, "--quiet"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qsm-export: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("gate", ["0", "-1", "nan", "inf", "small"])
def test_a_gate_that_is_no_positive_number_is_refused(gate: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "ir2qsm", "--gate-ppb", gate])
    assert caught.value.code == 2


def test_the_list_says_of_every_network_what_it_is(capsys) -> None:
    assert main(["--list"]) == 0
    table = capsys.readouterr().out
    assert main(["--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["network"] for row in rows] == list(registry.REGISTRY)
    for row, block in zip(rows, re.split(r"\n(?=\S)", table), strict=True):
        name, *lines = block.splitlines()
        said = {line[:21].strip(): line[21:].strip() for line in lines}
        assert name == row["network"]
        assert said["size"] == f"{row['parameters']:,} parameters, {row['gmac_64']:g} GMAC for 64^3"
        assert said["grid"] == f"multiples of {row['divisor']}"
        assert said["inputs"] == ", ".join(f"{n} [{unit}]" for n, unit in row["inputs"].items())
        assert said["output"] == ", ".join(f"{n} [{unit}]" for n, unit in row["output"].items())
        assert said["task"] == row["task"]
        assert said["published weights"] == row["published_weights"] != ""
        assert said["licence"] == row["licence"] != ""
        assert said["doi"] == (row["doi"] or "none")
        flags = [f"--{option.replace('_', '-')} " for option in row["options"]]
        assert all(flag in said["options"] for flag in flags)
        assert said["bundled weights"] == (row["bundled_weights"] or "none")


def test_help_and_list_import_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\n"
        "from qsm_deploy.export.cli import main\n"
        "main(['--list'])\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'openvino') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_missing_torch_names_the_extra(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "qsm_deploy.export.checkpoints.state", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["--model", "ir2qsm", "--weights", str(tmp_path / "w.pth"), "--quiet"]) == 4
    assert "'.[export]'" in capsys.readouterr().err
