"""``--out-dtype int16``: whole ppb that every reader scales back to the map."""

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import qsm_deploy.runtime as qsm
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import ModelCard, TensorInfo
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.job.whole_ppb import in_steps, step_ppb
from qsm_deploy.runtime.scan.nifti import load_volume

VOLUME = ("n", 1, "x", "y", "z")
SLOPE_PLACE, INTERCEPT_PLACE = 112, 116  # of a NIfTI-1 header
ROUNDING_PPB = 0.01  # of a slope and of values in float32, at the end of the range


@pytest.fixture
def mapped(card, write_model, write_volume, field, tmp_path, capsys):
    """Return a function that runs qsm-run on a field: its map is ``factor`` times the field."""
    path = write_volume(field, "field.nii.gz")

    def run(line: str, factor: float = 2.0, name: str = "chi.nii.gz") -> tuple[Path, dict, str]:
        model = write_model(card, factor=factor)
        output = tmp_path / name
        assert main([str(model), str(path), "-o", str(output), "--force", *line.split()]) == 0
        sidecar = output.with_name(f"{name.partition('.')[0]}.json")
        return output, json.loads(sidecar.read_text()), capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", ["chi.nii", "chi.nii.gz"])
@pytest.mark.parametrize(("unit", "per_ppm"), [("ppm", 1.0), ("ppb", 1000.0)])
def test_a_reader_gets_the_map_in_its_unit(mapped, field, name, unit, per_ppm) -> None:
    path, said, _ = mapped(f"--out-dtype int16 --out-units {unit}", name=name)
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if name.endswith(".gz") else raw
    assert struct.unpack_from("<hh", raw, 70) == (4, 16)  # int16
    slope, intercept = struct.unpack_from("<ff", raw, SLOPE_PLACE)
    assert (slope, intercept) == (np.float32(per_ppm / 1000), 0)
    assert (said["units"], said["dtype"], said["step_ppb"]) == (unit, "int16", 1)
    image = nib.load(path)
    for read in (image.get_fdata(), image.get_fdata(dtype=np.float32), load_volume(path).data):
        error_ppb = 1000 * np.abs(read / per_ppm - 2 * field)
        assert 0.45 < error_ppb.max() < 0.5 + ROUNDING_PPB
        assert not read[field == 0].any()
    np.testing.assert_array_equal(image.dataobj.get_unscaled(), np.rint(2000 * field))


def test_float32_is_as_it_was(mapped, field) -> None:
    path, said, _ = mapped("")
    assert nib.load(path).get_data_dtype() == np.float32
    assert said["dtype"] == "float32"
    assert "step_ppb" not in said


def test_a_map_of_whole_ppb_is_a_truth_to_compare_with(mapped, tmp_path) -> None:
    path, _, _ = mapped("--out-dtype int16", name="whole.nii.gz")
    report = tmp_path / "again.json"
    mapped(f"--truth {path} --report {report}")
    assert json.loads(report.read_text())["metrics"]["mean_abs_error_ppb"] < 0.5


@pytest.mark.parametrize(
    ("most_ppm", "step"),
    [(0.0, 1), (32.767, 1), (-32.767, 1), (32.77, 2), (-65.6, 3), (1e30, None)],
)
def test_the_step_is_the_finest_that_holds_a_map(most_ppm, step) -> None:
    maps = [np.array([0, 0.1, -0.2], np.float32), np.array([most_ppm, 0, 0], np.float32)]
    found = step_ppb(maps)
    assert step is None or found == step
    for volume in maps:
        back_ppm = in_steps(volume, found) * (found / 1000)
        error_ppb = 1000 * np.abs(back_ppm - volume.astype(np.float64)).max()
        assert error_ppb <= found * (0.5 + ROUNDING_PPB)


def test_more_than_int16_holds_is_said_and_does_not_wrap(mapped, field) -> None:
    path, said, err = mapped("--out-dtype int16", factor=1000.0)
    chi = 1000 * field
    step = said["step_ppb"]
    assert step == np.ceil(1000 * np.abs(chi).max() / 32767) > 1
    assert (
        f"goes beyond 32.767 ppm, the most of int16 in whole ppb: it is stored in steps of {step}"
        in err
    )
    assert any(f"steps of {step} ppb" in note for note in said["input"]["notes"])
    assert "no tissue has as much" in err
    read = nib.load(path).get_fdata()
    assert 1000 * np.abs(read - chi).max() < step * (0.5 + ROUNDING_PPB)
    assert not read[field == 0].any()


