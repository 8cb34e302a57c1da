"""Plans on a GPU, through a TensorRT that forbids what the documentation forbids."""

import gc
import sys
from dataclasses import replace

import numpy as np
import pytest

from qsm_deploy.kernels.errors import (
    CardError,
    DataError,
    EngineError,
    MissingDependencyError,
    QsmDeployError,
    UnservedShapeError,
)
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.gpu.engines.inference import DeviceSession
from qsm_deploy.runtime.gpu.open import open_device_session

SHAPES = {"local_field_ppm": (2, 1, 16, 24, 32), "voxel_size_mm": (3,)}
VOXELS = 2 * 16 * 24 * 32
STREAM = 0x7FFF00000400
LIBRARY = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def engine(request, install, driver) -> str:
    install(LIBRARY[request.param])
    if request.param == "tensorrt-rtx":  # which does not serve the first GPU as it is
        driver.gpus[0] = replace(driver.gpus[0], capability=(8, 9))
    return request.param


@pytest.fixture
def session(engine, build) -> DeviceSession:
    return open_device_session(build(engine))


def one_line(error: QsmDeployError) -> str:
    text = str(error)
    assert "\n" not in text
    assert error.exit_code == 4
    return text


def infer(session: DeviceSession, buffer) -> np.ndarray:
    scratch, _ = buffer(session.scratch_bytes(SHAPES) // 4)
    inference = session.open_inference(SHAPES, scratch)
    field, values = buffer(VOXELS)
    size, _ = buffer(64)
    output, made = buffer(VOXELS)
    values[:] = np.arange(VOXELS)
    inference.enqueue({"local_field_ppm": field, "voxel_size_mm": size}, output, STREAM)
    return made


def test_it_runs_in_the_caller_s_memory_and_stream(session, buffer, engine, levers, driver) -> None:
    assert session.output_shape(SHAPES) == (2, 1, 16, 24, 32)
    assert session.scratch_bytes(SHAPES) == 8 * VOXELS
    assert session.own_bytes(SHAPES) == 0
    np.testing.assert_array_equal(infer(session, buffer), 2.0 * np.arange(VOXELS))
    assert [run["stream"] for run in levers.runs] == [STREAM]
    assert levers.runs[0]["memory"][1] == 8 * VOXELS
    assert (session.backend, session.device) == (engine, 0)
    assert session.capturable == (engine == "tensorrt")
    assert session.card.options["engine"] == f"{engine} {session.version}"
    assert driver.current == [0]


def test_contexts_do_not_share_memory(session, buffer, levers) -> None:
    size = session.scratch_bytes(SHAPES)
    scratches = [buffer(size // 4) for _ in range(2)]
    inferences = [session.open_inference(SHAPES, address) for address, _ in scratches]
    (field, _), (output, _), (sizes, _) = buffer(VOXELS), buffer(VOXELS), buffer(64)
    for inference in inferences:
        inference.enqueue({"local_field_ppm": field, "voxel_size_mm": sizes}, output, STREAM)
    assert [run["memory"] for run in levers.runs] == [(at, size) for at, _ in scratches]
    assert levers.contexts == 3  # one is only asked


def test_the_first_versions_of_tensorrt_10_are_given_memory_without_a_size(
    levers, install, build, buffer
) -> None:
    levers.fails.add("old")
    install("tensorrt", "10.0.1")
    session = open_device_session(build())
    np.testing.assert_array_equal(infer(session, buffer), 2.0 * np.arange(VOXELS))


def test_the_weights_are_the_plan(session, engine, tmp_path) -> None:
    assert session.weights_bytes == (tmp_path / "x.plan").stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_field_ppm": (1, 1, 16, 16, 72)}, r"of 1x1x16x16x72 is not served.*--shapes"),
        ({"local_field_ppm": (1, 1, 8, 16, 16)}, r"only 1x1x16x16x16 to 4x1x64x64x64; rebuild"),
        ({"local_field_ppm": (1, 1, 16, 16, 65)}, "sizes are multiples of 8"),
        ({"local_field_ppm": (5, 1, 16, 16, 16)}, r"give it \(1, 1\) to \(4, 1\) volumes"),
        ({"local_field_ppm": (1, 2, 16, 16, 16)}, r"give it \(1, 1\) to \(4, 1\) volumes"),
        ({"local_field_ppm": (16, 16, 16)}, "has 5 axes, got 16x16x16"),
        ({"voxel_size_mm": (4,)}, "voxel_size_mm of 4 is not served, only 3 to 3"),
        ({"tv_chi_ppm": (1,)}, "takes local_field_ppm, voxel_size_mm, got shapes of"),
    ],
)
def test_shapes_outside_the_plan(session, change, message) -> None:
    for ask in (session.output_shape, session.scratch_bytes):
        with pytest.raises(EngineError, match=message) as caught:
            ask(SHAPES | change)
        one_line(caught.value)
        assert isinstance(caught.value, UnservedShapeError) == ("not served" in str(caught.value))


def test_the_way_to_a_plan_for_a_shape_is_a_command(session, engine) -> None:
    with pytest.raises(EngineError) as caught:
        session.scratch_bytes(SHAPES | {"local_field_ppm": (1, 1, 8, 64, 128)})
    command = one_line(caught.value).split("rebuild it with: ")[1]
    assert command == (
        f"qsm-export --model ir2qsm --weights FILE -o x.plan --engine {engine} --residual input "
        "--shapes 8x16x16,32x32x32,64x64x128 --force"
    )


@pytest.mark.parametrize(
    ("lever", "message"),
    [
        ("context", "cannot make a context: createExecutionContext: out of memory"),
        ("profile", "cannot take the plan's shapes"),
        ("input shape", "refuses local_field_ppm"),
    ],
)
def test_a_context_that_is_refused(session, levers, lever, message) -> None:
    session.scratch_bytes(SHAPES)
    levers.fails.add(lever)
    with pytest.raises(EngineError, match=message) as caught:
        session.open_inference(SHAPES, 256)
    one_line(caught.value)


def test_an_output_of_unknown_shape(session, levers) -> None:
    levers.fails.add("output shape")
    with pytest.raises(EngineError, match="cannot tell the output's shape"):
        session.output_shape(SHAPES)


def test_an_output_of_another_shape_than_the_card_says(session) -> None:
    output = replace(session.card.output, shape=("n", 3, "x", "y", "z"))
    session.card = replace(session.card, output=output)
    with pytest.raises(
        EngineError, match="gives 2x1x16x24x32, its card says 2x3x16x24x32"
    ) as caught:
        session.output_shape(SHAPES)
    one_line(caught.value)


def test_memory_that_was_not_promised_is_not_written_to(session, levers) -> None:
    levers.fails.add("grows")
    with pytest.raises(EngineError, match=r"now wants \d+ bytes of scratch, before \d+"):
        session.open_inference(SHAPES, 256)


@pytest.mark.parametrize("scratch", [0, 4096 + 4])
def test_scratch_memory_that_cannot_be(session, scratch) -> None:
    with pytest.raises(EngineError, match=f"at a multiple of 256|is at {scratch:#x}"):
        session.open_inference(SHAPES, scratch)


def test_tensors_that_cannot_be(session, buffer, levers) -> None:
    inference = session.open_inference(SHAPES, 256)
    pointers = {"local_field_ppm": 512, "voxel_size_mm": 1024}
    with pytest.raises(EngineError, match=r"takes .'local_field_ppm', 'voxel_size_mm'.*got"):
        inference.enqueue({"local_field_ppm": 512}, 2048, STREAM)
    for wrong in (0, 2052):
        with pytest.raises(EngineError, match=f"chi_ppm is at {wrong:#x}"):
            inference.enqueue(pointers, wrong, STREAM)
    levers.fails.add("address")
    with pytest.raises(EngineError, match="refuses the address of local_field_ppm: setTensor"):
        inference.enqueue(pointers, 2048, STREAM)


def test_a_run_that_fails_says_why(session, buffer, levers) -> None:
    levers.fails.add("execute")
    with pytest.raises(EngineError, match="cannot run the plan: enqueueV3: not everything"):
        infer(session, buffer)


def test_an_error_of_before_is_not_the_reason(session, buffer, levers) -> None:
    levers.fails.add("address")
    inference = session.open_inference(SHAPES, 256)
    session.log.messages.append("an error that harmed nobody")
    with pytest.raises(EngineError, match="local_field_ppm: setTensorAddress"):
        inference.enqueue({"local_field_ppm": 512, "voxel_size_mm": 1024}, 2048, STREAM)


def test_nothing_runs_after_the_end(session) -> None:
    inference = session.open_inference(SHAPES, 256)
    session.close()
    gc.collect()
    with pytest.raises(EngineError, match="closed with its session"):
        inference.enqueue({}, 256, STREAM)
    with pytest.raises(EngineError, match="session was closed"):
        session.scratch_bytes(SHAPES)


@pytest.mark.parametrize("kept", [0, 30, 500, -1])
def test_a_plan_that_is_cut_off(engine, build, kept) -> None:
    path = build(engine)
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(EngineError, match=r"x\.plan.*truncated") as caught:
        open_device_session(path)
    if kept == -1:
        assert "magic tag does not match more" in one_line(caught.value)
        assert "rebuild it with: qsm-export --model ir2qsm" in one_line(caught.value)


def test_a_plan_without_a_card(engine, build) -> None:
    path = build(engine)
    path.write_bytes(path.read_bytes().replace(b'{"constants":', b'{"constance":'))
    with pytest.raises(CardError, match="has no whole model card") as caught:
        open_device_session(path)
    one_line(caught.value)


def test_a_plan_whose_card_does_not_say_what_it_is_for(engine, build, stand_in_module) -> None:
    path = build(engine)
    header, card = stand_in_module.from_bytes(path.read_bytes())
    for wrong in (card.replace("sm_", "sn_"), card.replace(f'"{engine} ', '"trt ')):
        path.write_bytes(stand_in_module.as_bytes(header, wrong))
        with pytest.raises(CardError, match="does not say which engine and GPU") as caught:
            open_device_session(path)
        one_line(caught.value)


def test_a_plan_that_contradicts_its_card(engine, build, stand_in_module, monkeypatch) -> None:
    path = build(engine)
    header, card = stand_in_module.from_bytes(path.read_bytes())
    changed = header | {"inputs": ["phase_rad", "voxel_size_mm"]}
    changed["kinds"] = header["kinds"] | {"phase_rad": "FLOAT"}
    path.write_bytes(stand_in_module.as_bytes(changed, card))
    with pytest.raises(CardError, match="contradicts the graph"):
        open_device_session(path)
    halves = header | {"kinds": header["kinds"] | {"chi_ppm": "HALF"}}
    path.write_bytes(stand_in_module.as_bytes(halves, card))
    with pytest.raises(EngineError, match=r"chi_ppm is .*HALF, expected float32"):
        open_device_session(path)
    path.write_bytes(stand_in_module.as_bytes(header, card))
    other = card.replace('"network":"ir2qsm"', '"network":"xqsm"')
    monkeypatch.setattr(stand_in_module, "from_bytes", lambda data: (header, other))
    with pytest.raises(CardError, match="two cards that differ"):
        open_device_session(path)


def test_another_version(engine, build, install) -> None:
    path = build(engine)
    install(LIBRARY[engine], "12.0.0.1")
    with pytest.raises(EngineError) as caught:
        open_device_session(path)
    text = one_line(caught.value)
    assert f"it was built for {engine} 1" in text
    assert "this is 12.0.0.1; rebuild it here with: qsm-export" in text


@pytest.mark.parametrize(
    ("version", "runs"),
    [("11.4.0.106", True), ("11.5.0.1", True), ("11.3.9.9", False), ("12.0", False)],
)
def test_a_version_compatible_plan_runs_in_later_ones(install, build, version, runs) -> None:
    install()
    path = build(version_compatible=True)
    install(version=version)
    if runs:
        assert open_device_session(path).version == version
    else:
        with pytest.raises(EngineError, match="or a later one of that major version") as caught:
            open_device_session(path)
        assert "--version-compatible --force" in one_line(caught.value)


@pytest.mark.parametrize(
    ("choices", "gpus"),
    [
        ({}, (0,)),
        ({"hardware_compatible": "same-capability"}, (0, 2)),
        ({"hardware_compatible": "ampere-plus"}, (0, 1, 2)),
    ],
)
def test_a_plan_runs_on_the_gpus_that_it_was_built_for(
    install, build, driver, choices, gpus
) -> None:
    install()
    driver.gpus.append(replace(driver.gpus[0], number=2, name="NVIDIA Made-up 200"))
    driver.gpus.append(replace(driver.gpus[0], number=3, name="Old", capability=(7, 5)))
    path = build(**choices)
    for number, gpu in enumerate(driver.gpus):
        if number in gpus:
            assert open_device_session(path, number).device == number
            continue
        with pytest.raises(EngineError) as caught:
            open_device_session(path, number)
        text = one_line(caught.value)
        assert f"built for the GPU sm_{'80+' if len(gpus) == 3 else '90'}" in text
        assert f"GPU {number} is {gpu}; rebuild it here with" in text


def test_a_plan_of_the_other_flavour_asks_for_that_gpu_s_capability(install, build, driver) -> None:
    install("tensorrt_rtx")
    path = build("tensorrt-rtx", compute_capability=("8.9", "12.0"))
    assert open_device_session(path, 1).card.options["gpu"] == "sm_89,sm_120"
    driver.gpus[0] = replace(driver.gpus[0], capability=(8, 6))
    with pytest.raises(EngineError, match=r"GPU 0 is sm_86 .*--compute-capability 8\.6 --force"):
        open_device_session(path, 0)
    driver.gpus[0] = replace(driver.gpus[0], capability=(13, 0))
    with pytest.raises(EngineError, match=r"GPU 0 is sm_130 .*32x32x32,64x64x64 --force"):
        open_device_session(path, 0)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (7, 0)])
