"""Plans as typed: what is built, for which engine and shapes, and what is refused."""

import importlib.util
import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch

from qsm_deploy.export import order
from qsm_deploy.export.cli import main
from qsm_deploy.export.measure import rounding as rounding_error
from qsm_deploy.export.order import choose_output
from qsm_deploy.kernels.errors import MissingDependencyError, UsageError
from qsm_deploy.runtime.card.card import parse_card
from qsm_deploy.runtime.card.plan_file import read_plan
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.gpu.building.profile import profile_from
from qsm_deploy.runtime.gpu.engines.tensorrt_library import installed_engines, open_library
from qsm_deploy.runtime.sessions.open import open_session


@pytest.fixture
def folder(tmp_path: Path, tiny_tv_unet, monkeypatch) -> Path:
    """Return the current folder, weights in it; heads are small."""
    # in half precision as in other tests that share the trace
    half = {key: value.half() for key, value in tiny_tv_unet.state_dict().items()}
    torch.save(half, tmp_path / "tiny.pth")
    for name in ("HEAD", "SHAPE"):
        monkeypatch.setattr(rounding_error, name, (24, 20, 28))
    monkeypatch.setattr(rounding_error, "CORNER", (0, 0, 0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*arguments: str) -> int:
    return main(["--model", "tv-unet", "--weights", "tiny.pth", *arguments])


@pytest.mark.usefixtures("quick")
def test_a_reduced_precision_becomes_a_plan_where_an_engine_is_installed(folder, capsys) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    chosen = ("--shapes", "16,32x16x32,64", "--layers", "layers.json", "--workspace-mb", "500")
    assert export("--fp16", "--engine", "tensorrt-rtx", "--gate-ppb", "30", *chosen) == 0
    out, err = capsys.readouterr()
    assert "writing tv-unet-fp16.plan for tensorrt-rtx" in err
    assert "building with tensorrt-rtx 1." in err
    assert out.startswith("tv-unet-fp16.plan: ")
    assert "the engine in it was not run" in out
    card = parse_card(Path("tv-unet-fp16.json").read_text())
    assert load_card(Path("tv-unet-fp16.plan")) == card
    assert card.precision == "fp16"
    assert card.options["shapes"] == "16x16x16,32x16x32,64x64x64"
    assert card.options["engine"].startswith("tensorrt-rtx 1.")
    assert card.options["gpu"] == "sm_80,sm_86,sm_89,sm_120,sm_121+"
    layers = json.loads(Path("layers.json").read_text())
    kinds = {layer["precision"] for layer in layers["network"] if layer["kind"] == "convolution"}
    assert kinds == {"half", "float"}
    if layers["engine"] is None:
        assert "no NVIDIA driver" in layers["why_no_engine"]
    assert export("--fp16", "--engine", "tensorrt-rtx") == 2
    assert "--force" in capsys.readouterr().err
    same_as_the_onnx_file(capsys)


def same_as_the_onnx_file(capsys) -> None:
    """Hold the graph in the plan against the file of the same precision, and take it out."""
    assert export("--fp16", "-o", "a.onnx", "--gate-ppb", "30", "-q") == 0
    card = load_card(Path("a.onnx"))
    described = ("--describe", "tv-unet-fp16.plan", "--extract")
    for name in ("graph.onnx", "bare.engine"):
        assert main([*described, name]) == 0
    out = capsys.readouterr().out
    assert "sm_80,sm_86,sm_89,sm_120,sm_121+, shapes 16x16x16,32x16x32,64x64x64" in out
    assert "graph inside" in out
    plan = read_plan(Path("tv-unet-fp16.plan"))
    assert Path("bare.engine").read_bytes() == plan.engine
    assert Path("graph.onnx").read_bytes() == plan.graph
    inside = load_card(Path("graph.onnx"))
    assert inside == replace(card, memory=inside.memory)
    assert inside.memory.keys() == card.memory.keys()
    rng = np.random.default_rng(0)
    shapes = {t.name: (1, 1, 16, 16, 16) if t.is_volume else (1,) for t in card.inputs}
    feeds = {name: rng.standard_normal(s, dtype=np.float32) for name, s in shapes.items()}
    for backend in inside.memory:
        maps = [
            open_session(Path(name), backend).run(feeds) for name in ("a.onnx", "tv-unet-fp16.plan")
        ]
        np.testing.assert_array_equal(*maps)
    for wrong in (["tv-unet-fp16.plan", "--extract", "x.txt"], ["a.onnx", "--extract", "b.onnx"]):
        assert main(["--describe", *wrong]) == 2
        assert "--extract" in capsys.readouterr().err
    assert main(["--extract", "b.onnx"]) == 2
    assert "name the plan with --describe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "engine", "precision", "installed", "expected"),
    [
        (None, None, "fp32", ("tensorrt-rtx",), ("net-fp32.onnx", None)),
        (None, None, "fp16", ("tensorrt-rtx",), ("net-fp16.plan", "tensorrt-rtx")),
        (None, None, "fp16", ("tensorrt", "tensorrt-rtx"), ("net-fp16.plan", "tensorrt")),
        (None, None, "bf16", (), ("net-bf16.onnx", None)),
        (None, "tensorrt-rtx", "fp32", (), ("net-fp32.plan", "tensorrt-rtx")),
        ("a.onnx", None, "fp16", ("tensorrt",), ("a.onnx", None)),
        ("a.plan", None, "fp32", ("tensorrt-rtx",), ("a.plan", "tensorrt-rtx")),
        ("a.plan", None, "fp32", (), ("a.plan", "tensorrt")),
    ],
)
def test_the_suffix_decides_or_what_is_installed(
    given, engine, precision, installed, expected, monkeypatch
) -> None:
    monkeypatch.setattr(order, "installed_engines", lambda: installed)
    path = None if given is None else Path(given)
    output, chosen, why = choose_output(path, engine, "net", precision)
    assert (str(output), chosen) == expected
    assert why


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "a.onnx", "--engine", "tensorrt"], "--engine tensorrt builds a plan"),
        (["-o", "a.onnx", "--shapes", "16,16,16"], "--shapes is about plans"),
        (["-o", "a.engine"], "give it the suffix .onnx, or .plan"),
        (["-o", "a.plan", "--engine", "tensorrt-rtx", "--shapes", "16,18,20"], "multiple of 4"),
    ],
)
def test_what_does_not_go_together_is_one_line(folder, arguments, message, capsys) -> None:
    if "18" in str(arguments):
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
        arguments = [a.replace("18", "19") for a in arguments]
    assert export(*arguments, "--quiet") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in folder.iterdir()] == ["tiny.pth"]


