"""Files that are no weights, or not in the format of their names: told by their bytes."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.kernels.errors import WeightsError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def write_h5(state: dict[str, Tensor], path: Path) -> None:
    with h5py.File(path, "w") as file:
        for key, value in state.items():
            file[key] = value.numpy()


def write_npz(state: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{key: value.numpy() for key, value in state.items()})


def write_old(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_without_checksums(state: dict[str, Tensor], path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".h5", ".npz", ".bin", ""])
@pytest.mark.parametrize(
    "write", [torch.save, write_old, write_without_checksums, save_file, write_h5, write_npz]
)
def test_weights_are_read_as_what_they_are(write, suffix: str, tmp_path) -> None:
    write(STATE, tmp_path / f"w{suffix}")
    loaded = load_state(tmp_path / f"w{suffix}")
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("write", [torch.save, write_npz])
def test_a_wrong_checksum_is_refused(write, tmp_path) -> None:
    write(STATE, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    values = STATE["weight"].numpy().tobytes()
    assert whole.count(values) == 1
    at = whole.index(values) + 2
    (tmp_path / "w.pth").write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    with pytest.raises(WeightsError, match=r"damaged, .* has another checksum"):
        load_state(tmp_path / "w.pth")


class Net(nn.Sequential):
    """Not importable where it is loaded."""

    def __init__(self) -> None:
        super().__init__(nn.Conv3d(1, 1, 1), nn.ReLU())


def torchscript() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Net()), file)
    return file.getvalue()


def exported() -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(Net(), (torch.zeros(1, 1, 2, 2, 2),)), file)
    return file.getvalue()


def whole_module(**options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(Net(), file, **options)
    return file.getvalue()


def onnx_model() -> bytes:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([node], "g", [value], [output]))
    return model.SerializeToString()


def archive_of(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file.getvalue()


def tar_of(mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("w.pth"))
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


TENSORFLOW = "of TensorFlow; save its variables by name as docs/qsmnet-weights.md says"
MADE_FROM = "no weights; pass the weights that it was made from"
# fields of protobuf messages as TensorFlow writes them: a schema number and a graph, a node
SAVED_MODEL = b"\x08\x01\x12\x9a\x07\n\x07\x12\x05serve"
FROZEN = b"\n\x2c\n\x05input\x12\x0bPlaceholder*\x0b\n\x05dtype\x12\x02\x30\x01"
KINDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "torchscript": (torchscript, r"a TorchScript archive, .*torch\.jit\.load\('.*w.*'\)\.state_di"),
    "torch.export": (
        exported,
        r"an archive of torch\.export, .*torch\.export\.load\('.*'\)\.state",
    ),
    "module": (whole_module, r"a whole pickled nn\.Module, refused .*weights_only=False\)\.state_"),
    "old module": (
        lambda: whole_module(_use_new_zipfile_serialization=False),
        r"a whole pickled nn\.Module, refused without running it",
    ),
    "numpy pickle": (
        lambda: pickle.dumps({"w": np.zeros(3)}, protocol=2),
        r"more than tensors in it \(numpy.*refused without running it",
    ),
    "protocol": (lambda: pickle.dumps({"w": 1}, protocol=4), "of another protocol than 2"),
    "pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a Git LFS pointer .* git lfs pull",
    ),
    "annex": (
        lambda: b"/annex/objects/MD5E-s42--00.pth\n",
        "a pointer of git-annex; run: datalad get",
    ),
    "html": (lambda: b"\xef\xbb\xbf\n<!DOCTYPE html>\n<title>Sign in", "a web page in place"),
    "comment": (lambda: b"<!-- saved from -->\n<HTML>", "a web page in place"),
    "xml": (lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied", "XML, no weights"),
    "json": (lambda: json.dumps({"metadata": {}}, indent=1).encode(), "JSON, no weights"),
    "json list": (lambda: b'[{"a": 1}]', "JSON, no weights"),
    "index": (lambda: bytes(90) + bytes.fromhex("57fb808b247547db"), f"a part .* {TENSORFLOW}"),
    "saved model": (lambda: SAVED_MODEL, f"a SavedModel {TENSORFLOW}"),
    "frozen": (lambda: FROZEN, f"a frozen graph {TENSORFLOW}"),
    "tflite": (lambda: b"\x1c\0\0\0TFL3" + bytes(90), f"a TensorFlow Lite model, {MADE_FROM}"),
    "onnx": (onnx_model, f"an ONNX model, {MADE_FROM}"),
    "plan": (lambda: b"ftrt" + bytes(90), "a plan for TensorRT, no weights"),
    "npy": (npy, "one NumPy array without a name"),
    "zip": (lambda: archive_of("a.txt", "b.pth"), "a ZIP archive of 'a.txt' and others, .* unpack"),
    "keras": (
        lambda: archive_of("metadata.json", "config.json", "model.weights.h5"),
        "an archive of Keras; save the weights",
    ),
    "cut zip": (lambda: archive_of("data.pkl")[:-9], "a ZIP archive, truncated or damaged"),
    "tar": (lambda: tar_of("w"), "a tar archive; unpack it with tar -xf"),
    "tar.gz": (lambda: tar_of("w:gz"), "a tar archive; unpack it with tar -xf"),
    "tar.bz2": (lambda: tar_of("w:bz2"), "compressed by bzip2"),
    "tar.xz": (lambda: tar_of("w:xz"), "compressed by xz"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(90), "compressed by zstd"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(90), "an archive; unpack it"),
}


@QUIET
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_it_is_called_what_it_is_under_any_name(kind: str, name: str, tmp_path) -> None:
    make, words = KINDS[kind]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(WeightsError, match=rf"{name}: .*{words}") as caught:
        load_state(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 7


def test_a_shard_of_tensorflow_is_known_by_its_name(tmp_path) -> None:
    (tmp_path / "net.data-00000-of-00001").write_bytes(np.ones(9, np.float32).tobytes())
    with pytest.raises(WeightsError, match=f"a part of a checkpoint {TENSORFLOW}"):
        load_state(tmp_path / "net.data-00000-of-00001")


def test_the_name_that_tensorflow_gives_a_checkpoint_is_no_file(tmp_path) -> None:
    (tmp_path / "net.index").touch()
    with pytest.raises(WeightsError, match=f"net: a checkpoint {TENSORFLOW}"):
        load_state(tmp_path / "net")


def test_the_bytes_of_onnx_are_those_that_are_looked_for() -> None:
    assert onnx.load_from_string(onnx_model()).ir_version == onnx_model()[1]