def test_a_gpu_that_a_flavour_never_serves_is_refused_before_loading(
    install, build, driver, levers, capability
) -> None:
    install("tensorrt_rtx")
    path = build("tensorrt-rtx")
    driver.gpus[0] = replace(driver.gpus[0], capability=capability)
    levers.fails.add("start")
    with pytest.raises(EngineError) as caught:
        open_device_session(path)
    text = one_line(caught.value)
    here = str(driver.gpus[0])
    assert f"built for the GPU sm_80,sm_86,sm_89,sm_120,sm_121+, GPU 0 is {here}, which" in text
    assert "tensorrt-rtx does not serve; rebuild it here with: qsm-export" in text
    assert "--engine tensorrt --residual" in text


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1), (13, 0)])
def test_by_default_a_plan_of_the_other_flavour_runs_on_all_that_it_serves(
    install, build, driver, capability
) -> None:
    install("tensorrt_rtx")
    driver.gpus[0] = replace(driver.gpus[0], capability=capability)
    assert open_device_session(build("tensorrt-rtx")).device == 0


def test_a_plan_that_the_library_refuses_for_its_gpu_is_not_called_damaged(
    engine, build, levers, driver
) -> None:
    driver.gpus[0] = replace(driver.gpus[0], capability=(8, 9))
    path = build(engine)
    levers.fails.add("other GPU")
    with pytest.raises(EngineError, match="cannot run on this GPU") as caught:
        open_device_session(path)
    assert "damaged" not in one_line(caught.value)


