"""``qsm-phantom``: files, header, parameters, errors and exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsm_deploy.calibration.phantom import phantom
from qsm_deploy.calibration.phantom.cli import affine_from_geometry, main
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.nifti import load_on_grid, load_volume
from qsm_deploy.runtime.scan.params import load_params

VOLUMES = ["field.nii.gz", "mask.nii.gz", "chi.nii.gz", "labels.nii.gz"]
SMALL = ["--shape", "20", "24", "18"]


def read(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_oblique_anisotropic_head_round_trips(tmp_path, capsys):
    folder = tmp_path / "head"
    options = [
        *("--shape", "24", "31", "18", "--voxel-size", "0.6", "0.8", "2.5", "--seed", "3"),
        *("--b0-direction", "-0.2", "0.5", "-0.8", "--noise-ppm", "0.001"),
        *("--echo-time", "0.0125", "--field-strength", "7", "--no-lesions"),
    ]
    assert main([str(folder), *options]) == 0
    seen = capsys.readouterr()
    assert seen.out.split() == [str(folder / name) for name in [*VOLUMES, "params.json"]]
    assert "24x31x18" in seen.err

    asked = Geometry((24, 31, 18), (0.6, 0.8, 2.5), (-0.2, 0.5, -0.8))
    field = load_volume(folder / "field.nii.gz")
    assert field.geometry.shape == asked.shape
    np.testing.assert_allclose(field.geometry.voxel_size_mm, asked.voxel_size_mm, rtol=1e-6)
    np.testing.assert_allclose(field.geometry.b0_direction, asked.b0_direction, atol=1e-6)

    drawn = phantom.head_phantom(asked, seed=3, noise_ppm=0.001, lesions=False)
    expected = [drawn.local_field_ppm, drawn.mask, drawn.chi_ppm, drawn.labels]
    for name, values in zip(VOLUMES, expected, strict=True):
        volume = load_on_grid(folder / name, field)
        np.testing.assert_array_equal(volume.data, values.astype(np.float32))
        stored = np.float32 if values.dtype == np.float32 else np.uint8
        assert volume.header.get_data_dtype() == stored

    params = load_params(folder / "params.json")
    assert (params.echo_time_s, params.field_strength_t) == (0.0125, 7)
    assert (params.b0_direction, params.voxel_size_mm) == (asked.b0_direction, asked.voxel_size_mm)
    noted = json.loads((folder / "params.json").read_text())
    assert (noted["seed"], noted["noise_ppm"], noted["lesions"]) == (3, 0.001, False)
    assert noted["made_by"].startswith("qsm-deploy ")


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert main([str(tmp_path / name), *SMALL, "--seed", seed, "--quiet"]) == 0
    assert read(tmp_path / "a") == read(tmp_path / "b")
    different = [name for name, content in read(tmp_path / "a").items()
                 if content != read(tmp_path / "c")[name]]  # fmt: skip
    assert sorted(different) == sorted([*VOLUMES, "params.json"])


def test_quiet_prints_results_only(tmp_path, capsys):
    main([str(tmp_path), *SMALL, "--quiet"])
    assert capsys.readouterr().err == ""


def test_existing_files_are_kept_without_force(tmp_path, capsys):
    (tmp_path / "params.json").write_text("mine")
    assert main([str(tmp_path), *SMALL]) == 2
    assert "params.json exists; pass --force" in capsys.readouterr().err
    assert read(tmp_path) == {"params.json": b"mine"}
    assert main([str(tmp_path), *SMALL, "--force"]) == 0
    assert len(read(tmp_path)) == 5


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--shape", "8", "40", "40"], 3, "at least 16 voxels"),
        (["--shape", "0", "40", "40"], 3, "three positive integers"),
        (["--voxel-size", "1", "-1", "1"], 3, "voxel size must be positive"),
        (["--voxel-size", "1", "nan", "1"], 3, "voxel size must be positive"),
        (["--b0-direction", "0", "0", "0"], 3, "B0 direction"),
        (["--noise-ppm", "-0.1"], 2, "noise must be"),
        (["--seed", "-1"], 2, "seed must not be negative"),
        (["--echo-time", "0"], 2, "--echo-time must be positive"),
        (["--field-strength", "-3"], 2, "--field-strength must be positive"),
    ],
)
def test_a_bad_option_is_one_line_and_leaves_nothing(tmp_path, capsys, options, code, message):
    assert main([str(tmp_path / "head"), "--quiet", *options]) == code
    error = capsys.readouterr().err
    assert error.startswith("qsm-phantom: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--shape", "32"], ["--shape", "a", "b", "c"], ["--no-such"]])
def test_a_malformed_command_line_is_a_usage_error(tmp_path, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "head"), *options])
    assert "usage: qsm-phantom" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_an_error_of_data(tmp_path, capsys):
    (tmp_path / "file").touch()
    places = [tmp_path / "no" / "head", tmp_path / "file", tmp_path / "file" / "head"]
    for place in [*places, tmp_path / ("long" * 100)]:
        assert main([str(place), *SMALL, "--quiet"]) == 3
    assert capsys.readouterr().err.count("qsm-phantom: error: ") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interruption_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "head_phantom", interrupted)
    assert main([str(tmp_path / "head"), *SMALL]) == 130
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from qsm_deploy.calibration.phantom.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'numpy', 'scipy', 'nibabel'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


components = st.floats(-1, 1)
directions = st.tuples(components, components, components).filter(lambda b: max(map(abs, b)) > 1e-3)
sizes = st.tuples(*[st.floats(0.1, 10)] * 3)


@settings(deadline=None)
@given(sizes, directions)
def test_the_affine_says_what_the_geometry_says(voxel_size_mm, b0_direction):
    geometry = Geometry((5, 6, 7), voxel_size_mm, b0_direction)
    affine = affine_from_geometry(geometry)
    again = Geometry.from_affine(geometry.shape, affine)
    np.testing.assert_allclose(again.voxel_size_mm, voxel_size_mm, rtol=1e-12)
    np.testing.assert_allclose(again.b0_direction, geometry.b0_direction, atol=1e-12)
    rotation = affine[:3, :3] / voxel_size_mm
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    np.testing.assert_allclose(affine @ [2, 2.5, 3, 1], [0, 0, 0, 1], atol=1e-12)


def test_an_upright_geometry_gets_a_plain_affine():
    plain = affine_from_geometry(Geometry((3, 5, 7), (1, 2, 3)))
    np.testing.assert_array_equal(plain[:3, :3], np.diag([1, 2, 3]))
