"""qsm-run on a made-up GPU: the same maps and reports as on the CPU, and nothing falls back."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import CardError, EngineError, MemoryLimitError, UnservedShapeError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import TASKS, UNITS, GeometryLimits, Task, TensorInfo, Tiles
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.layout import DeviceWorkload
from qsm_deploy.runtime.gpu.network import GpuNetwork
from qsm_deploy.runtime.gpu.session import CopyingWorkload, GpuSession
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstruction.patches import plan_whole
from qsm_deploy.runtime.reconstruction.planning import PatchOptions, decide
from qsm_deploy.runtime.reconstructor import Host, gpu_number, instead_of_gpu
from qsm_deploy.runtime.scan.arrays import scan_from_arrays
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.serve.turns import open_taking_turns
from qsm_deploy.runtime.sessions.onnxruntime import OnnxRuntimeSession


@pytest.fixture
def on_fake_gpu(monkeypatch, fake_device, make_gpu):
    """Let engines be ONNX Runtime's, on the made-up GPU."""
    asked = []

    def open_gpu_sessions(models, number, **how):
        asked.append(number)
        sessions = [OnnxRuntimeSession(model) for model in models]
        return [GpuSession(make_gpu(fake_device, s.card, s.run)) for s in sessions]

    monkeypatch.setattr("qsm_deploy.runtime.gpu.open.open_gpu_sessions", open_gpu_sessions)
    return asked


def run(tmp_path, name, *arguments):
    output, report = tmp_path / f"{name}.nii", tmp_path / f"{name}.report.json"
    code = main([*map(str, arguments), "-o", str(output), "--report", str(report), "-q"])
    assert code == 0
    return nib.load(output).get_fdata(), json.loads(report.read_text())


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--patch", "8", "--overlap", "4"),
        ("--data-consistency", "0.05"),
        ("--data-consistency", "auto", "--patch", "8"),
    ],
)
def test_it_writes_what_the_cpu_writes(
    on_fake_gpu, tmp_path, tkd_card, write_model, write_volume, field, flags
):
    model, volume = write_model(tkd_card), write_volume(field, "field.nii")
    cpu, on_cpu = run(tmp_path, "cpu", model, volume, "--backend", "onnxruntime", *flags)
    gpu, on_gpu = run(tmp_path, "gpu", model, volume, "--device", "cuda:1", *flags)
    assert on_fake_gpu == [1]
    np.testing.assert_allclose(gpu, cpu, atol=1e-6)
    assert on_cpu["backend"]["device"] == "cpu"
    assert on_gpu["backend"] == {
        "name": "tensorrt",
        "version": "0",
        "why": "on GPU 1",
        "device": "cuda:0 (a made-up GPU)",
        "threads": None,
    }
    assert on_gpu["field_residual"] == pytest.approx(on_cpu["field_residual"], rel=1e-4)
    if "--data-consistency" in flags:
        seen, expected = on_gpu["data_consistency"], on_cpu["data_consistency"]
        assert seen["iterations"] == expected.pop("iterations")
        for name, value in expected.items():
            assert seen[name] == pytest.approx(value, rel=1e-4)
    predicted = on_gpu["plan"]["predicted_stage_bytes"]
    assert {"prepare", "inference", "field residual"} <= predicted.keys()


def test_a_resampled_field_comes_back(
    on_fake_gpu, tmp_path, card, write_model, write_volume, field
):
    card = replace(card, geometry=GeometryLimits((1.0, 1.0, 1.0), 0.1, None, None))
    affine = np.diag([1.3, 1.3, 1.3, 1])
    model, volume = write_model(card), write_volume(field, "field.nii", affine)
    flags = ("--data-consistency", "0.1")
    cpu, _ = run(tmp_path, "cpu", model, volume, "--backend", "onnxruntime", *flags)
    gpu, _ = run(tmp_path, "gpu", model, volume, "--device", "cuda:0", *flags)
    assert gpu.shape == field.shape
    np.testing.assert_allclose(gpu, cpu, atol=1e-6)


