"""What ``qsm-export --triton`` writes, and that the model in it is ``qsm.reconstruct``."""

import importlib.util
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qsm_deploy.runtime as qsm
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.cli import main
from qsm_deploy.export.triton.configuration import inputs_of, model_name, outputs_of
from qsm_deploy.export.triton.repository import SERVED, write_repository
from qsm_deploy.kernels.errors import DataError, EngineError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import TASKS
from qsm_deploy.runtime.card.plan_file import FORM, PROMISE, plan_bytes
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.reconstruction.inversion import needs_of
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL
from tests.export.triton.stand_in import Served, TritonError, read_config

FILES = ("README.md", "models/{}/1/model.py", "models/{}/config.pbtxt", "probe.py", "start.sh")
GRID = Geometry((24, 21, 18), (1.0, 0.9, 1.3), (0.0, 0.2, 0.98))


@pytest.fixture(scope="module")
def head() -> Any:
    return head_phantom(GRID, seed=3)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository of the bundled network."""
    folder = tmp_path_factory.mktemp("triton") / "serve"
    write_repository(folder, [BUNDLED_MODEL], force=False)
    return folder


@pytest.fixture
def served(unet: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(unet / "models" / "qsm_tv_unet", monkeypatch)


def tensors(head: Any) -> dict[str, np.ndarray]:
    return {
        "FIELD_PPM": head.local_field_ppm,
        "MASK": head.mask.astype(np.uint8),
        "VOXEL_SIZE_MM": np.array(GRID.voxel_size_mm),
        "B0_DIRECTION": np.array(GRID.b0_direction),
    }


def probe_tensors(served: Served) -> dict[str, list[Any]]:
    """Return what the probe would send."""
    spec = importlib.util.spec_from_file_location("probe", SERVED / "probe.py")
    assert spec is not None
    assert spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    found = {}
    for one in served.config["input"]:
        if not one["optional"]:
            shape = probe.shape_of(one["dims"])
            values = np.fromiter(probe.values(one["name"], shape), np.float64, np.prod(shape))
            found[one["name"]] = values.reshape(shape).tolist()
    return found


def test_the_map_is_that_of_reconstruct_bit_for_bit(served: Served, head: Any) -> None:
    grid: Any = {"voxel_size_mm": GRID.voxel_size_mm, "b0_direction": GRID.b0_direction}
    expected = qsm.reconstruct(
        head.local_field_ppm, head.mask, **grid, method="tv-unet", device="cpu"
    )
    answer = served(**tensors(head))
    np.testing.assert_array_equal(answer.get("CHI_PPM"), expected)
    assert answer.notes == ""
    assert served.counts["qsm_scans_total", "qsm_tv_unet", "made"] == 1
    assert served.counts["qsm_voxels_total", "qsm_tv_unet"] == head.mask.size
    assert served.counts["qsm_seconds_total", "qsm_tv_unet"] > 0
    served.model.finalize()


def test_an_affine_turns_the_head_and_what_contradicts_it_is_a_note(
    served: Served, head: Any
) -> None:
    affine = np.diag([-1.0, -0.9, 1.3, 1.0])
    grid: Any = {"voxel_size_mm": GRID.voxel_size_mm, "b0_direction": GRID.b0_direction}
    with pytest.warns(UserWarning, match="B0 direction") as said:
        expected = qsm.reconstruct(
            head.local_field_ppm, head.mask, **grid, axes=affine, method="tv-unet", device="cpu"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the model keeps them to itself
        answer = served(**tensors(head), AXES=affine)
    np.testing.assert_array_equal(answer.get("CHI_PPM"), expected)
    assert answer.notes == "\n".join(str(note.message) for note in said)


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({"MASK": np.ones((9, 9, 9), np.uint8)}, TritonError.INVALID_ARG, "the mask"),
        ({"B0_DIRECTION": np.zeros(3)}, TritonError.INVALID_ARG, "B0"),
        ({"FIELD_PPM": np.full(GRID.shape, 900, np.float32)}, TritonError.INVALID_ARG, "labels"),
        (
            {"FIELD_PPM": np.broadcast_to(np.float32(0.01), GRID.shape)},
            TritonError.INTERNAL,
            "numpy<2",
        ),
        ({"FIELD_PPM": np.zeros(GRID.shape, np.float32).T}, TritonError.INTERNAL, "numpy<2"),
    ],
)
def test_what_cannot_be_right_is_refused_with_its_sentence(
    served: Served, head: Any, change: dict[str, np.ndarray], code: int, reason: str
) -> None:
    error = served(**tensors(head) | change).error
    assert error is not None
    assert error.code == code
    assert reason in str(error)
    outcome = "refused" if code == TritonError.INVALID_ARG else "failed"
    assert served.counts == {("qsm_scans_total", "qsm_tv_unet", outcome): 1}


@pytest.mark.parametrize("name", ["FIELD_PPM", "B0_DIRECTION"])
def test_an_array_that_numpy_misread_is_refused(served: Served, head: Any, name: str) -> None:
    error = served(**tensors(head), misread=name).error
    assert error is not None
    assert error.code == TritonError.INTERNAL
    assert str(error).startswith(f"{name} did not arrive as it was sent")


def test_memory_bugs_and_cancelled_calls(unet: Path, head: Any, monkeypatch) -> None:
    folder = unet / "models" / "qsm_tv_unet"
    small = Served(folder, monkeypatch, memory_limit="2M")
    error = small(**tensors(head)).error
    assert error is not None
    assert error.code == TritonError.UNAVAILABLE
    assert "2" in str(error)

    def break_down(*given: object, **more: object) -> None:
        raise ZeroDivisionError("of course")

    monkeypatch.setattr(small.model.model, "reconstruct", break_down)
    error = small(**tensors(head), cancelled=True).error
    assert error is not None
    assert error.code == TritonError.CANCELLED
    error = small(**tensors(head)).error
    assert error is not None
    assert error.code == TritonError.INTERNAL
    assert str(error) == "ZeroDivisionError: of course"


def test_another_file_than_was_exported_is_not_opened(tmp_path: Path, monkeypatch) -> None:
    write_repository(tmp_path / "serve", [BUNDLED_MODEL], force=False)
    folder = tmp_path / "serve" / "models" / "qsm_tv_unet"
    model = folder / "1" / "tv-unet.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(EngineError, match="SHA-256"):
        Served(folder, monkeypatch)


def test_parameters_reach_what_they_are_for(unet: Path, monkeypatch) -> None:
    opened: list[dict[str, Any]] = []

    opened_for_real = qsm.open_model(method="tv")

    def open_model(models: object, **how: Any) -> Any:
        opened.append(how)
        return opened_for_real

    folder = unet / "models" / "qsm_tv_unet"
    with monkeypatch.context() as patch:
        patch.setattr(qsm, "open_model", open_model, raising=False)
        said = {"threads": "2", "backend": "openvino", "patch": "64", "data_consistency": "auto"}
        served = Served(folder, patch, kind="GPU", **said)
    assert opened == [{"device": "cuda:1", "threads": 2, "backend": "openvino"}]
    assert served.model.wanted == {"patch": 64, "data_consistency": "auto"}
    with pytest.raises(UsageError, match="not a size"):
        Served(folder, monkeypatch, memory_limit="much")


@pytest.mark.parametrize("method", ["tv", "tkd", "tikhonov", "medi", "cosmos"])
def test_methods_are_served_and_the_probe_reaches_them(
    method: str, tmp_path: Path, monkeypatch
) -> None:
    made = write_repository(tmp_path / "serve", Method(method), force=False)
    assert made.name == f"qsm_{method}"
    served = Served(tmp_path / "serve" / "models" / made.name, monkeypatch)
    sent = probe_tensors(served)
    answer = served(**sent)
    assert answer.error is None, answer.error
    field, mask = np.array(sent.pop("FIELD_PPM"), np.float32), np.array(sent.pop("MASK"))
    said = {name.lower(): value for name, value in sent.items()}
    model = qsm.open_model(method=method, device="cpu")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        expected = model.reconstruct(field, mask, **said)
    np.testing.assert_array_equal(answer.get("CHI_PPM"), expected)
    assert answer.notes == "\n".join(str(note.message) for note in notes)
    assert ("MAGNITUDE" in sent) == (method == "medi")
    assert field.ndim == (4 if method == "cosmos" else 3)


def test_what_is_said_to_a_method_stays(tmp_path: Path, monkeypatch) -> None:
    write_repository(tmp_path / "serve", Method("tkd", threshold=0.3), force=False)
    served = Served(tmp_path / "serve" / "models" / "qsm_tkd", monkeypatch)
    sent = probe_tensors(served)
    field, mask = np.array(sent["FIELD_PPM"], np.float32), np.array(sent["MASK"])
    grid: Any = {"voxel_size_mm": (1, 1, 1), "b0_direction": (0, 0, 1)}
    maps = [
        qsm.reconstruct(field, mask, **grid, method="tkd", threshold=t, device="cpu")
        for t in (0.3, 0.1)
    ]
    np.testing.assert_array_equal(served(**sent).get("CHI_PPM"), maps[0])
    assert not np.array_equal(*maps)


def test_a_plan_asks_for_a_gpu_and_its_graph_runs_on_the_cpu(
    tmp_path: Path, head: Any, monkeypatch
) -> None:
    plan = tmp_path / "unet.plan"
    card = replace(load_card(BUNDLED_MODEL), options={PROMISE: f"{FORM}"})
    plan.write_bytes(plan_bytes(card.to_json().encode(), BUNDLED_MODEL.read_bytes()))
    write_repository(tmp_path / "serve", [plan], force=False)
    folder = tmp_path / "serve" / "models" / "qsm_tv_unet"
    served = Served(folder, monkeypatch)
    assert served.config["instance_group"] == [{"kind": "KIND_GPU"}]
    assert (folder / "1" / "tv-unet.plan").read_bytes() == plan.read_bytes()
    grid: Any = {"voxel_size_mm": GRID.voxel_size_mm, "b0_direction": GRID.b0_direction}
    expected = qsm.reconstruct(head.local_field_ppm, head.mask, **grid, method="tv-unet")
    np.testing.assert_array_equal(served(**tensors(head)).get("CHI_PPM"), expected)


def test_tensors_follow_what_a_network_takes_and_gives() -> None:
    needs = needs_of(load_card(BUNDLED_MODEL))

    def told(task: str, counts: range) -> dict[str, tuple[int, ...]]:
        quantity, maps, gives = TASKS[task]  # type: ignore[index]
        asked: Any = {"quantity": quantity, "maps": maps, "gives": gives}
        of_task = replace(needs, field_counts=counts, **asked)
        found = [t for t in inputs_of(of_task, ()) if not t.optional] + outputs_of(of_task)
        return {tensor.name: tensor.dims for tensor in found}

    grid = (-1, -1, -1)
    base = {"MASK": grid, "VOXEL_SIZE_MM": (3,), "NOTES": (1,)}
    local = "local_field->chi"
    assert told(local, range(2, 3)) == base | {
        "FIELD_PPM": (2, *grid), "B0_DIRECTION": (2, 3), "CHI_PPM": grid,
    }  # fmt: skip
    several = {"FIELD_PPM": (-1, *grid), "B0_DIRECTION": (-1, 3), "CHI_PPM": grid}
    assert told(local, range(1, 9)) == base | several
    assert told("phase->local_field", range(1, 9)) == base | {
        "PHASE_RAD": (-1, *grid), "B0_DIRECTION": (3,), "LOCAL_FIELD_PPM": grid,
        "ECHO_TIME_S": (-1,), "FIELD_STRENGTH_T": (1,),
    }  # fmt: skip
    assert told("local_field+chi+r2prime->chi_positive+chi_negative", range(1, 2)) == base | {
        "FIELD_PPM": grid, "B0_DIRECTION": (3,), "CHI_PPM": grid, "R2PRIME_HZ": grid,
        "CHI_POSITIVE_PPM": grid, "CHI_NEGATIVE_PPM": grid,
    }  # fmt: skip
    assert model_name(["my-net.2", "tv"]) == "qsm_my_net_2_tv"


def test_the_command_writes_all_files_and_names_them(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "serve"
    assert main(["--method", "tv", "--triton", str(folder)]) == 0
    expected = sorted(str(folder / name.format("qsm_tv")) for name in FILES)
    assert sorted(capsys.readouterr().out.split()) == expected
    assert sorted(str(p) for p in folder.rglob("*") if p.is_file()) == expected
    assert "**Axis order" in (folder / "README.md").read_text()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["--method", "tkd", "--triton", str(folder)]) == 2
    assert "--force" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    arguments = [str(BUNDLED_MODEL), "--triton", str(folder), "--force", "--json"]
    assert main(arguments) == 0
    made = json.loads(capsys.readouterr().out)["triton"]
    assert made["model"] == "qsm_tv_unet"
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["qsm_tv", "qsm_tv_unet"]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--method", "tv"], 2, "--method tv: what is finished is for --triton"),
        (["x.onnx"], 2, "x.onnx: what is finished is for --triton"),
        (["--triton", "D"], 2, "FILE or --method"),
        (["--triton", "D", "--method", "tv", "--model", "tv-unet"], 2, "drop one"),
        (["--triton", "D", "--method", "tv", "--fp16"], 2, "--precision is for an export"),
        (["--triton", "D", "--method", "tv", "--shapes", "64,64,64"], 2, "--shapes is for"),
        (["--triton", "D", "--model", "tv-unet", "-o", "x.onnx"], 2, "drop it"),
        (["--triton", "D", "--method", "magic"], 2, "no method 'magic'"),
        (["--triton", "D", "x.onnx"], 3, "x.onnx"),
        (["--triton", "no/D", "--method", "tv"], 3, "no is not a folder"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_writes_nothing(
    arguments: list[str], code: int, reason: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_opened_is_not_packed(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(BUNDLED_MODEL.read_bytes()[:9999])
    with pytest.raises((EngineError, DataError)):
        write_repository(tmp_path / "serve", [damaged], force=False)
    assert not (tmp_path / "serve").exists()


@pytest.mark.slow
def test_a_network_is_exported_into_the_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "tv-unet", "--triton", "serve", "-q"]) == 0
    assert "serve/models/qsm_tv_unet/1/tv-unet.onnx: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["serve"]
    config = read_config(tmp_path / "serve" / "models" / "qsm_tv_unet" / "config.pbtxt")
    digests = json.loads(config["parameters"]["models"]["string_value"])
    assert [*digests] == ["tv-unet.onnx"]
