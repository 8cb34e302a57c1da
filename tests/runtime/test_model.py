"""The public interface: the checks and errors of the command line, arrays and files alike."""

import json
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

import qsm_deploy.runtime as qsm
from qsm_deploy.runtime.card.card import GeometryLimits, ReceptiveField
from qsm_deploy.runtime.cli import main

AXIAL_1MM = GeometryLimits((1.0, 1.0, 1.0), 0.1, (0.0, 0.0, 1.0), 5.0)
GRID = {"voxel_size_mm": (1, 1, 1), "b0_direction": (0, 0, 1)}


@pytest.fixture
def path(card, write_model):
    return write_model(replace(card, geometry=AXIAL_1MM))


@pytest.fixture
def model(path):
    return qsm.open_model(path, backend="onnxruntime")


@pytest.fixture
def mask(field):
    return field != 0


def test_arrays_in_an_array_out(path, model, field, mask):
    chi = model.reconstruct(field, mask, **GRID)
    np.testing.assert_allclose(chi, 2 * field, atol=1e-7)
    assert chi.dtype == np.float32
    again = qsm.reconstruct(field.astype(np.float64), mask, model=path, **GRID)
    np.testing.assert_allclose(again, chi, atol=1e-7)
    assert model.card.network == "twice"
    assert repr(model).startswith("Model(twice fp32, onnxruntime ")


def test_one_model_serves_many_scans(model, field, mask):
    maps = [model.reconstruct(factor * field, mask, **GRID) for factor in (1, 0.5)]
    np.testing.assert_allclose(maps[0], 2 * maps[1], atol=1e-7)


@pytest.mark.filterwarnings("ignore:patches approximate")
def test_progress_is_told(model, field, mask):
    seen = []
    model.reconstruct(field, mask, patch=8, progress=lambda *d: seen.append(d), **GRID)
    assert seen[-1][0] == seen[-1][1] == len(seen) > 1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"b0_direction": (0, 0, 0)}, qsm.GeometryError, "non-zero"),
        ({"voxel_size_mm": 1}, qsm.GeometryError, "expected three numbers"),
        ({"memory_limit": "2M"}, qsm.MemoryLimitError, "the limit is 2 MiB"),
        ({"memory_limit": "6"}, qsm.UsageError, "6 bytes? pass 6G"),
        ({"dc_iterations": 3}, qsm.UsageError, "--dc-iterations needs"),
        ({"overlap": 4, "patch": "off"}, qsm.UsageError, "need patches"),
    ],
)
def test_what_the_command_line_refuses_is_refused(model, field, mask, change, error, says):
    with pytest.raises(error) as refused:
        model.reconstruct(field, mask, **(GRID | change))
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f, m: (f, m[1:]), "the field has shape (21, 18, 15), the mask (20, 18, 15)"),
        (lambda f, m: (f, 0 * m), "the mask is empty"),
        (lambda f, m: (f[0], m), "expected floating numbers (x, y, z)"),
        (lambda f, m: (f.astype(int), m), "expected floating numbers"),
        (lambda f, m: (np.where(m, np.nan, f), m), "voxels inside the mask are NaN or Inf"),
        (lambda f, m: (500 * f, m), "ppm"),
        (lambda f, m: (f, np.where(m, np.nan, 0)), "voxels of the mask are NaN or Inf"),
        (lambda f, m: (np.stack([f, f]), m), "2 fields need as many B0 directions"),
    ],
)
def test_arrays_are_checked_as_files_are(model, field, mask, make, says):
    with pytest.raises(qsm.DataError) as refused:
        model.reconstruct(*make(field, mask), **GRID)
    assert says in str(refused.value)


def test_what_was_allowed_is_a_warning(model, field, mask):
    with pytest.warns(UserWarning, match="outside the training: voxel size"):
        chi = model.reconstruct(
            field, mask, voxel_size_mm=(1, 1, 2), b0_direction=(0, 0, 1), allow_geometry=True
        )
    np.testing.assert_allclose(chi, 2 * field, atol=1e-7)