def test_an_engine_that_is_missing_or_a_stub_names_the_extra(folder, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert export("-o", "a.plan", "--engine", "tensorrt", "--quiet") == 4
    assert "pip install '.[tensorrt]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", json)
    with pytest.raises(MissingDependencyError, match=r"\.\[tensorrt-rtx\]"):
        open_library("tensorrt-rtx", "--engine tensorrt-rtx")


def test_the_engines_are_found_by_their_libraries(monkeypatch) -> None:
    there = {"tensorrt_rtx": "tensorrt_rtx/__init__.py", "tensorrt": None}  # stubs alone

    def find_spec(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None, origin=there[name]) if name in there else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert installed_engines() == ("tensorrt-rtx",)
    there["tensorrt"] = "tensorrt/__init__.py"
    assert installed_engines() == ("tensorrt", "tensorrt-rtx")
    there.clear()
    assert installed_engines() == ()


def test_the_default_shapes_are_multiples_of_the_divisor() -> None:
    assert str(profile_from(None, 16, patchable=True)) == "16x16x16,160x160x160,256x256x256"
    assert str(profile_from(None, 24, patchable=True)) == "24x24x24,168x168x168,264x264x264"
    assert profile_from(None, 8, patchable=True).batches == (1, 1, 4)
    assert profile_from("8,8x16x8,16", 8, patchable=False).batches == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16", "expected MIN,OPT,MAX"),
        ("16,32", "expected MIN,OPT,MAX"),
        ("16,32x32,64", "each as 64 or 64x96x80"),
        ("16,-32,64", "expected MIN,OPT,MAX"),
        ("64,32,16", "must grow"),
        ("0,16,32", "must grow"),
        ("16,32x24x36,64", "36 is no multiple of 8"),
    ],
)
def test_shapes_that_no_engine_could_have_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        profile_from(text, 8, patchable=True)