def test_memory_decides_the_patches(
    on_fake_gpu, tmp_path, fake_device, tkd_card, write_model, write_volume, field, capsys
):
    model, volume = write_model(tkd_card), write_volume(field, "field.nii")
    arguments = [str(model), str(volume), "--device", "cuda:0", "--dry-run", "--json"]
    assert main(arguments) == 0
    whole = json.loads(capsys.readouterr().out)["plan"]
    assert whole["whole_volume"]
    limit = whole["predicted_peak_bytes"]
    assert main([*arguments, "--memory-limit", str(limit - 1)]) in (0, 6)
    fake_device.capacity = 1000
    assert main(arguments) == 6
    assert "would need" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--device", "cuda:0", "--backend", "openvino"), "--backend openvino is for the CPU"),
        (("--device", "cuda:0", "--precision", "bf16"), "--precision bf16 is for the CPU"),
        (("--device", "cuda:0", "--threads", "1"), "--threads 1 is for the CPU"),
        (("--device", "gpu"), "'gpu' is neither auto, cpu nor cuda:N"),
        (("--device", "cuda:x"), "neither auto, cpu nor cuda:N"),
    ],
)
def test_what_cannot_go_together(tmp_path, card, write_model, write_volume, field, flags, text):
    arguments = [str(write_model(card)), str(write_volume(field, "field.nii")), *flags]
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2


def test_who_asks_for_a_gpu_never_gets_the_cpu(
    card, write_model, write_plan, write_volume, field, capsys
):
    volume = write_volume(field, "field.nii")
    for model in (write_model(card), write_plan(card)):
        assert main([str(model), str(volume), "--device", "cuda:0"]) == 4
        error = capsys.readouterr().err
        assert "error:" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(("echoes", "demand"), [(1, DeviceWorkload), (3, CopyingWorkload)])
def test_the_host_runs_every_echo_of_a_phase(fake_device, make_gpu, card, field, echoes, demand):
    phase = replace(card.inputs[0], name="phase_rad", unit="rad")
    made = replace(card, task="phase->chi", inputs=(phase,))
    session = GpuSession(make_gpu(fake_device, made, lambda t: t["phase_rad"]))
    geometry, measured = Geometry(field.shape, (1, 1, 1), (0, 0, 1)), np.stack([field] * echoes)
    whole = np.ones(field.shape, bool)
    scan = Scan(measured, whole, geometry, nib.Nifti1Header(), np.eye(4), quantity="phase_rad")
    assert isinstance(session.workload(scan), demand)


TILES = Tiles((8,) * 3, (4,) * 3, (4,) * 3, "zero", "none")
SEPARATION: Task = "local_field+chi+r2prime->chi_positive+chi_negative"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tiles": TILES}, "runs in tiles of its own, which is not done on a GPU; run it with --d"),
        (
            {"task": SEPARATION},
            "gives 2 maps, which is not done on a GPU; run it with --device cpu",
        ),
        (
            {"pipeline": "nextqsm", "constants": {"iterations": 6.0, "lambda_1": 0.1}},
            "is a part of nextqsm, which is not done on a GPU; run it with --device cpu: a plan",
        ),
    ],
)
def test_what_is_not_done_on_a_gpu_is_refused(fake_device, make_gpu, card, fields, says):
    first, besides, (gives, *further) = TASKS[fields.get("task", card.task)]
    if "pipeline" in fields:
        first = "prior_input"
    made = replace(
        card,
        patchable="no",
        why_whole="so it is",
        inputs=tuple(TensorInfo(n, UNITS[n], card.output.shape) for n in (first, *besides)),
        output=replace(card.output, name=gives),
        further_outputs=tuple(replace(card.output, name=n) for n in further),
        **fields,
    )
    session = GpuSession(make_gpu(fake_device, made, lambda t: t[first]))
    with pytest.raises(EngineError, match=f"twice {says}"):
        GpuNetwork(session, Path("network.plan"))


def test_where_models_run(tmp_path, monkeypatch):
    plan, onnx = tmp_path / "a.plan", tmp_path / "b.onnx"
    missing: list[str | None] = [None, None, "no driver"]
    monkeypatch.setattr("qsm_deploy.runtime.gpu.open.missing_gpu", missing.pop)
    assert gpu_number("auto", [plan]) is None
    assert gpu_number("auto", [onnx]) is None
    assert gpu_number("auto", [onnx, plan]) == 0
    assert instead_of_gpu("auto", [plan]) is None
    assert gpu_number("cpu", [plan]) is None
    assert gpu_number("cuda:3", [onnx]) == 3
    assert gpu_number("cpu", [onnx]) is None


