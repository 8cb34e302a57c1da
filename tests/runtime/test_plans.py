"""Plans where there is no GPU: the graph inside runs on the CPU, and one line says so."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx.parser
import pytest

import qsm_deploy.runtime as qsm
from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.plan_file import FORM, PROMISE, plan_bytes
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.embedding import open_engine
from qsm_deploy.runtime.gpu.open import missing_gpu
from qsm_deploy.runtime.reconstructor import Host
from qsm_deploy.runtime.serve.turns import open_taking_turns
from qsm_deploy.runtime.sessions.open import open_session
from qsm_deploy.runtime.sessions.session import BACKENDS

NO_GPU = "this machine has no NVIDIA driver"


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch) -> None:
    monkeypatch.setattr("qsm_deploy.runtime.gpu.open.missing_gpu", lambda: NO_GPU)


def run(folder: Path, *arguments: str | Path) -> tuple[np.ndarray, dict]:
    output = folder / "chi.nii"
    code = main([*map(str, arguments), "-o", str(output), "--force"])
    assert code == 0
    return nib.load(output).get_fdata(), json.loads((folder / "chi.json").read_text())


@pytest.mark.parametrize("backend", ["auto", "openvino", "onnxruntime"])
@pytest.mark.parametrize("flags", [(), ("--patch", "12", "--overlap", "4")])
def test_the_map_is_that_of_the_onnx_file(
    tmp_path, card, write_model, write_plan, write_volume, field, capsys, backend, flags
) -> None:
    card = replace(card, precision="fp16")
    plan, model, volume = write_plan(card), write_model(card), write_volume(field, "field.nii")
    flags = (*flags, "--backend", backend)
    expected, _ = run(tmp_path, model, volume, *flags)
    assert NO_GPU not in capsys.readouterr().err
    chi, sidecar = run(tmp_path, plan, volume, *flags)
    np.testing.assert_array_equal(chi, expected)
    (note,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(f"note: {plan}")
    ]
    library = "openvino" if backend == "auto" else backend
    assert note == (
        f"note: {plan}: {NO_GPU}; its fp16 graph runs on the CPU instead, in {library}, "
        "computed in fp32"
    )
    assert sidecar["backend"]["name"] == library
    assert sidecar["backend"]["device"] == "cpu"
    assert sidecar["backend"]["missing_gpu"] == NO_GPU
    assert sidecar["model"]["file"] == plan.name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_does_not_use_an_input_runs_as_its_file(tmp_path, tkd_card, backend) -> None:
    volumes = ", ".join(f"float[1, 1, x, y, z] {tensor.name}" for tensor in tkd_card.inputs)
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g ({volumes}) => (float[1, 1, x, y, z] chi_ppm) '
        "{ chi_ppm = Neg (local_field_ppm) }"
    )
    engine = replace(tkd_card, options={PROMISE: f"{FORM}"}).to_json().encode()
    path = tmp_path / "unused.plan"
    path.write_bytes(plan_bytes(engine, with_card(model, tkd_card)))
    session = open_session(path, backend)
    assert session.card == tkd_card
    field = np.ones((1, 1, 8, 8, 8), np.float32)
    feeds = {tensor.name: field for tensor in tkd_card.inputs}
    np.testing.assert_array_equal(session.run(feeds), -field)


def test_who_asks_for_the_cpu_is_told_nothing(
    tmp_path, card, write_plan, write_volume, field, capsys
) -> None:
    chi, sidecar = run(tmp_path, write_plan(card), write_volume(field, "f.nii"), "--device", "cpu")
    assert np.ptp(chi) > 0
    assert NO_GPU not in capsys.readouterr().err
    assert "missing_gpu" not in sidecar["backend"]


def test_the_memory_limit_is_that_of_the_process(card, write_plan, write_volume, field) -> None:
    plan, volume = write_plan(card), write_volume(field, "field.nii")
    assert main([str(plan), str(volume), "--memory-limit", "1M"]) == 6


def test_in_python(card, write_plan, write_model, field) -> None:
    grid = {"voxel_size_mm": (1, 1, 1), "b0_direction": (0, 0, 1)}
    with pytest.warns(UserWarning, match=NO_GPU):
        model = qsm.open_model(write_plan(card))
    expected = qsm.open_model(write_model(card)).reconstruct(field, **grid)
    np.testing.assert_array_equal(model.reconstruct(field, **grid), expected)


def test_a_server_takes_it(card, write_plan, capsys) -> None:
    opened = open_taking_turns([write_plan(card)], Host(), warm_up_voxels=12)
    assert opened.name.startswith("twice")
    assert NO_GPU in capsys.readouterr().err


def test_a_gpu_s_interface_does_not(card, write_plan) -> None:
    if missing_gpu() is None:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=NO_GPU):
        open_engine(write_plan(card))


def test_what_is_missing_is_what_the_machine_says() -> None:
    if (said := missing_gpu()) is None:
        pytest.skip("there is a GPU")
    assert "driver" in said
    assert "\n" not in said
