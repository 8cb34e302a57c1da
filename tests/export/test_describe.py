"""``qsm-export --describe``: what it says of checkpoints, of models, and of neither."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

import qsm_deploy.runtime.card.card as card_module
from qsm_deploy.export.checkpoints.state import state_sha256
from qsm_deploy.export.cli import main
from qsm_deploy.runtime.card.card import parse_card
from qsm_deploy.runtime.scan.nifti import nifti_bytes

MODEL = Path(card_module.__file__).parents[1] / "models" / "tv-unet.onnx"


def described(path: Path, capsys) -> tuple[str, dict[str, object]]:
    """Return what it prints for people, and for machines."""
    assert main(["--describe", str(path)]) == 0
    text, noise = capsys.readouterr()
    assert main(["--describe", str(path), "--json"]) == 0
    found, more = capsys.readouterr()
    assert noise + more == ""
    return text, json.loads(found)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_in_either_format(suffix: str, tiny_ir2qsm, tmp_path, capsys) -> None:
    state, path = tiny_ir2qsm.state_dict(), tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        save_file(state, path)
    text, found = described(path, capsys)
    digest = state_sha256(state)
    assert found["file"] == path.name
    assert found["networks"] == ["ir2qsm"]
    assert found["keys"] == len(state)
    assert found["values"] == sum(v.numel() for v in state.values() if v.is_floating_point())
    assert (found["widest"], found["sha256"]) == (8, digest)
    first = found["first_keys"]
    assert len(first) == 5
    assert all(tuple(shape) == state[key].shape for key, shape in first.items())
    assert text.startswith(f"w.{suffix}: looks like ir2qsm\n{len(state)} keys, ")
    assert f"8 at most, sha256 {digest[:12]}\n" in text
    assert all(key in text for key in first)


def test_kernels_of_tensorflow_and_networks_that_share_a_file(capsys) -> None:
    weights = Path(__file__).parent / "networks" / "golden" / "qsmnet_tf1_weights.npz"
    text, found = described(weights, capsys)
    assert found["networks"] == ["qsmnet", "qsmnet-plus"]
    assert found["widest"] == 4
    assert "looks like qsmnet or qsmnet-plus\n" in text


def test_iqsm_and_iqfm_are_the_same_to_it_and_a_name_that_contradicts_is_refused(
    tmp_path, capsys
) -> None:
    path = tmp_path / "iQFM_40_v2.pth"
    shapes = {f"EncodeConvs.{i}.EncodeConv.0.weight": torch.zeros(2, 2, 3, 3, 3) for i in range(4)}
    torch.save(shapes | {"FinalConv.weight": torch.zeros(1, 2, 1, 1, 1)}, path)
    assert "looks like iqsm or iqfm\n" in described(path, capsys)[0]
    assert main(["--model", "iqsm", "--weights", str(path), "--force", "-q"]) == 7
    assert "'iqfm' in its name is none of iqsm's" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(3,), (3, 1, 3, 3, 3)])
def test_weights_of_no_known_network(shape: tuple[int, ...], tmp_path, capsys) -> None:
    save_file({"layer.weight": torch.zeros(shape)}, tmp_path / "w.safetensors")
    text, found = described(tmp_path / "w.safetensors", capsys)
    assert found["networks"] == []
    assert found["widest"] == (3 if len(shape) == 5 else None)
    assert "looks like no network that is known here" in text


def test_a_model_with_a_card(capsys) -> None:
    text, found = described(MODEL, capsys)
    card = json.loads(MODEL.with_suffix(".json").read_text())
    assert found == {"file": "tv-unet.onnx", "card": card}
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines.keys() == card.keys()
    assert (lines["network"], lines["divisor"]) == ("tv-unet", "4")
    assert json.loads(lines["geometry"]) == card["geometry"]


def test_a_plan_and_a_card_of_its_own(tmp_path, capsys) -> None:
    card = parse_card(MODEL.with_suffix(".json").read_text())
    (tmp_path / "net.plan").write_bytes(b"ftrt" + bytes(90) + card.to_json().encode() + bytes(90))
    (tmp_path / "net.json").write_text(card.to_json())
    for name in ("net.plan", "net.json"):
        text, found = described(tmp_path / name, capsys)
        parts = {"engine": 184 + len(card.to_json()), "graph": 0}
        about = {"parts": parts} if name == "net.plan" else {}
        assert found == {"file": name, "card": json.loads(card.to_json())} | about
        assert ("graph inside     no, of the former form" in text) == bool(about)
        assert "tv-unet" in text


VOLUME = nifti_bytes(np.zeros((4, 4, 4), dtype=np.float32), np.eye(4), compress=False)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
MATLAB = b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x01IM"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (
            "f.nii.gz",
            gzip.compress(VOLUME, mtime=0),
            "a NIfTI volume, no weights; qsm-run takes it",
        ),
        ("f.nii", VOLUME, "a NIfTI volume"),
        ("f.nii", bytes([28, 2, 0, 0]) + b"n+2\0" + bytes(532), "a NIfTI volume"),
        (
            "w.pth.gz",
            gzip.compress(b"w" * 999, mtime=0),
            "compressed by gzip; unpack it with gunzip",
        ),
        ("w.pth.gz", b"\x1f\x8b\xff\xff", "compressed by gzip"),
        ("stats.mat", MATLAB, "a MATLAB file, .* go to --normalisation"),
        ("w.pth", MATLAB.replace(b"5.0", b"7.3"), "a MATLAB file"),
        ("slice.dcm", bytes(128) + b"DICM", "a DICOM image, no weights; convert it to NIfTI"),
        ("w.pth", POINTER, "a Git LFS pointer .* git lfs pull"),
        ("net.onnx", POINTER, "a Git LFS pointer"),
        ("net.plan", POINTER, "a Git LFS pointer"),
        ("w.h5", b"\n<!DOCTYPE html><html>", "a web page in place of the file; download it again"),
        ("a.json", b'{"made_by": "someone"}', "JSON, no weights"),
        ("w.pth", b"PK\x03\x04" + bytes(90), "a ZIP archive, truncated or damaged"),
        ("w.pth", b"\x89HDF\r\n\x1a\n" + bytes(90), "truncated, or not an HDF5 file"),
        ("notes.txt", b"epoch 3\nloss 0.1\n", "text, not a PyTorch file"),
        ("w.pth", b"\xff\xfe\xfd" * 30, "truncated, or not a PyTorch file"),
    ],
)
def test_a_file_of_another_kind_is_named(name, data, words, tmp_path, capsys) -> None:
    (tmp_path / name).write_bytes(data)
    assert main(["--describe", str(tmp_path / name)]) == 7
    error = capsys.readouterr().err
    assert re.match(rf"qsm-export: error: \S*{re.escape(name)}: {words}", error), error
    assert "pickle" not in error


def test_a_plan_is_no_weights(tmp_path, capsys) -> None:
    (tmp_path / "w.plan").write_bytes(b"ftrt")
    assert main(["--model", "ir2qsm", "--weights", str(tmp_path / "w.plan")]) == 7
    assert "a plan for TensorRT, no weights" in capsys.readouterr().err


@pytest.fixture
def nonsense(tmp_path: Path) -> Path:
    """Return a folder of files that are neither checkpoint nor model."""
    for name in ("text.pth", "text.safetensors", "text.onnx", "text.h5", "text"):
        (tmp_path / name).write_text("these are no weights\n" * 9)
    for name in ("empty.pth", "empty.safetensors", "empty.onnx", "empty.npz"):
        (tmp_path / name).touch()
    model = onnx.load(MODEL)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "cardless.onnx")
    (tmp_path / "cut.onnx").write_bytes(MODEL.read_bytes()[:5000])
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("text.pth", 7, "not a PyTorch file"),
        ("text", 7, "not a PyTorch file"),
        ("text.safetensors", 7, "not a readable safetensors file"),
        ("text.h5", 7, "not an HDF5 file"),
        ("empty.pth", 7, "not a PyTorch file"),
        ("empty.safetensors", 7, "not a readable safetensors file"),
        ("empty.npz", 7, "not a NumPy .npz file"),
        ("folder", 7, "no regular file"),
        ("none.pth", 7, "no such file"),
        ("none.onnx", 3, "no such model file"),
        ("text.onnx", 4, "not an .onnx model"),
        ("empty.onnx", 4, "not an .onnx model"),
        ("cut.onnx", 4, "cannot load it"),
        ("cardless.onnx", 4, "has no model card; export it with qsm-export"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    name: str, code: int, words: str, nonsense, capsys
) -> None:
    assert main(["--describe", str(nonsense / name)]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"qsm-export: error: {nonsense / name}: ") or name == "cardless.onnx"
    assert words in err