class TestCalls:
    """Engines that the host calls patch by patch."""

    @pytest.fixture
    def session(self, fake_device, make_gpu, card):
        session = GpuSession(make_gpu(fake_device, card, lambda t: 3 * t["local_field_ppm"]))
        yield session
        session.close()
        assert not any(fake_device.held().values())

    def test_tensors_go_there_and_back(self, session):
        for shape in ((1, 1, 8, 8, 8), (2, 1, 8, 8, 8), (1, 1, 4, 12, 8)):
            field = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            output = session.run({"local_field_ppm": field[:1]})
            np.testing.assert_array_equal(output, 3 * field[:1])

    def test_what_a_shape_needs_is_kept_for_the_next(self, session, fake_device):
        field = np.ones((1, 1, 8, 8, 8), np.float32)
        session.run({"local_field_ppm": field})
        made = fake_device.next
        session.run({"local_field_ppm": 2 * field})
        assert fake_device.next == made  # no stream, no event, no graph more
        assert fake_device.held()["streams"] == 1

    def test_too_little_memory_leaves_nothing(self, session, fake_device):
        fake_device.capacity = 5000
        with pytest.raises(MemoryLimitError):
            session.run({"local_field_ppm": np.ones((1, 1, 8, 8, 8), np.float32)})
        assert not any(fake_device.held().values())

    def test_its_memory_is_known(self, session, fake_device, card):
        field = np.zeros((1, 16, 16, 16), np.float32)
        mask = np.ones((16, 16, 16), bool)
        scan = Scan(field, mask, Geometry(mask.shape), nib.Nifti1Header(), np.eye(4))
        work = CopyingWorkload(scan, session.gpu.session)
        predicted = work.peak_bytes(plan_whole(mask.shape, 4))["inference"]
        session.run({"local_field_ppm": field[None]})
        assert fake_device.peak_bytes + session.gpu.session.weights_bytes == predicted


class TestWhatAnEngineServes:
    """A plan is built for some shapes only."""

    def workload(self, gpu, edge):
        random = np.random.default_rng(1)
        field = random.normal(0, 0.02, (1, edge, edge, edge)).astype(np.float32)
        mask = np.ones((edge, edge, edge), bool)
        scan = Scan(field, mask, Geometry(mask.shape), nib.Nifti1Header(), np.eye(4))
        return DeviceWorkload(scan, gpu.session, gpu.library, None, False)

    def test_larger_volumes_run_in_patches(self, fake_device, make_gpu, card):
        gpu = make_gpu(fake_device, card, lambda t: t["local_field_ppm"])
        gpu.session.largest = 20
        decision = decide(self.workload(gpu, 40), PatchOptions(), 1e12)
        assert max(decision.plan.patch_shape) == 20
        assert "is not served" in decision.reason

    def test_what_no_patch_can_serve_is_said(self, fake_device, make_gpu, card):
        gpu = make_gpu(fake_device, card, lambda t: t["local_field_ppm"])
        gpu.session.largest = 4
        with pytest.raises(UnservedShapeError, match="up to 4 is"):
            decide(self.workload(gpu, 40), PatchOptions(), 1e12)

    def test_memory_that_nobody_knows_is_said(self, fake_device, make_gpu, card):
        gpu = make_gpu(fake_device, card, lambda t: t["local_field_ppm"])
        gpu.session.own = None
        with pytest.raises(CardError, match="no memory measurements"):
            decide(self.workload(gpu, 16), PatchOptions(), 1e12)
        gpu.session.own = 10**9
        assert decide(self.workload(gpu, 16), PatchOptions(), 1e12).peak_bytes > 10**9


def test_the_server_reconstructs_on_a_gpu_in_one_thread(
    on_fake_gpu, fake_device, tkd_card, write_model, field, monkeypatch
):
    """The made-up GPU, like a real one, belongs to the thread that opened it."""
    threads = []
    copy_in = fake_device.copy_in

    def noting(*arguments):
        threads.append(threading.get_ident())
        copy_in(*arguments)

    monkeypatch.setattr(fake_device, "copy_in", noting)
    step = Wants(correction=Correction(0.05))
    turns = open_taking_turns(
        [write_model(tkd_card)], Host(device="cuda:1"), step, warm_up_voxels=16
    )
    scan = scan_from_arrays(field, None, voxel_size_mm=(1, 1, 2), b0_direction=(0, 0, 1))
    with ThreadPoolExecutor(2) as clients:
        maps = list(clients.map(lambda _: turns.make(scan, Stages()).map_ppm, range(2)))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
    cpu = open_taking_turns([write_model(tkd_card)], Host("onnxruntime"), step, warm_up_voxels=16)
    expected = cpu.make(scan, Stages()).map_ppm
    assert np.abs(expected).max() > 0.001
    for chi in maps:
        assert np.linalg.norm(chi - expected) < 1e-5 * np.linalg.norm(expected)