def test_a_gpu_that_is_not_there(engine, build) -> None:
    with pytest.raises(EngineError, match="no GPU 7"):
        open_device_session(build(engine), 7)


def test_a_library_that_is_not_installed(engine, build, monkeypatch) -> None:
    path = build(engine)
    monkeypatch.setitem(sys.modules, LIBRARY[engine], None)
    with pytest.raises(MissingDependencyError, match=rf"\.\[{engine}\]") as caught:
        open_device_session(path)
    assert one_line(caught.value).startswith(str(path))


def test_a_library_that_cannot_start(engine, build, levers) -> None:
    path = build(engine)
    levers.fails.add("start")
    with pytest.raises(EngineError, match="cannot start here: CUDA initialization failure"):
        open_device_session(path)


def test_a_file_that_is_missing_or_something_else(tmp_path) -> None:
    with pytest.raises(DataError, match="no such model file"):
        open_device_session(tmp_path / "none.plan")
    (tmp_path / "x.engine").touch()
    with pytest.raises(EngineError, match=r"neither a .plan nor an .onnx file"):
        open_device_session(tmp_path / "x.engine")


def test_without_a_driver_nothing_is_loaded(engine, build, monkeypatch) -> None:
    path = build(engine)
    assert load_card(path).network == "ir2qsm"
    monkeypatch.undo()
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="no cuda-bindings")
    no_driver = (cudart.cudaError_t.cudaErrorInsufficientDriver, None)
    monkeypatch.setattr(cudart, "cudaGetDeviceCount", lambda: no_driver)
    with pytest.raises(EngineError, match="no NVIDIA driver") as caught:
        open_device_session(path)
    one_line(caught.value)