def test_files_in_files_out(path, field, mask, write_volume, tmp_path):
    volume, inside = write_volume(field, "f.nii"), write_volume(mask.astype("u1"), "m.nii")
    output, report = tmp_path / "chi.nii.gz", tmp_path / "run.json"
    made = qsm.run(str(volume), mask=inside, model=path, output=str(output), report=report)
    np.testing.assert_allclose(made.chi_ppm, 2 * field, atol=1e-7)
    np.testing.assert_allclose(nib.load(output).get_fdata(), made.chi_ppm, atol=1e-7)
    assert json.loads(report.read_text()) == json.loads(json.dumps(made.report))
    assert (tmp_path / "chi.json").is_file()
    with pytest.raises(qsm.UsageError, match="exists; pass --force"):
        qsm.run(volume, mask=inside, model=path, output=output)
    assert len(made.figure().axes) > 3
    with pytest.raises(qsm.UsageError, match="lies outside the mask"):
        made.figure(slices=(900, 0, 0))
    with pytest.raises(qsm.UsageError, match="expected LOW HIGH"):
        made.figure(window=(0.1, 0))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_run_can_do_what_the_command_line_can(path, field, mask, write_volume, tmp_path):
    volume, inside = write_volume(field, "f.nii"), write_volume(mask.astype("u1"), "m.nii")
    flags = "--patch 8 --overlap 4 --blend crop --out-units ppb --negate --allow-geometry"
    flags += " --b0-direction 0 0.6 0.8 --voxel-size 1 1 2 --data-consistency 0.1 --threads 1"
    command = [path, volume, "-m", inside, "-o", tmp_path / "a.nii", "-q", *flags.split()]
    assert main([str(word) for word in command]) == 0
    qsm.run(
        volume,
        mask=inside,
        model=path,
        output=tmp_path / "b.nii",
        patch=8,
        overlap=4,
        blend="crop",
        out_units="ppb",
        negate=True,
        allow_geometry=True,
        b0_direction=(0, 0.6, 0.8),
        voxel_size=(1, 1, 2),
        data_consistency=0.1,
        threads=1,
    )
    a, b = (nib.load(tmp_path / name).get_fdata() for name in ("a.nii", "b.nii"))
    np.testing.assert_array_equal(a, b)
    sidecars = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert sidecars[0] == sidecars[1]


def test_without_an_output_nothing_is_written(path, field, write_volume, tmp_path):
    volume = write_volume(field, "f.nii")
    before = set(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="no mask given"):
        made = qsm.run(volume, model=path, dry_run=True)
    assert made.chi_ppm is None
    assert made.report["plan"]["whole_volume"]
    with pytest.raises(qsm.UsageError, match="no map to draw"):
        made.figure()
    with pytest.warns(UserWarning, match="no mask given"):
        qsm.open_model(path).run(volume)
    assert set(tmp_path.iterdir()) == before


def test_patches_that_are_not_exact_are_a_warning(card, write_model, field, mask):
    far = write_model(replace(card, receptive_field=ReceptiveField(40, 20, 0.99)), "far.onnx")
    with pytest.warns(UserWarning, match="patches approximate the whole volume"):
        qsm.reconstruct(field, mask, model=far, patch=8, **GRID)


def test_nothing_heavy_before_it_is_used():
    code = "import sys, qsm_deploy.runtime as q, qsm_deploy.export as e; q.__version__; "
    code += "print([m for m in ('numpy', 'torch', 'onnx', 'nibabel') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qsm.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"voxel_size_mm": (1, 1, 2)}, "resampled to 1 mm for"),
        ({"b0_direction": (0, 0.6, 0.8)}, "turned by 36.9 degrees for"),
    ],
)
def test_another_grid_is_made_for_a_network_and_said(model, field, mask, change, says):
    with pytest.warns(UserWarning, match=says):
        chi = model.reconstruct(field, mask, **(GRID | change))
    assert chi.shape == field.shape
    with pytest.warns(UserWarning, match="outside the training"):
        native = model.reconstruct(field, mask, **(GRID | change), allow_geometry=True)
    assert not np.array_equal(chi, native)


def test_an_affine_that_contradicts_is_refused_or_said(model, field, mask):
    with pytest.raises(qsm.GeometryError, match=r"affine has voxels of \(2, 2, 2\) mm"):
        model.reconstruct(field, mask, **GRID, axes=np.diag([2, 2, 2, 1]))
    tilted = np.diag([1.0, 1, 1, 1])
    tilted[1:3, 1:3] = [[0.8, -0.6], [0.6, 0.8]]
    with pytest.warns(UserWarning, match=r"not \(0, 0.6, 0.8\) as the affine says"):
        model.reconstruct(field, mask, **GRID, axes=tilted)
