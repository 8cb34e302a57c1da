"""The two parts of AFTER-QSM: their order, their grids, and a run from the command line."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import TensorInfo
from qsm_deploy.runtime.cli import main
from qsm_deploy.runtime.job import memory_limit
from qsm_deploy.runtime.reconstruction.after import in_order

SHAPE = ("n", 1, "x", "y", "z")


@pytest.fixture
def cards(card):
    recon = replace(card, network="after-qsm", pipeline="after", options={"part": "recon"})
    rough = (TensorInfo("rough_chi_ppm", "ppm", SHAPE),)
    return recon, replace(recon, inputs=rough, divisor=1, options={"part": "refine"})


@pytest.fixture
def models(cards, write_model) -> list[Path]:
    recon, refine = cards
    return [write_model(recon, "recon.onnx", 2.0), write_model(refine, "refine.onnx", 3.0)]


@pytest.fixture
def smooth(write_volume) -> Path:
    """Return a file of a smooth field on an oblique, anisotropic grid."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (22, 18, 15)], indexing="ij")
    field = (0.05 * np.exp(-4 * (x**2 + y**2 + z**2)) - 0.004) * (x**2 + y**2 + z**2 < 0.8)
    turn = np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]) @ np.diag([1.0, 1.0, 1.5])
    affine = np.eye(4)
    affine[:3, :3] = turn
    return write_volume(field.astype(np.float32), "field.nii.gz", affine)


def test_either_order_becomes_recon_then_refine(cards) -> None:
    recon, refine = cards
    assert in_order([recon, refine]) == [0, 1]
    assert in_order([refine, recon]) == [1, 0]


def test_other_combinations_are_refused(cards, card) -> None:
    recon, refine = cards
    for given in ([recon], [refine], [recon, recon], [card, card], [card, refine]):
        with pytest.raises(UsageError, match="pass both files"):
            in_order(given)
    assert in_order([card]) == [0]


def run(models, field, tmp_path, *flags) -> tuple[np.ndarray, dict]:
    arguments = [*models, field, "-o", tmp_path / "chi.nii.gz", "--force", *flags]
    arguments += ["--report", tmp_path / "report.json", "-q"]
    assert main([str(a) for a in arguments]) == 0
    chi = nib.load(tmp_path / "chi.nii.gz").get_fdata(dtype=np.float32)
    return chi, json.loads((tmp_path / "report.json").read_text())


def test_a_map_goes_through_both_and_comes_back_to_its_grid(models, smooth, tmp_path) -> None:
    chi, report = run(models, smooth, tmp_path)
    field = nib.load(smooth).get_fdata(dtype=np.float32)
    assert np.abs(chi - 6 * field)[field > 0.01].max() < 0.15 * 6 * field.max()  # the mask's edge
    assert np.abs(chi - 6 * field)[field > 0.03].max() < 0.03 * 6 * field.max()
    assert (chi[field == 0] == 0).all()
    first = report["first_part"]
    assert first["model"]["file"] == "recon.onnx"
    assert first["geometry"]["voxel_size_mm"] == [0.6] * 3
    assert first["geometry"]["b0_direction"] == [0, 0, 1]
    assert min(first["geometry"]["shape"]) > 28  # 18 mm at 0.6 mm, turned
    assert report["model"]["file"] == "refine.onnx"
    assert report["geometry"]["shape"] == [22, 18, 15]


def test_patches_of_both_equal_the_whole(models, smooth, tmp_path) -> None:
    whole, _ = run(models, smooth, tmp_path)
    patched, report = run(models, smooth, tmp_path, "--patch", "16")
    assert not report["plan"]["whole_volume"]
    assert report["first_part"]["plan"]["patches"] > 1
    np.testing.assert_allclose(patched, whole, atol=1e-6)


def test_a_dry_run_tells_of_both(models, smooth, capsys) -> None:
    assert main([*map(str, models), str(smooth), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "recon.onnx" in out
    assert "refine.onnx" in out
    assert "0.6, 0.6, 0.6" in out


def test_one_part_alone_is_refused(models, smooth, capsys) -> None:
    for model in models:
        assert main([str(model), str(smooth)]) == 2
        assert "--part recon|refine" in capsys.readouterr().err


def test_a_limit_too_small_for_the_first_part_is_refused(
    models, smooth, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(memory_limit, "rss_bytes", lambda: 0)  # of a program that took none
    monkeypatch.setattr(memory_limit, "LIBRARIES_BYTES", 0)
    assert main([*map(str, models), str(smooth), "--memory-limit", "12M"]) == 6
    assert "would need" in capsys.readouterr().err
