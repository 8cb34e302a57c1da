"""``qsm-phantom``: files, header, parameters, errors and exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsm_deploy.calibration.phantom import phantom
from qsm_deploy.calibration.phantom.cli import main
from qsm_deploy.calibration.phantom.orientation import affine_from_geometry, tilted
from qsm_deploy.calibration.phantom.surroundings import background_field, draw_surroundings
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.scan.nifti import load_on_grid, load_volume
from qsm_deploy.runtime.scan.params import load_params
from qsm_deploy.runtime.scan.scan import Reading, ScanFiles, load_scan

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


def test_no_option_changes_what_the_others_draw(tmp_path):
    options = {
        "plain": [],
        "much": ["--background", "--echoes", "0.005", "0.01", "--bipolar"],
        "magnitude": ["--magnitude", "--residual-background", "0.002"],
        "tilted": ["--orientations", "3", "--residual-background", "0.002"],
    }
    for name, words in options.items():
        assert main([str(tmp_path / name), *SMALL, *words, "--quiet"]) == 0
    plain, much, magnitude, turned = (read(tmp_path / name) for name in options)
    assert {name: much[name] for name in VOLUMES} == {name: plain[name] for name in VOLUMES}
    for name in VOLUMES[1:]:
        assert plain[name] == magnitude[name] == turned[name]
    assert plain["field.nii.gz"] != magnitude["field.nii.gz"] == turned["field.nii.gz"]
    added = ["total_field", *(f"{what}{n}" for n in (1, 2) for what in ("phase", "magnitude"))]
    assert sorted(much.keys() - plain.keys()) == sorted(f"{name}.nii.gz" for name in added)
    assert sorted(magnitude.keys() - plain.keys()) == ["magnitude.nii.gz"]
    assert sorted(turned.keys() - plain.keys()) == ["field2.nii.gz", "field3.nii.gz"]


def test_the_total_field_is_the_local_and_the_background(tmp_path):
    assert main([str(tmp_path), *SMALL, "--background", "--quiet"]) == 0
    local, mask, total = (
        load_volume(tmp_path / f"{name}.nii.gz") for name in ("field", "mask", "total_field")
    )
    inside, geometry = mask.data > 0, Geometry((20, 24, 18))
    background = background_field(draw_surroundings(inside, geometry), geometry)
    np.testing.assert_allclose(total.data, local.data + inside * background, atol=1e-6)


def test_the_magnitude_is_of_the_stated_echo(tmp_path):
    means = []
    for n, seconds in enumerate(("0.005", "0.02")):
        folder = tmp_path / str(n)
        words = ["--magnitude", "--echo-time", seconds, "--snr", "1000", "--quiet"]
        assert main([str(folder), *SMALL, *words]) == 0
        magnitude, mask = (load_volume(folder / f"{m}.nii.gz").data for m in ("magnitude", "mask"))
        means.append(np.median(magnitude[mask > 0]))
        noted = json.loads((folder / "params.json").read_text())
        assert (noted["echo_time_s"], noted["snr"]) == (float(seconds), 1000)
    rate = np.log(means[0] / means[1]) / 0.015
    assert 15 < rate < 30  # of grey and white matter at 3 T [1/s]


def test_tilted_fields_are_read_as_such(tmp_path, capsys):
    words = ["--orientations", "4", "--tilt", "20", "--b0-direction", "0.1", "0", "1"]
    assert main([str(tmp_path), *SMALL, *words, "--noise-ppm", "0"]) == 0
    fields = [tmp_path / f"field{n}.nii.gz" for n in ("", 2, 3, 4)]
    command = f"reconstruct: qsm-run --method cosmos {' '.join(map(str, fields))} -m "
    assert command + str(tmp_path / "mask.nii.gz") in capsys.readouterr().err
    scan = load_scan(ScanFiles(tuple(fields), tmp_path / "mask.nii.gz"), Reading())
    grids = tilted(Geometry((20, 24, 18), b0_direction=(0.1, 0, 1)), 4, 20)
    np.testing.assert_allclose(scan.b0_directions, [g.b0_direction for g in grids], atol=1e-6)
    chi = load_volume(tmp_path / "chi.nii.gz").data
    for field, grid in zip(scan.measured, grids, strict=True):
        expected = scan.mask * phantom.dipole_field(chi, grid)
        np.testing.assert_allclose(field, expected, atol=1e-6)


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
        (["--echo-time", "20"], 3, "is it in ms"),
        (["--snr", "0", "--magnitude"], 2, "--snr must be positive"),
        (["--residual-background", "nan"], 2, "--residual-background must be positive"),
        (["--orientations", "3", "--tilt", "90"], 2, "--tilt must be 1 to 60 degrees"),
        (["--tilt", "20"], 2, "--tilt is of --orientations"),
        (["--snr", "20"], 2, "--snr is of a gradient echo"),
        (["--bipolar"], 2, "--bipolar needs a second echo"),
        (["--bipolar", "--echoes", "0.01"], 2, "--bipolar needs a second echo"),
        (["--echoes", "0.02", "0.01"], 2, "echo times must rise"),
        (["--echoes", "0.01", "--magnitude"], 2, "drop --magnitude"),
        (["--echoes", "0.01", "--echo-time", "0.01"], 2, "drop --echo-time"),
        (["--echoes", "0.01", "--residual-background", "0.002"], 2, "before background removal"),
        (["--echoes", "0.01", "--orientations", "2"], 2, "drop --orientations"),
        (["--background", "--orientations", "2"], 2, "drop it or --orientations"),
        (["--bids", "study"], 2, "pass --echoes too"),
    ],
)
def test_a_bad_option_is_one_line_and_leaves_nothing(tmp_path, capsys, options, code, message):
    assert main([str(tmp_path / "head"), "--quiet", *options]) == code
    error = capsys.readouterr().err
    assert error.startswith("qsm-phantom: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--shape", "32"],
        ["--shape", "a", "b", "c"],
        ["--no-such"],
        ["--orientations", "1"],
        ["--orientations", "6"],
    ],
)
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
