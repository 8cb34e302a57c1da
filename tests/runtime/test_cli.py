"""qsm-run as a user types it: what it writes, and one clear line for everything that is wrong."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import onnx
import pytest

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import (
    METADATA_KEY,
    GeometryLimits,
    MemoryUse,
    ReceptiveField,
    TensorInfo,
)
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.console import atomic
from qsm_deploy.runtime.job.arguments import memory_size, parser

AXIAL_1MM = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 5.0)


@pytest.fixture
def model(card, write_model):
    return write_model(replace(card, geometry=AXIAL_1MM))


@pytest.fixture
def paths(field, model, write_volume, tmp_path):
    """Return the files of a small run, by name."""
    mask = (field != 0).astype(np.uint8)
    return {
        "model": model,
        "field": write_volume(field, "field.nii.gz"),
        "mask": write_volume(mask, "mask.nii.gz"),
        "truth": write_volume(2 * field, "truth.nii.gz"),
        "labels": write_volume(8 * mask, "labels.nii.gz"),
        "chi": tmp_path / "chi.nii.gz",
        "folder": tmp_path,
    }


@pytest.fixture
def run(paths, capsys):
    """Return a function that runs qsm-run on names of ``paths`` and plain words."""

    def run(line):
        words = [str(paths.get(word.removeprefix("@"), word)) for word in line.split()]
        try:
            code = main(words)
        except SystemExit as stopped:  # argparse
            code = stopped.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


class TestResult:
    def test_the_map_lies_on_the_fields_grid(self, run, paths, field, write_volume):
        affine = np.diag([-1.0, 1.05, 0.95, 1.0])
        affine[:3, 3] = 12, -7, 3
        paths["field"] = write_volume(field, "oblique.nii.gz", affine)
        code, out, err = run("model field -o chi")
        assert (code, out.splitlines()[-1]) == (0, str(paths["chi"]))
        assert "note: no mask given: taking the non-zero field" in err
        image = nib.load(paths["chi"])
        np.testing.assert_array_equal(image.affine, nib.load(paths["field"]).affine)
        assert image.get_data_dtype() == np.float32
        assert bytes(image.header["descrip"]).startswith(b"chi [ppm] twice fp32, openvino")
        np.testing.assert_allclose(image.get_fdata(), 2 * field, atol=1e-7)

    def test_the_default_name_lies_beside_the_field(self, run, paths):
        code, _, _ = run("model field -m mask")
        assert code == 0
        assert (paths["folder"] / "field_chi.nii.gz").is_file()
        assert (paths["folder"] / "field_chi.json").is_file()

    def test_without_a_model_total_variation_runs(self, run, paths):
        code, out, err = run("field -m mask -o chi")
        assert (code, out) == (0, f"{paths['chi']}\n")
        assert err.startswith("tv (total variation, by ADMM), scipy")
        assert "whole volume" in err
        sidecar = json.loads((paths["folder"] / "chi.json").read_text())
        assert sidecar["model"]["method"] == "tv"

    def test_the_bundled_network_is_a_method_by_name(self, run, paths):
        assert run("--method tv-unet field -m mask -o chi")[0] == 0
        sidecar = json.loads((paths["folder"] / "chi.json").read_text())
        assert sidecar["model"]["network"] == "tv-unet"

    def test_ppb_and_uncompressed(self, run, paths, field):
        paths["chi"] = paths["folder"] / "chi.nii"
        assert run("model field -o chi --out-units ppb")[0] == 0
        image = nib.load(paths["chi"])
        np.testing.assert_allclose(image.get_fdata(), 2000 * field, rtol=1e-5)
        assert bytes(image.header["descrip"]).startswith(b"chi [ppb]")
        assert json.loads((paths["folder"] / "chi.json").read_text())["units"] == "ppb"

    def test_units_from_a_parameter_file(self, run, paths, field, write_volume):
        paths["field"] = write_volume(field * np.float32(127.731), "hz.nii.gz")
        params = paths["folder"] / "params.json"
        params.write_text(json.dumps({"B0": 3.0, "B0_dir": [0, 0, 1], "voxel_size": [1, 1, 1]}))
        assert run(f"model field -o chi --units hz --params {params}")[0] == 0
        np.testing.assert_allclose(nib.load(paths["chi"]).get_fdata(), 2 * field, atol=1e-7)

    def test_the_report_says_what_was_done(self, run, paths, field):
        report = paths["folder"] / "run.json"
        line = f"model field -m mask -o chi --truth truth --labels labels --report {report}"
        code, out, err = run(line)
        assert (code, out) == (0, f"{paths['chi']}\n")
        content = json.loads(report.read_text())
        assert content["model"]["network"] == "twice"
        assert content["geometry"]["shape"] == [21, 18, 15]
        assert content["plan"]["padded_shape"] == [24, 20, 16]
        assert content["metrics"]["nrmse_percent"] < 1e-3
        assert list(content["seconds"]) == [
            "load", "prepare", "inference", "write", "field residual", "metrics",
        ]  # fmt: skip
        assert content["memory"]["peak_above_baseline_bytes"] >= 0
        predicted = dipole_convolve(2 * field, Geometry(field.shape), pad_voxels=(11, 9, 8))
        mask = field != 0
        residual = np.linalg.norm((predicted - field)[mask]) / np.linalg.norm(field)
        assert content["field_residual"] == pytest.approx(residual, rel=1e-5)
        assert "NRMSE [%]" in err
        assert run(line.replace("-o chi", "--force --json -o chi"))[1].startswith('{"made_by"')

    def test_the_figure_is_a_picture(self, run, paths):
        figure = paths["folder"] / "chi.png"
        assert run(f"model field -o chi --truth truth --figure {figure}")[0] == 0
        assert figure.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("blend", ["hann", "gaussian", "crop"])
    def test_patches_give_the_same_map(self, run, paths, field, blend):
        code, _, err = run(f"model field -m mask -o chi --patch 8 --overlap 4 --blend {blend}")
        assert code == 0
        assert f"patches of 8x8x8, overlap 4, blend {blend}" in err
        np.testing.assert_allclose(nib.load(paths["chi"]).get_fdata(), 2 * field, atol=1e-7)

    def test_memory_decides_between_whole_and_patches(self, run, paths, card, write_model):
        hungry = replace(card, memory={"openvino": MemoryUse(0, 10**6)})
        paths["model"] = write_model(hungry, "hungry.onnx")
        assert "whole volume: it fits" in run("model field -m mask --dry-run --memory-limit 32G")[1]
        code, out, _ = run("model field -m mask --dry-run --memory-limit 6G")
        assert code == 0
        assert "patches of" in out
        assert "the whole volume would need" in out

    def test_a_dry_run_prints_the_plan_and_writes_nothing(self, run, paths):
        before = sorted(paths["folder"].iterdir())
        code, out, _ = run("model field -m mask -o chi --dry-run")
        assert code == 0
        for fact in ("21x18x15", "24x20x16", "(1, 1, 1) mm", "(0, 0, 1)", "whole volume", "GiB",
                     "openvino", "the fastest CPU backend installed"):  # fmt: skip
            assert fact in out
        assert sorted(paths["folder"].iterdir()) == before
        assert json.loads(run("model field --dry-run --json")[1])["plan"]["patches"] == 1

    def test_both_backends_give_the_same_map(self, run, paths):
        maps = []
        for backend in ("onnxruntime", "openvino"):
            flags = f"--force --backend {backend} --threads 1"
            assert run(f"--method tv-unet field -m mask -o chi {flags}")[0] == 0
            maps.append(nib.load(paths["chi"]).get_fdata())
        assert np.abs(maps[0]).max() > 0
        assert np.linalg.norm(maps[0] - maps[1]) < 5e-6 * np.linalg.norm(maps[0])

    def test_options_may_stand_between_the_files(self, run, paths):
        code, out, _ = run("model --dry-run field -m mask")
        assert code == 0
        assert str(paths["folder"] / "field_chi.nii.gz") in out

    def test_patches_that_are_not_exact_say_so(self, run, paths, card, write_model):
        field = ReceptiveField(40, 20, 0.999999)
        paths["model"] = write_model(replace(card, receptive_field=field), "wide.onnx")
        code, _, err = run("model field -m mask -o chi --patch 8")
        assert code == 0
        assert "they share 4 voxels, the network sees 40 to each side (20 for" in err
        assert json.loads((paths["folder"] / "chi.json").read_text())["plan"]["exact"] is False

    def test_a_map_outlives_a_figure_that_fails(self, run, paths, monkeypatch):
        def fail(*args, **kwargs):
            raise MemoryError

        monkeypatch.setattr("qsm_deploy.runtime.job.looks.scan_figure", fail)
        figure = paths["folder"] / "chi.png"
        assert run(f"model field -m mask -o chi --figure {figure}")[0] == 6
        assert nib.load(paths["chi"]).shape == (21, 18, 15)

    def test_quiet_still_warns_and_prints_the_output_alone(self, run, paths):
        code, out, err = run("model field -q -o chi")
        assert (code, err.count("\n")) == (0, 1)
        assert out == f"{paths['chi']}\n"


class TestGeometry:
    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            ("--voxel-size 1 1 2", "voxel size (1, 1, 2) mm, the network was trained at (1, 1, 1)"),
            ("--b0-direction 0 0.6 0.8", "B0 direction 36.9 degrees off the (0, 0, 1)"),
        ],
    )
    def test_outside_the_training_another_grid_is_made_unless_allowed(
        self, run, paths, flags, says
    ):
        code, _, err = run(f"model field -m mask -o chi {flags}")
        assert code == 0
        what = "turned by 36.9 degrees" if "b0" in flags else "resampled to 1 mm"
        assert f"note: {what} for twice, and the map back; B0 from " in err
        grid = json.loads((paths["folder"] / "chi.json").read_text())["grid"]
        assert grid["network"]["voxel_size_mm"] == pytest.approx([1, 1, 1])
        assert grid["network"]["b0_direction"] == [0, 0, 1]
        code, _, err = run(f"model field -m mask -o chi {flags} --allow-geometry --force")
        assert code == 0
        assert f"note: outside the training: {says}" in err
        recorded = json.loads((paths["folder"] / "chi.json").read_text())["geometry"]
        assert recorded["allow_geometry"] is True
        assert says in recorded["outside_training"][0]

    @pytest.mark.parametrize(
        ("flags", "step"), [("", (0.05, 10)), ("--b0-direction 0 0.6 0.8", (0.3, None))]
    )
    def test_data_consistency_by_auto_is_another_after_a_turn(self, run, paths, flags, step):
        assert run(f"model field -m mask -o chi --data-consistency auto {flags}")[0] == 0
        written = json.loads((paths["folder"] / "chi.json").read_text())
        found = written["data_consistency"]
        assert (found["lambda"], found["iterations"]) == step
        assert written["asked_for"] == {"data_consistency": "auto"}


class TestBadInput:
    """Every mistake is one line on stderr with its exit code, and no output is written."""

    @pytest.mark.parametrize(
        ("line", "code", "says"),
        [
            ("", 2, "a field map (.nii or .nii.gz) is needed, or --phase and"),
            ("field field", 2, "tv takes one field, 2 were given"),
            ("--method tv-unet field field", 2, "tv-unet takes one field, 2 were given"),
            ("model", 2, "a field map (.nii or .nii.gz), or --phase and"),
            ("model field -o chi.txt", 2, "must end in .nii or .nii.gz"),
            ("model field -o @folder", 2, "must end in .nii or .nii.gz"),
            ("model field --patch 7", 2, "--patch 7 is not a multiple of the network's divisor 4"),
            ("model field --patch 8 --overlap 8", 2, "--overlap 8 must lie between"),
            ("model field --patch -8", 2, "neither auto, off nor a number"),
            ("model field --overlap 8 --patch off", 2, "need patches"),
            ("model field --memory-limit much", 2, "'much' is not a size"),
            ("model field --memory-limit 6", 2, "6 bytes? pass 6G"),
            ("model field --labels labels", 2, "--labels needs --truth"),
            ("model field -o chi --report chi", 2, "two outputs would go to"),
            ("model field --units hz", 3, "pass --field-strength in tesla"),
            ("model field --units rad --field-strength 3", 3, "pass --echo-time in seconds"),
            ("model nowhere.nii", 3, "nowhere.nii: no such file"),
            ("nowhere.onnx field", 3, "nowhere.onnx: no such model file"),
            ("model field -m nowhere.nii", 3, "nowhere.nii: no such file"),
            ("model field --params nowhere.json", 3, "nowhere.json: no such file"),
            ("model field -o nowhere/chi.nii.gz", 3, "nowhere is not a folder"),
            ("model field -o @field/chi.nii.gz", 3, "is not a folder"),
            ("model model field", 2, "they do not follow each other; one model runs alone"),
            ("model field --voxel-size 1 1 0", 3, "voxel size must be positive"),
            ("model field --b0-direction 0 0 0", 3, "non-zero"),
            ("engine.plan field", 4, "engine.plan"),
            ("engine.trt field", 2, "the model, if named, comes first and ends in .onnx"),
            ("model field --figure chi.jpg", 2, "must end in .png"),
            (
                "model field --slices 1 2 3",
                2,
                "of a picture; add --figure FILE.png or --html FILE.html",
            ),
            ("model field --window 0 1", 2, "--slices and --window are of a picture; add"),
            ("model field --figure a.png --window 1 0", 2, "--window is 1 0, expected LOW HIGH"),
            ("model field --figure a.png --slices 90 0 0", 2, "whose box is R 3 to 18, A 2 to 14"),
            ("model --bids nowhere --slices 1 2 3", 2, "--slices is for one recording"),
            ("model --bids nowhere --window 0 1", 2, "--window is for one recording"),
            ("model field --report mask -m mask --force", 2, "is an input of this run"),
            ("model field -o field --force", 2, "is an input of this run"),
            ("model field --threads 99999", 2, "is not a number from 0"),
            ("model field --truth constant.nii", 3, "the truth is constant"),
            ("model field --backend onnxruntime --precision bf16", 2, "needs --backend openvino"),
            ("model field --memory-limit 10k", 6, "raise --memory-limit"),
        ],
    )
    def test_in_the_command_line(
        self, run, paths, tmp_path, monkeypatch, write_volume, line, code, says
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "engine.plan").write_bytes(b"plan")
        (tmp_path / "engine.trt").write_bytes(b"plan")
        write_volume(np.ones((21, 18, 15), dtype=np.float32), "constant.nii")
        before = sorted(tmp_path.rglob("*"))
        line = line.replace("@folder", str(paths["folder"])).replace("@field", str(paths["field"]))
        seen, _, err = run(line)
        assert (seen, says in err) == (code, True), err
        assert err.splitlines()[-1].startswith("qsm-run: error: ")
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda f: np.stack([f, f], axis=-1), "4-D of shape (21, 18, 15, 2)"),
            (lambda f: f[:, :, 0], "2-D of shape (21, 18)"),
            (lambda f: np.where(f == f.max(), np.nan, f).astype(np.float32), "1 of 2080 voxels"),
            (lambda f: 0 * f, "the field is zero"),
            (lambda f: 300 * f, "0.015 if it is in ppb"),
            (lambda f: f.astype(np.complex64), "neither integer nor floating-point"),
        ],
        ids=["4-D", "2-D", "NaN", "zero", "Hz", "complex"],
    )
    def test_in_the_field(self, run, paths, field, write_volume, make, says):
        paths["field"] = write_volume(make(field), "bad.nii.gz")
        code, _, err = run("model field -o chi")
        assert (code, says in err) == (3, True), err
        assert err.count("\n") == 1
        assert not paths["chi"].exists()

    def test_in_a_truncated_file(self, run, paths):
        whole = paths["field"].read_bytes()
        paths["field"].write_bytes(whole[: len(whole) // 2])
        code, _, err = run("model field -o chi")
        assert (code, "truncated or damaged" in err) == (3, True)

    def test_in_the_mask(self, run, paths, field, write_volume):
        paths["mask"] = write_volume(np.zeros(field.shape, dtype=np.uint8), "empty.nii.gz")
        assert run("model field -m mask")[0] == 3
        paths["mask"] = write_volume(np.ones((20, 18, 15), dtype=np.uint8), "smaller.nii.gz")
        code, _, err = run("model field -m mask")
        assert (code, "resample" in err) == (3, True)

    def test_an_existing_output_is_kept(self, run, paths):
        paths["chi"].write_text("precious")
        code, _, err = run("model field -m mask -o chi")
        assert (code, "pass --force" in err) == (2, True)
        assert paths["chi"].read_text() == "precious"
        assert run("model field -m mask -o chi --force")[0] == 0
        assert nib.load(paths["chi"]).shape == (21, 18, 15)

    def test_a_model_without_a_card(self, run, paths, write_model):
        paths["model"] = write_model(None, "bare.onnx")
        for backend in ("onnxruntime", "openvino"):
            code, _, err = run(f"model field -m mask --backend {backend}")
            assert (code, "has no model card; export it with qsm-export" in err) == (4, True)

    def test_a_card_that_contradicts_the_graph(self, run, paths, card, write_model):
        mask = TensorInfo("mask", "1", card.output.shape)
        model = onnx.load(write_model(card, "wrong.onnx"))
        said = {METADATA_KEY: replace(card, inputs=(*card.inputs, mask)).to_json()}
        onnx.helper.set_model_props(model, said)
        onnx.save(model, paths["model"])
        for backend in ("onnxruntime", "openvino"):
            code, _, err = run(f"model field -m mask --backend {backend}")
            assert (code, "contradicts the graph" in err) == (4, True), err

    def test_garbage_for_a_model(self, run, paths):
        paths["model"].write_bytes(b"not a model")
        for backend in ("onnxruntime", "openvino"):
            code, _, err = run(f"model field -m mask --backend {backend}")
            assert (code, f"{paths['model']}: " in err) == (4, True), err

    def test_a_card_beside_the_map_is_kept(self, run, paths):
        model = paths["model"]
        model.with_suffix(".json").write_text('{"made_by": "qsm-deploy 0.1.0", "network": "a"}')
        paths["chi"] = model.with_suffix(".nii.gz")
        code, _, err = run("model field -o chi --force")
        assert code == 2
        assert f"{model.with_suffix('.json')} is no sidecar of qsm-run" in err
        assert not paths["chi"].exists()

    def test_a_full_disk_leaves_nothing(self, run, paths, monkeypatch):
        def full(file, data):
            if len(data) > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.write(data)

        monkeypatch.setattr(atomic, "_write_through", full)
        report = paths["folder"] / "run.json"
        before = set(paths["folder"].iterdir())
        code, _, err = run(f"model field -o chi --report {report}")
        assert code == 3
        assert "No space left on device" in err
        assert set(paths["folder"].iterdir()) == before
        monkeypatch.undo()
        assert run(f"model field -o chi --report {report}")[0] == 0

    @pytest.mark.parametrize(
        ("line", "code", "says"),
        [
            ("model field -m nowhere.nii -o chi", 3, "nowhere.nii: no such file"),
            ("nowhere.onnx field -o chi", 3, "nowhere.onnx: no such model file"),
            (
                "net.pth field -o chi",
                2,
                "net.pth are weights; make a model of them with: qsm-export",
            ),
            ("model field -o chi --memory-limit 6", 2, "6 bytes? pass 6G"),
        ],
    )
    def test_what_is_missing_is_said_before_what_exists(self, run, paths, line, code, says):
        assert run("model field -o chi")[0] == 0
        seen, _, err = run(line)
        assert seen == code
        assert says in err
        assert "--force" not in err

    def test_a_missing_library_names_its_extra(self, run, monkeypatch):
        find = __import__("importlib.util").util.find_spec
        hidden = {"openvino", "matplotlib"}
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *a: None if name in hidden else find(name, *a)
        )
        code, _, err = run("model field -m mask --backend openvino")
        assert (code, "pip install '.[openvino]'" in err) == (4, True)
        code, _, err = run("model field -m mask --figure chi.png")
        assert (code, "pip install '.[figure]'" in err) == (4, True)
        code, out, _ = run("model field -m mask --dry-run")
        assert (code, "onnxruntime" in out) == (0, True)
        assert "openvino, which is faster, is not installed" in out


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from qsm_deploy.runtime.job.arguments import parser; parser().format_help();"
        "print(sorted({'numpy', 'scipy', 'nibabel', 'onnxruntime', 'openvino', 'torch', 'onnx'}"
        " & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_run_imports_neither_torch_nor_onnx(paths):
    program = (
        "import sys; from qsm_deploy.runtime.cli import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'onnx', 'matplotlib'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", program, str(paths["field"])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize(
    ("names", "most"), [(["field"], 62), (["model", "field"], 58)], ids=["tv", "network"]
)
def test_a_run_loads_few_modules(paths, names, most):
    """Of those with code: a folder's own is its docstring."""
    words = [str(paths[name]) for name in names]
    code = f"""
import sys
from qsm_deploy.runtime.cli import main
assert main({words!r} + ["-o", {str(paths["chi"])!r}]) == 0
print(sum(name.startswith("qsm_deploy.") and not hasattr(module, "__path__")
          for name, module in sys.modules.items()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) <= most


def test_openvino_does_not_call_home(paths):
    program = (
        "import sys; from qsm_deploy.runtime.cli import main; code = main(sys.argv[1:]);"
        "print(code, 'openvino' in sys.modules, sys.modules.get('openvino_telemetry'))"
    )
    words = [str(paths["model"]), str(paths["field"]), "--backend", "openvino"]
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 True None"


def test_every_flag_is_explained():
    assert [action.dest for action in parser()._actions if not action.help] == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("6G", 6 * 2**30), ("1.5 GiB", 3 * 2**29), ("300mb", 300 * 2**20), ("2000000", 2000000)],
)
def test_memory_sizes(text, size):
    assert memory_size(text) == size


def test_what_a_run_tells_stands_on_lines_of_its_own(paths, capsys):
    assert main([str(paths["field"]), "-o", str(paths["chi"])]) == 0
    told = capsys.readouterr().err
    assert "\\n" not in told
    assert [line.split()[0] for line in told.splitlines() if line.startswith(("time", "peak"))] == [
        "time",
        "peak",
    ]
