"""Models that take too long to be opened or to run, in the libraries themselves."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import BACKENDS

STEPS = 400
FEEDS = {"local_field_ppm": np.zeros((1, 1, 64, 64, 64), np.float32)}
PROGRAM = """
import sys
from qsm_deploy.runtime.cli import main
sys.argv[0] = "qsm-run"  # whose process may be left while something goes on
sys.exit(main())
"""

Write = Callable[[list[onnx.NodeProto], dict[str, np.ndarray]], Path]


@pytest.fixture
def write(card: ModelCard, tmp_path: Path) -> Write:
    """Return what writes a graph from ``local_field_ppm`` to ``chi_ppm``, with a card."""

    def written(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> Path:
        ends = [
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 1, "x", "y", "z"])]
            for name in ("local_field_ppm", "chi_ppm")
        ]
        stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, "slow", *ends, stored)
        opset = [helper.make_opsetid("", 18)]
        path = tmp_path / "slow.onnx"
        path.write_bytes(
            with_card(helper.make_model(graph, opset_imports=opset, ir_version=9), card)
        )
        return path

    return written


@pytest.fixture
def slow_to_run(write: Write) -> Path:
    """Return a model of 400 convolutions with 16 channels, half a minute for 64 voxels cubed."""
    widths = {"first": (16, 1), "step": (16, 16), "last": (1, 16)}
    weights = {
        name: np.full((*width, 3, 3, 3), 1 / 27 / width[1], np.float32)
        for name, width in widths.items()
    }
    names = ["local_field_ppm", *(f"step{n}" for n in range(STEPS + 1)), "chi_ppm"]
    kinds = ["first", *["step"] * STEPS, "last"]
    return write(
        [
            helper.make_node("Conv", [taken, kind], [given], pads=[1] * 6)
            for taken, kind, given in zip(names, kinds, names[1:], strict=False)
        ],
        weights,
    )


@pytest.fixture
def slow_to_open(write: Write) -> Path:
    """Return a model of matrix products that do not depend on its input: minutes to fold."""
    return write(
        [
            helper.make_node("ConstantOfShape", ["size"], ["m0"]),
            *(helper.make_node("MatMul", [f"m{n}", "m0"], [f"m{n + 1}"]) for n in range(200)),
            helper.make_node("ReduceMean", ["m200"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["local_field_ppm", "mean"], ["chi_ppm"]),
        ],
        {"size": np.int64([2500, 2500])},
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_takes_too_long_is_ended(slow_to_run: Path, backend: str) -> None:
    session = open_session(slow_to_run, backend, threads=1, time_limit=8)
    small = {name: values[..., :8, :8, :8] for name, values in FEEDS.items()}
    assert session.run(small).shape == (1, 1, 8, 8, 8)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"of twice in .* takes longer than 8 s"):
        session.run(FEEDS)
    assert time.monotonic() - began < 20
    assert session.run(small).shape == (1, 1, 8, 8, 8)  # it is there for others


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("flags", "interrupt"), [(["--time-limit", "2"], False), ([], True)])
def test_a_model_that_never_opens_ends_the_command(
    slow_to_open: Path, write_volume: Callable[..., Path], backend: str, flags, interrupt
) -> None:
    field = write_volume(np.random.default_rng(0).normal(0, 0.01, (16,) * 3), "field.nii")
    command = [sys.executable, "-c", PROGRAM, slow_to_open, field, "--backend", backend, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        if interrupt:
            time.sleep(6)
            process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == (130 if interrupt else 4)
    seen = "interrupted" if interrupt else "takes longer than 2 s, the limit; pass a"
    assert seen in error
    assert not field.with_name("field_chi.nii.gz").exists()
