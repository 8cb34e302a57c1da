"""INT8 in OpenVINO is the integer arithmetic; where a CPU or a card forbids it, it is FP32."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import numpy_helper

from qsm_deploy.calibration.int8.qdq import Int8Layer, insert_qdq
from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.reconstructor import Host, open_reconstructor
from qsm_deploy.runtime.sessions import int8
from qsm_deploy.runtime.sessions.open import open_session

Array = NDArray[Any]
Tensors = Mapping[str, Array]
SHAPE = (1, 4, 6, 10, 8)
SAME = "<pads=[1, 1, 1, 1, 1, 1]>"
HALVES = "<kernel_shape=[2, 2, 2], strides=[2, 2, 2]>"
LIMITED = ("AVX2_VNNI", "AVX512_CORE_VNNI", "AVX512_CORE_AMX")  # as far as this CPU has them
RUN = """
import sys; from pathlib import Path; import numpy, openvino
x = numpy.load(Path(sys.argv[1]) / "x.npy")
for path in Path(sys.argv[1]).glob("*.onnx"):
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    numpy.save(path.with_suffix(".npy"), compiled(x)[0])
"""
needs_vnni = pytest.mark.skipif(not int8.sums_in_int32(), reason="no VNNI and no AMX")


def quantised(x: Array, scale: Array) -> Array:
    return np.clip(np.rint(x / scale), -128, 127).astype(np.int64)


def conv(q: Array, step: Array, t: Tensors, w: str = "w") -> Array:
    """Return a convolution of integers, summed as integers, in the unit of its input's scale."""
    windows = sliding_window_view(np.pad(q, [(0, 0)] + [(1, 1)] * 3), (3, 3, 3), axis=(1, 2, 3))
    total = np.einsum("cxyzijk,ocijk->oxyz", windows, t[f"{w}_int8"].astype(np.int64))
    return total * (t[f"{w}_scale"] * step).astype(np.float64)[:, None, None, None]


def one(x: Array, t: Tensors) -> Array:
    return conv(quantised(x, t["x_scale"]), t["x_scale"], t) + t["b"][:, None, None, None]


def two(x: Array, t: Tensors) -> Array:
    u = conv(quantised(x, t["x_scale"]), t["x_scale"], t)
    return conv(quantised(np.where(u > 0, u, 0.1 * u), t["u_scale"]), t["u_scale"], t, "w2")


def add(x: Array, t: Tensors) -> Array:
    q = quantised(x, t["x_scale"])
    return np.maximum(conv(q, t["x_scale"], t) + q * t["x_scale"], 0)


