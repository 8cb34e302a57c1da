"""Inputs that are missing or were not downloaded, and weights in the place of a model."""

import os
import socket
from pathlib import Path

import pytest

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.console.inputs import not_downloaded, refuse_weights, require_files


def test_what_is_there_is_no_matter(tmp_path):
    (tmp_path / "field.nii").touch()
    require_files([tmp_path / "field.nii", None])
    require_files([])


@pytest.mark.parametrize(
    ("name", "says"), [("mask.nii.gz", "no such file"), ("", "a folder"), ("x" * 300, "no such")]
)
def test_what_is_missing_is_named(tmp_path, name, says):
    with pytest.raises(DataError, match=f"{name}: {says}"):
        require_files([None, tmp_path / name])


@pytest.mark.parametrize("kind", ["fifo", "socket", "/dev/zero", "/dev/stdin", "loop", "link"])
def test_what_may_never_end_is_not_opened(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = Path(kind)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link":
        os.mkfifo("fifo")
        path.symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "socket":
            server.bind(kind)
        with pytest.raises(DataError, match=r"no regular file|leads back to itself"):
            require_files([path])


@pytest.mark.parametrize("name", ["x.pth", "model.PT", "w.safetensors", "w.h5"])
def test_weights_are_no_model(name):
    with pytest.raises(UsageError) as refused:
        refuse_weights(Path(name))
    assert str(refused.value) == (
        f"{name} are weights; make a model of them with: qsm-export --model NAME "
        f"--weights {name} -o NAME.onnx"
    )


@pytest.mark.parametrize("name", ["field.nii.gz", "field.nii", "model.onnx", "model.plan", "v.mat"])
def test_other_files_are_no_weights(name):
    refuse_weights(Path(name))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"/annex/objects/MD5E-s123--abc.nii.gz\n", "datalad get"),
        (b"../../.git/annex/objects/aa/bb/MD5E-s1--c/MD5E-s1--c", "datalad get"),
        (b"../.git/annex/objects/aa/bb/MD5E-s1--c/MD5E-s1--c", "datalad get"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\x1f\x8b\x08", None),
    ],
)
def test_a_pointer_is_no_content(tmp_path, content, says):
    path = tmp_path / "f.nii.gz"
    path.write_bytes(content)
    found = not_downloaded(path)
    assert (says in found) if says else (found is None)


@pytest.mark.parametrize(
    ("target", "says"),
    [("../.git/annex/objects/aa/x.nii.gz", "run: datalad get"), ("elsewhere.nii.gz", "a link to")],
)
def test_a_link_to_nothing_was_not_downloaded(tmp_path, target, says):
    path = tmp_path / "f.nii.gz"
    path.symlink_to(target)
    with pytest.raises(DataError, match=says):
        require_files([path])