def test_both_parts_of_a_map_have_one_step(
    card: ModelCard, write_model: Callable[..., Path], write_volume, field, tmp_path
) -> None:
    parts = [TensorInfo(f"chi_{sign}_ppm", "ppm", VOLUME) for sign in ("positive", "negative")]
    outputs = {"output": parts[0], "further_outputs": (parts[1],)}
    inputs = (card.inputs[0], TensorInfo("r2prime_hz", "Hz", VOLUME))
    inputs = (*inputs, TensorInfo("chi_ppm", "ppm", VOLUME))
    task = "local_field+chi+r2prime->chi_positive+chi_negative"
    model = write_model(replace(card, task=task, inputs=inputs, **outputs), factor=900.0)
    volumes = {"field": field, "chi": field, "r2prime": np.abs(field)}
    paths = {name: write_volume(volume, f"{name}.nii") for name, volume in volumes.items()}
    command = [str(model), str(paths["field"]), "--chi", str(paths["chi"]), "-q"]
    command += ["--r2prime", str(paths["r2prime"]), "-o", str(tmp_path / "parts.nii")]
    assert main([*command, "--out-dtype", "int16"]) == 0
    for times, sign in ((900, "positive"), (1800, "negative")):
        path = tmp_path / f"parts_chi-{sign}.nii"
        step = json.loads(path.with_suffix(".json").read_text())["step_ppb"]
        assert step == np.ceil(1800 * np.abs(1000 * field).max() / 32767)
        assert nib.load(path).dataobj.slope == np.float32(step / 1000)
        read = nib.load(path).get_fdata()
        assert 1000 * np.abs(read - times * field).max() < step * (0.5 + ROUNDING_PPB)


def test_python_stores_whole_ppb_and_gives_all_of_the_map(write_volume, field, tmp_path):
    path = write_volume(field, "field.nii.gz")
    output = tmp_path / "python.nii.gz"
    mask = write_volume((field != 0).astype(np.uint8), "mask.nii.gz")
    made = qsm.run(path, mask=mask, method="tkd", output=output, out_dtype="int16")
    assert nib.load(output).get_data_dtype() == np.int16
    read = nib.load(output).get_fdata()
    assert 0 < 1000 * np.abs(read - made.chi_ppm).max() < 0.5 + ROUNDING_PPB
    with pytest.raises(UsageError, match="out_dtype is 'int8', expected one of float32, int16"):
        qsm.run(path, method="tkd", out_dtype="int8")


def test_what_is_no_susceptibility_is_not_stored_as_whole_ppb(
    card, write_model, write_volume, field, capsys
) -> None:
    total = TensorInfo("total_field_ppm", "ppm", VOLUME)
    local = TensorInfo("local_field_ppm", "ppm", VOLUME)
    task = "total_field->local_field"
    model = write_model(replace(card, task=task, inputs=(total,), output=local))
    path = write_volume(field, "total.nii.gz")
    until = ["--total-field", str(path), "--until", "local-field", "--local-field", "local.nii.gz"]
    for words, made in (
        ([str(model), str(path)], "local_field_ppm"),
        ([*until, "-m", str(path)], "local-field"),
    ):
        assert main([*words, "--out-dtype", "int16"]) == 2
        assert f"is whole ppb of susceptibility, and {made} is made" in capsys.readouterr().err
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "total.nii.gz"]


def test_maps_on_the_way_stay_float32(write_volume, field, tmp_path) -> None:
    path = write_volume(field, "total.nii.gz")
    mask = write_volume((field != 0).astype(np.uint8), "mask.nii.gz")
    local, chi = (tmp_path / f"{name}.nii.gz" for name in ("local", "chi"))
    words = [
        "--total-field",
        path,
        "-m",
        mask,
        "--local-field",
        local,
        "-o",
        chi,
        "--method",
        "tkd",
    ]
    words += ["--background-removal", "vsharp", "--out-dtype", "int16", "-q"]
    assert main([str(word) for word in words]) == 0
    assert nib.load(local).get_data_dtype() == np.float32
    assert nib.load(chi).get_data_dtype() == np.int16
