"""The suite for a GPU, on a made-up one: every row of every section."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = {"kernels", "pipeline", "tensorrt", "onnxruntime", "training", "compiled"}


def suite(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "benchmarks.gpu.suite", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_every_row_runs_and_says_that_it_is_pretended(tmp_path):
    done = suite("--pretend", "-o", tmp_path / "gpu.json")
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row for row in rows if not row["ok"]] == []
    assert done.returncode == 0, done.stderr
    assert all(row["pretended"] for row in rows)
    assert {row["section"] for row in rows} == SECTIONS
    assert len({(row["section"], row["name"]) for row in rows}) == len(rows)
    by_name = {row["name"]: row for row in rows}
    compared = by_name["tv-unet, PyTorch fp32"]
    for way in ("whole", "patches", "closed form", "conjugate gradients"):
        assert compared[way]["max_ppb"] < 0.01
        assert compared[way]["repeats_exactly"]
    assert by_name["embedding from cupy"]["max_ppb"] < 0.01
    assert by_name["total variation 16x16x16"]["relative_difference"] < 1e-5
    removed = by_name["two-prior background removal 16x16x16"]
    assert removed["one iteration"]["relative_difference"] < 1e-5
    graph = by_name["a CUDA graph of the operator"]
    assert graph["equal"]
    assert graph["finite"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pretend", "-o", ROOT / "benchmarks/results/x.json"), "what is pretended is no result"),
        (("--pretend", "--section", "kernels,nothing"), "--section nothing: one of kernels, pipe"),
        (("--section", "training"), "no GPU: this PyTorch"),
    ],
)
def test_what_it_refuses(options, message):
    done = suite(*options)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stdout == ""
