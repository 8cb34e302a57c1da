"""Calibration maps as they are read, and those that cannot serve."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qsm_deploy.calibration.int8 import volumes
from qsm_deploy.calibration.int8.volumes import load_calibration
from qsm_deploy.calibration.phantom.orientation import affine_from_geometry
from qsm_deploy.kernels.errors import DataError, GeometryError, UnitsError, UsageError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import TASKS, UNITS, ModelCard, TensorInfo
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from tests.runtime.storages import SPREAD

SHAPE = (12, 14, 10)
AXIAL = Geometry(SHAPE)
SEPARATION = "local_field+chi+r2prime->chi_positive+chi_negative"


def write(folder: Path, name: str, data: np.ndarray, geometry: Geometry = AXIAL) -> None:
    folder.mkdir(exist_ok=True)
    array = data.astype(np.float32)
    (folder / f"{name}.nii.gz").write_bytes(nifti_bytes(array, affine_from_geometry(geometry)))


def head(folder: Path, name: str = "a", scale: float = 0.02, geometry: Geometry = AXIAL) -> None:
    rng = np.random.default_rng(len(name))
    mask = np.zeros(SHAPE)
    mask[2:-2, 2:-2, 2:-2] = 1
    write(folder, name, scale * rng.standard_normal(SHAPE), geometry)
    write(folder, f"{name}_mask", mask, geometry)


def test_fields_are_masked_and_what_is_odd_is_told(tmp_path: Path, any_card: ModelCard) -> None:
    head(tmp_path)
    data = load_calibration(str(tmp_path), any_card)
    (scan,) = data.scans
    assert not scan.measured[0][~scan.mask].any()
    assert any("one map only" in note for note in data.notes)
    head(tmp_path, "bb")
    again = load_calibration(str(tmp_path), any_card)
    assert len(again.scans) == 2
    assert not any("one map only" in note for note in again.notes)


def test_what_is_needed_of_files(tmp_path: Path, any_card: ModelCard) -> None:
    head(tmp_path)
    field = load_calibration(str(tmp_path), any_card).scans[0]
    whole = replace(any_card, constants={"unmasked": 1.0})
    scan = load_calibration(str(tmp_path), whole).scans[0]
    assert scan.measured[0][~scan.mask].any()
    np.testing.assert_array_equal(scan.measured[:, scan.mask], field.measured[:, scan.mask])
    first, besides, given = TASKS[SEPARATION]
    made = [TensorInfo(n, UNITS[n], any_card.output.shape) for n in (first, *besides, *given)]
    split = {"inputs": tuple(made[:3]), "output": made[3], "further_outputs": tuple(made[4:])}
    separates = replace(any_card, task=SEPARATION, **split)
    with pytest.raises(UsageError, match=r"takes chi_ppm and r2prime_hz .* --calibration phantoms"):
        load_calibration(str(tmp_path), separates)


def test_the_digest_is_of_what_the_files_hold(tmp_path: Path, any_card: ModelCard) -> None:
    head(tmp_path / "one")
    head(tmp_path / "two", "a")
    first, second = (load_calibration(str(tmp_path / n), any_card) for n in ("one", "two"))
    assert first.sha256 == second.sha256
    assert len(first.sha256) == 64
    head(tmp_path / "two", "a", scale=0.021)
    assert load_calibration(str(tmp_path / "two"), any_card).sha256 != first.sha256


def test_one_head_is_the_same_in_any_storage(tmp_path: Path, axial_card: ModelCard) -> None:
    field, mask = 0.02 * np.random.default_rng(4).normal(size=SHAPE), np.zeros(SHAPE)
    mask[2:-2, 2:-3, 3:-2] = 1
    digests = set()
    for storage in SPREAD:
        affine = storage.affine(np.eye(4), SHAPE)
        for name, data in (("a", field), ("a_mask", mask)):
            stored = storage.of(data.astype(np.float32))
            (tmp_path / f"{name}.nii.gz").write_bytes(nifti_bytes(stored, affine))
        digests.add(load_calibration(str(tmp_path), axial_card).sha256)
    assert len(digests) == 1


def test_maps_in_hz_are_read_with_their_parameters(tmp_path: Path, any_card: ModelCard) -> None:
    head(tmp_path, scale=3.0)
    with pytest.raises(UnitsError, match="--calibration-units") as caught:
        load_calibration(str(tmp_path), any_card)
    assert "a.nii.gz: the field's 99th percentile" in str(caught.value)
    with pytest.raises(UnitsError, match="--calibration-units"):
        load_calibration(str(tmp_path), any_card, "hz")
    (tmp_path / "params.json").write_text(json.dumps({"field_strength_t": 3.0}))
    scan = load_calibration(str(tmp_path), any_card, "hz").scans[0]
    assert np.abs(scan.measured).max() < 0.2


def test_a_constant_map_is_refused(tmp_path: Path, any_card: ModelCard) -> None:
    head(tmp_path)
    write(tmp_path, "a", np.full(SHAPE, 0.01))
    with pytest.raises(DataError, match=r"a\.nii\.gz: constant inside its mask \(0\.01\)"):
        load_calibration(str(tmp_path), any_card)


def test_maps_are_brought_to_the_grid_of_the_training(tmp_path: Path, axial_card) -> None:
    head(tmp_path, geometry=Geometry(SHAPE, (1.0, 1.0, 2.0), b0_direction=(0.0, 0.5, 0.8)))
    data = load_calibration(str(tmp_path), axial_card)
    (scan,) = data.scans
    assert scan.geometry.voxel_size_mm == (1, 1, 1)
    np.testing.assert_allclose(scan.geometry.b0_direction, (0, 0, 1), atol=1e-6)
    assert any("turned by 32.0 degrees and resampled to 1 mm" in note for note in data.notes)


def test_a_phase_on_another_grid_is_refused(tmp_path: Path, axial_card) -> None:
    shape = ("n", 1, "x", "y", "z")
    inputs = (TensorInfo("phase_rad", "rad", shape), TensorInfo("mask", "1", shape))
    card = replace(axial_card, task="phase->chi", inputs=inputs)
    head(tmp_path, scale=0.4, geometry=Geometry(SHAPE, b0_direction=(0.0, 0.5, 0.8)))
    said = {"echo_time_s": 0.02, "field_strength_t": 3.0}
    (tmp_path / "params.json").write_text(json.dumps(said))
    with pytest.raises(GeometryError, match="degrees off") as caught:
        load_calibration(str(tmp_path), card)
    assert "calibrate with maps that the network is for" in str(caught.value)


def test_a_mask_on_another_grid_or_without_a_voxel_is_refused(tmp_path: Path, any_card) -> None:
    head(tmp_path)
    write(tmp_path, "a_mask", np.zeros(SHAPE))
    with pytest.raises(DataError, match="the mask is empty"):
        load_calibration(str(tmp_path), any_card)
    write(tmp_path, "a_mask", np.ones((5, 5, 5)), Geometry((5, 5, 5)))
    with pytest.raises(GeometryError, match="has shape"):
        load_calibration(str(tmp_path), any_card)


def test_as_many_fields_as_the_network_takes(tmp_path: Path, any_card: ModelCard) -> None:
    head(tmp_path)
    (tmp_path / "list.txt").write_text("a.nii.gz a.nii.gz a_mask.nii.gz\n")
    with pytest.raises(UsageError, match="takes 1 fields of each head, 2 are there"):
        load_calibration(str(tmp_path / "list.txt"), any_card)


def test_phantoms_are_drawn_only_for_their_name(monkeypatch, any_card, axial_card) -> None:
    small = [replace(grid, shape=(24, 28, 20)) for grid in volumes.GRIDS]
    monkeypatch.setattr(volumes, "GRIDS", small)
    data = load_calibration("phantoms", any_card)
    assert len({scan.geometry.voxel_size_mm for scan in data.scans}) == 3
    assert len({scan.geometry.b0_direction for scan in data.scans}) == 3
    assert data.sha256 == load_calibration("phantoms", any_card).sha256
    axial = load_calibration("phantoms", axial_card)
    assert {scan.geometry.b0_direction for scan in axial.scans} == {(0.0, 0.0, 1.0)}
    with pytest.raises(UsageError, match="is about files"):
        load_calibration("phantoms", any_card, "ppm")
