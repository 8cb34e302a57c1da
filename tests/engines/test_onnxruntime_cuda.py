"""ONNX Runtime's CUDA provider, played by its CPU provider on host memory."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as status

from qsm_deploy.kernels.errors import CardError, EngineError, MemoryLimitError
from qsm_deploy.runtime.card.card import METADATA_KEY
from qsm_deploy.runtime.gpu.engines import onnxruntime_cuda as module
from qsm_deploy.runtime.gpu.open import open_device_session
from tests.engines.onnxruntime_stand_in import Gpu

SHAPES = {"local_field_ppm": (2, 1, 16, 24, 32), "voxel_size_mm": (3,)}
VOXELS = 2 * 16 * 24 * 32
STREAM = 0x7FFF00000400
OWN_STREAM = 0x5000


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, driver) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(module, "onnxruntime", gpu.module())
    return gpu


@pytest.fixture
def write(tmp_path, model, card):
    """Return a function that writes the model with a card."""

    def write(card=card):
        if card is not None:
            helper.set_model_props(model, {METADATA_KEY: card.to_json()})
        path = tmp_path / "x.onnx"
        onnx.save(model, path)
        return path

    return write


def run(session, buffer) -> np.ndarray:
    (field, values), (output, made), (size, edges) = buffer(VOXELS), buffer(VOXELS), buffer(3)
    values[:], edges[:] = np.arange(VOXELS), 0.5
    inference = session.open_inference(SHAPES, 0)
    inference.enqueue({"local_field_ppm": field, "voxel_size_mm": size}, output, STREAM)
    return made


def test_it_runs_on_the_caller_s_memory_in_the_order_of_its_stream(
    gpu, write, buffer, driver, capsys
) -> None:
    session = open_device_session(write())
    np.testing.assert_array_equal(run(session, buffer), 1.5 * np.arange(VOXELS))
    assert driver.ordered == [(STREAM, OWN_STREAM), (OWN_STREAM, STREAM)]
    assert driver.current == [0]
    assert gpu.options["user_compute_stream"] == str(OWN_STREAM)
    assert (gpu.options["use_tf32"], gpu.options["device_id"]) == ("0", "0")
    assert "gpu_mem_limit" not in gpu.options
    assert (session.backend, session.capturable) == ("onnxruntime-cuda", False)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "loaded\n")
    session.close()
    assert driver.closed == [OWN_STREAM]
    with pytest.raises(EngineError, match="was closed"):
        run(session, buffer)
    session.close()


def test_its_memory_is_its_own(gpu, write, card) -> None:
    session = open_device_session(write(), memory_limit=1 << 30)
    assert gpu.options["gpu_mem_limit"] == str(1 << 30)
    assert session.scratch_bytes(SHAPES) == 0
    assert session.own_bytes(SHAPES) == 1000 + 10 * VOXELS
    assert session.weights_bytes > 0


def test_memory_that_nobody_measured_is_not_made_up(gpu, write, card) -> None:
    session = open_device_session(write(replace(card, memory={})))
    assert session.own_bytes(SHAPES) is None


def test_the_output_s_shape_follows_from_the_card(gpu, write) -> None:
    assert open_device_session(write()).output_shape(SHAPES) == (2, 1, 16, 24, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_field_ppm": (2, 2, 16, 24, 32)}, "is 2x2x16x24x32, ir2qsm takes nx1xxxyxz"),
        ({"local_field_ppm": (2, 1, 16, 24, 33)}, "multiples of 8, got z=33"),
        ({"local_field_ppm": (16, 24, 32)}, "local_field_ppm is 16x24x32"),
        ({"local_field_ppm": (0, 1, 16, 24, 32)}, "local_field_ppm is 0x1x16x24x32"),
        ({"voxel_size_mm": (2,)}, "voxel_size_mm is 2, ir2qsm takes 3"),
        ({"mask": (3,)}, "takes local_field_ppm, voxel_size_mm, got shapes of"),
    ],
)
def test_shapes_that_cannot_be(gpu, write, change, message) -> None:
    session = open_device_session(write())
    for ask in (session.output_shape, session.scratch_bytes, session.own_bytes):
        with pytest.raises(EngineError, match=message):
            ask(SHAPES | change)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (status.Fail("CUDA failure 700\nmore"), EngineError, r"failed \(CUDA failure 700\)"),
        (status.EPFail("CUDNN_STATUS_X"), EngineError, r"failed \(CUDNN_STATUS_X\)"),
        (
            status.RuntimeException("Failed to allocate memory for requested buffer of size 9"),
            MemoryLimitError,
            "not enough GPU memory.*smaller patches",
        ),
    ],
)
def test_a_run_that_fails_says_why(gpu, write, buffer, error, expected, message) -> None:
    session = open_device_session(write())
    gpu.raises = error
    with pytest.raises(expected, match=message) as caught:
        run(session, buffer)
    assert "\n" not in str(caught.value)


def test_missing_tensors(gpu, write) -> None:
    inference = open_device_session(write()).open_inference(SHAPES, 0)
    with pytest.raises(EngineError, match=r"the model takes .*got"):
        inference.enqueue({"local_field_ppm": 256}, 512, STREAM)


def test_an_onnx_runtime_for_the_cpu_says_what_to_install(write, driver) -> None:
    with pytest.raises(EngineError, match=r"has no CUDA provider.*pip uninstall -y onnx") as caught:
        open_device_session(write())
    assert caught.value.exit_code == 4


def test_a_provider_that_does_not_start_is_no_reason_to_use_the_cpu(gpu, write, driver) -> None:
    gpu.starts = False
    with pytest.raises(EngineError, match="does not start"):
        open_device_session(write())
    gpu.refuses = RuntimeError("CUDA failure 35: driver is insufficient ; GPU=0\nmore")
    with pytest.raises(EngineError, match=r"does not start \(CUDA failure 35.*pip") as caught:
        open_device_session(write())
    assert "\n" not in str(caught.value)
    assert driver.closed == [OWN_STREAM] * 2


def test_a_model_without_a_card_or_a_broken_one(gpu, write, tmp_path) -> None:
    with pytest.raises(CardError, match="has no model card"):
        open_device_session(write(None))
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x0anothing")
    with pytest.raises(EngineError, match="cannot load it"):
        open_device_session(path)


def test_an_output_of_another_shape_is_refused_where_it_would_be_written(gpu, write, model, buffer):
    model.graph.node[1].output[0] = "full"
    node = helper.make_node("AveragePool", ["full"], ["chi_ppm"], kernel_shape=[2, 2, 2])
    model.graph.node.append(node)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    session = open_device_session(write())
    with pytest.raises(EngineError, match=r"\{2,1,16,24,32\}.*\{2,1,15,23,31\}.*export the model"):
        run(session, buffer)


def test_an_output_of_another_type_is_refused(gpu, write, model) -> None:
    model.graph.node[1].output[0] = "single"
    kind = onnx.TensorProto.DOUBLE
    model.graph.node.append(helper.make_node("Cast", ["single"], ["chi_ppm"], to=kind))
    model.graph.output[0].type.tensor_type.elem_type = kind
    with pytest.raises(EngineError, match=r"chi_ppm is tensor\(double\), expected tensor\(float\)"):
        open_device_session(write())