def pool(x: Array, t: Tensors) -> Array:
    a, b, c, d = x.shape
    p = x.reshape(a, b // 2, 2, c // 2, 2, d // 2, 2).max(axis=(2, 4, 6))
    return conv(quantised(p, t["p_scale"]), t["p_scale"], t)


def concat(x: Array, t: Tensors) -> Array:
    v = np.concatenate([np.maximum(x, 0), x])
    return conv(quantised(v, t["v_scale"]), t["v_scale"], t)


def transposed(x: Array, t: Tensors) -> Array:
    q, w = quantised(x, t["x_scale"]), t["w_int8"].astype(np.int64)
    y = np.einsum("cxyz,coijk->oxiyjzk", q, w).reshape(w.shape[1], *(2 * n for n in x.shape[1:]))
    return y * (t["w_scale"] * t["x_scale"]).astype(np.float64)[:, None, None, None]


CONV = Int8Layer("y", "Conv", "x", "w")
CASES: dict[str, tuple[str, tuple[Int8Layer, ...], Callable[[Array, Tensors], Array]]] = {
    "conv": (f"y = Conv {SAME} (x, w, b)", (CONV,), one),
    "conv, activation, conv": (
        f"c = Conv {SAME} (x, w)\nu = LeakyRelu <alpha=0.1> (c)\ny = Conv {SAME} (u, w2)",
        (replace(CONV, output="c"), Int8Layer("y", "Conv", "u", "w2")),
        two,
    ),
    "conv, add": (
        f"c = Conv {SAME} (x, w)\na = Add (c, x)\ny = Relu (a)",
        (replace(CONV, output="c"), Int8Layer("a", "Add", "x", "c")),
        add,
    ),
    "pool": (
        f"p = MaxPool {HALVES} (x)\ny = Conv {SAME} (p, w)",
        (replace(CONV, activation="p"),),
        pool,
    ),
    "concat": (
        f"r = Relu (x)\nv = Concat <axis=1> (r, x)\ny = Conv {SAME} (v, w)",
        (replace(CONV, activation="v"),),
        concat,
    ),
    "transposed": (
        "y = ConvTranspose <strides=[2, 2, 2]> (x, w)",
        (Int8Layer("y", "ConvTranspose", "x", "w"),),
        transposed,
    ),
}


def graph_of(name: str) -> onnx.ModelProto:
    """Return an operator with Q/DQ around it, as an export writes it."""
    text, layers, _ = CASES[name]
    rng = np.random.default_rng(5)
    size = 2 if name == "transposed" else 3
    channels = {"w": 8 if name == "concat" else 4, "w2": 4}
    values = {w: rng.normal(0, 1, (4, n, *[size] * 3)) for w, n in channels.items()}
    values["b"] = rng.normal(0, 1, 4)
    arrays = {name: value.astype(np.float32) for name, value in values.items()}
    head = '<ir_version: 10, opset_import: ["": 20]>\ng (float[1, 4, a, b, c] x) => '
    model = onnx.parser.parse_model(f"{head}(float[1, 4, d, e, f] y) {{\n{text}\n}}")
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    amax = {"x": 2.0, "u": 30.0, "p": 2.0, "v": 2.0}
    return insert_qdq(model, layers, amax, arrays)


@pytest.fixture(scope="module", params=LIMITED)
def computed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what OpenVINO makes of all cases with instructions up to some."""
    if request.param == "AVX2_VNNI" and "avx_vnni" not in int8.CPUINFO.read_text().split():
        pytest.skip("no VNNI in AVX2")  # limited to AVX2 such a CPU has none at all
    folder = tmp_path_factory.mktemp("int8")
    np.save(folder / "x.npy", np.random.default_rng(3).normal(0, 1, SHAPE).astype(np.float32))
    for name in CASES:
        onnx.save(graph_of(name), folder / f"{name}.onnx")
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": request.param}
    subprocess.run([sys.executable, "-c", RUN, folder], env=environment, check=True, timeout=100)
    return folder


@needs_vnni
@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_the_integer_arithmetic(name: str, computed: Path) -> None:
    tensors = {t.name: numpy_helper.to_array(t) for t in graph_of(name).graph.initializer}
    expected = CASES[name][2](np.load(computed / "x.npy")[0], tensors)
    off = np.abs(np.load(computed / f"{name}.npy")[0] - expected)
    assert np.median(off) < 1e-5
    assert np.mean(off > 1e-3) < 0.02  # a value between two steps may fall on the other
    assert off.max() < 0.1 * np.abs(expected).max()


@pytest.fixture
def model(tkd_card: ModelCard, tmp_path: Path) -> Callable[..., Path]:
    """Return what writes a file in INT8, with what its card says of that."""

    def write(**options: str) -> Path:
        card = replace(tkd_card, precision="int8", options=options)
        text = '<ir_version: 10, opset_import: ["": 20]>\ng (' + ", ".join(
            f"float[1, 1, x, y, z] {volume.name}" for volume in card.inputs
        )
        text += f") => (float[1, 1, x, y, z] {card.output.name}) {{\n"
        text += f"{card.output.name} = Conv {SAME} ({card.inputs[0].name}, w)\n}}"
        made = onnx.parser.parse_model(text)
        w = np.random.default_rng(0).normal(0, 1, (1, 1, 3, 3, 3)).astype(np.float32)
        made.graph.initializer.append(numpy_helper.from_array(w, "w"))
        field = card.inputs[0].name
        layer = Int8Layer(card.output.name, "Conv", field, "w")
        path = tmp_path / "int8.onnx"
        path.write_bytes(with_card(insert_qdq(made, [layer], {field: 0.1}, {"w": w}), card))
        return path

    return write


@needs_vnni
def test_int8_is_for_files_and_backends_that_were_found_accurate(model) -> None:
    accurate = model(int8_in="openvino")
    assert open_session(accurate, "openvino", precision="auto").precision == "int8"
    assert open_session(accurate, "openvino").precision == "fp32"
    assert open_session(accurate, "onnxruntime", precision="auto").precision == "fp32"
    opened = open_reconstructor([accurate], Host())
    assert opened.inversion.name.startswith("tkd-twice int8, openvino")
    assert "in fp32" not in opened.why_backend
    opened = open_reconstructor([model()], Host())
    assert opened.inversion.name.startswith("tkd-twice fp32, openvino")
    assert "in fp32: INT8 in openvino was not found accurate" in opened.why_backend


def test_a_cpu_that_sums_in_int16_computes_in_fp32(model, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(int8, "CPUINFO", tmp_path / "cpuinfo")
    for flags in (None, "flags : sse4_2 avx2 avx512f avx512_vnnix"):
        if flags:
            int8.CPUINFO.write_text(flags)
        opened = open_reconstructor([model(int8_in="openvino")], Host(backend="openvino"))
        assert opened.inversion.name.startswith("tkd-twice fp32, openvino")
        assert "in fp32: this CPU has neither VNNI nor AMX" in opened.why_backend
    int8.CPUINFO.write_text("flags : sse4_2 avx_vnni")
    assert int8.sums_in_int32()
