"""qsm-run --qsm-ci and the submission under examples/, by the contract of QSM-CI."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import GeometryLimits
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.job.qsm_ci import PARAMETERS
from qsm_deploy.runtime.scan.nifti import nifti_bytes

SUBMISSION = Path(__file__).parents[3] / "examples" / "qsm_ci"
PARAMS = {"TE": [0.004, 0.012], "B0": 7, "B0_dir": [0, 0, 1], "voxel_size": [1, 1, 1]}
# of the contract, and of the submissions in its repository
KEYS = {
    *("name", "slug", "algorithm", "source", "stage", "language", "family", "learning", "engine"),
    *("inputs", "optional_inputs", "description", "authors", "doi", "code_url", "license", "image"),
    *("run", "parameters", "ci_notes", "runner", "ci_skip", "timeout_minutes", "smoke_box"),
}


@pytest.fixture
def folders(tmp_path, field):
    """Return the input folder as QSM-CI mounts it, read-only, and an empty output folder."""
    source, target = tmp_path / "input", tmp_path / "output"
    source.mkdir()
    target.mkdir()
    (source / "localfield.nii.gz").write_bytes(nifti_bytes(field, np.eye(4)))
    mask = (field != 0).astype(np.uint8)
    (source / "mask.nii.gz").write_bytes(nifti_bytes(mask, np.eye(4)))
    (source / "params.json").write_text(json.dumps(PARAMS))
    return source, target


@pytest.fixture
def model(card, write_model):
    return write_model(card)


@pytest.fixture
def run(folders, model, capsys):
    """Return a function that runs the stage with more flags."""

    def run_stage(*flags):
        words = [str(model), "--qsm-ci", "--qsm-ci-folders", *map(str, folders), *flags]
        try:
            code = main(words)
        except SystemExit as stopped:  # argparse
            code = stopped.code
        return code, *capsys.readouterr()

    return run_stage


class TestContract:
    def test_chimap_is_in_ppm_on_the_masks_grid(self, run, folders, field):
        source, target = folders
        before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
        code, out, err = run()
        assert (code, out) == (0, f"{target / 'chimap.nii.gz'}\n")
        assert "note" not in err
        image, mask = nib.load(target / "chimap.nii.gz"), nib.load(source / "mask.nii.gz")
        assert image.shape == mask.shape
        np.testing.assert_array_equal(image.affine, mask.affine)
        np.testing.assert_allclose(image.get_fdata(), 2 * field * (field != 0), atol=1e-7)
        assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before

    def test_the_direction_is_that_of_the_parameters(self, run, folders, model, card, write_model):
        (folders[0] / "params.json").write_text(json.dumps(PARAMS | {"B0_dir": [0, 0.6, 0.8]}))
        assert run()[0] == 0
        sidecar = json.loads((folders[1] / "chimap.json").read_text())
        assert sidecar["geometry"]["b0_direction"] == pytest.approx([0, 0.6, 0.8])
        axial = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 5.0)
        write_model(replace(card, geometry=axial))
        code, _, err = run("--force")
        assert (code, "turned by 36.9 degrees" in err) == (0, True), err
        assert "B0 from the parameter file" in err

    def test_config_sets_what_is_declared(self, run, folders):
        config = {"data_consistency": "auto", "patch": 12, "overlap": "4", "blend": "crop"}
        (folders[0] / "config.json").write_text(json.dumps(config))
        assert run()[0] == 0
        sidecar = json.loads((folders[1] / "chimap.json").read_text())
        assert sidecar["data_consistency"]["lambda"] == 0.05
        assert (sidecar["plan"]["overlap"], sidecar["plan"]["blend"]) == (4, "crop")
        assert sidecar["plan"]["patch_shape"] == [12, 12, 12]

    @pytest.mark.parametrize("robust", [True, "false", False])
    def test_config_sets_a_method_and_what_is_said_to_it(self, folders, robust):
        config = {"method": "tv", "alpha": 2e-4, "iterations": 5, "robust": robust}
        (folders[0] / "config.json").write_text(json.dumps(config))
        assert main(["--qsm-ci", "--qsm-ci-folders", *map(str, folders)]) == 0
        sidecar = json.loads((folders[1] / "chimap.json").read_text())
        assert sidecar["model"]["method"] == "tv"
        said = {"alpha": 2e-4, "iterations": 5} | ({"robust": True} if robust is True else {})
        assert sidecar["model"]["said"] == said
        assert sidecar["inversion"]["alpha_ppm_mm"] == 2e-4

    def test_what_is_declared_by_default_is_the_default(self, folders):
        declared = yaml.safe_load((SUBMISSION / "algorithm.yml").read_text())["parameters"]
        config = {p["name"]: p["default"] for p in declared if p["default"] is not None}
        (folders[0] / "config.json").write_text(json.dumps(config))
        assert main(["--qsm-ci", "--qsm-ci-folders", *map(str, folders)]) == 0
        sidecar = json.loads((folders[1] / "chimap.json").read_text())
        assert (sidecar["model"]["method"], sidecar["model"]["said"]) == ("tv", {})

    def test_without_folders_the_contracts_own_are_read(self, capsys):
        assert main(["--qsm-ci"]) == 3
        assert "qsm-run: error: /input/localfield.nii.gz: missing" in capsys.readouterr().err


class TestBadInput:
    @pytest.mark.parametrize("name", ["localfield.nii.gz", "mask.nii.gz", "params.json"])
    def test_a_missing_file(self, run, folders, name):
        (folders[0] / name).unlink()
        (folders[0] / "phase.nii.gz").write_bytes(b"")
        code, out, err = run()
        assert (code, out) == (3, "")
        assert f"{name}: missing (found " in err
        assert "phase.nii.gz" in err
        assert not any(folders[1].iterdir())

    @pytest.mark.parametrize("name", ["B0_dir", "voxel_size"])
    def test_a_missing_parameter(self, run, folders, name):
        content = {key: value for key, value in PARAMS.items() if key != name}
        (folders[0] / "params.json").write_text(json.dumps(content))
        code, _, err = run()
        assert code == 3
        assert f"params.json: lacks {name}" in err

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"tolerance": 0.2}, "no parameter tolerance; dipole has method, alpha, "),
            ({"robust": 1}, "robust is 1, expected true or false"),
            ({"method": "tv"}, "is a model, and --method tv needs none"),
            ({"alpha": "much"}, "'much' is neither auto nor a positive number"),
            ({"patch": True}, "patch is True, expected a number or a word"),
            ({"patch": [1]}, "patch is [1], expected a number or a word"),
            ({"patch": "big"}, "'big' is neither auto, off nor a number of voxels"),
            ({"data_consistency": -1}, "'-1' is neither auto nor a positive number"),
            ("{", "not a JSON file"),
        ],
    )
    def test_a_bad_config(self, run, folders, config, says):
        text = config if isinstance(config, str) else json.dumps(config)
        (folders[0] / "config.json").write_text(text)
        code, _, err = run()
        assert code in (2, 3)
        assert says in err

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (["--units", "hz"], "--units: --qsm-ci fixes it; drop the flag"),
            (["-o", "x.nii"], "--output: --qsm-ci fixes it"),
            (["x.nii"], "x.nii is no model"),
            (["--bids", "x"], "--bids and --qsm-ci read different folders"),
        ],
    )
    def test_flags_that_the_contract_leaves_no_room_for(self, run, flags, says):
        code, _, err = run(*flags)
        assert code == 2
        assert says in err

    def test_no_output_folder(self, run, folders):
        folders[1].rmdir()
        code, _, err = run()
        assert code == 3
        assert "output: no such folder" in err

    def test_folders_without_the_flag(self, capsys):
        with pytest.raises(SystemExit):
            main(["field.nii.gz", "--qsm-ci-folders", "a", "b"])
        assert "--qsm-ci-folders needs --qsm-ci" in capsys.readouterr().err


class TestSubmission:
    def test_algorithm_yml_keeps_to_the_contract(self):
        content = yaml.safe_load((SUBMISSION / "algorithm.yml").read_text())
        assert content.keys() <= KEYS
        assert {"name", "slug", "stage", "description", "license", "image", "run"} <= content.keys()
        assert (content["stage"], content["run"]) == ("dipole", "bash run.sh")
        assert set(content["inputs"]) <= {"localfield", "mask"}
        assert [p["name"] for p in content["parameters"]] == list(PARAMETERS)

    def test_run_sh_reconstructs_a_sphere(self, tmp_path):
        shape = (40, 36, 32)
        axes = np.ogrid[-20:20, -18:18, -16:16]
        inside = sum(axis**2 for axis in axes) < 15**2
        sphere = sum(axis**2 for axis in axes) < 5**2
        field = inside * dipole_convolve(0.1 * sphere.astype(np.float32), Geometry(shape))
        source, target = tmp_path / "in", tmp_path / "out"
        source.mkdir()
        target.mkdir()
        for name, volume in (("localfield", field), ("mask", inside)):
            (source / f"{name}.nii.gz").write_bytes(nifti_bytes(volume.astype("f4"), np.eye(4)))
        (source / "params.json").write_text(json.dumps(PARAMS))
        scripts = os.path.dirname(sys.executable)
        done = subprocess.run(
            ["bash", SUBMISSION / "run.sh", source, target],
            env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        chi = nib.load(target / "chimap.nii.gz").get_fdata()
        assert chi[sphere].mean() == pytest.approx(0.1, rel=0.2)
        assert np.abs(chi[inside & ~sphere]).mean() < 0.01
        assert not chi[~inside].any()
