"""A head as a BIDS dataset: valid, found by our own search, and reconstructed end to end."""

import json

import numpy as np
import pytest

from qsm_deploy.calibration.phantom.cli import main
from qsm_deploy.runtime.bids.search import find_recordings
from qsm_deploy.runtime.cli import main as run
from qsm_deploy.runtime.scan.nifti import load_volume

TIMES = ["0.004", "0.011", "0.018"]
ANAT = "sub-01/anat/sub-01"
WORDS = [*("--shape", "48", "58", "48", "--voxel-size", "3.2", "3.2", "3.3"), "--quiet"]
WORDS += ["--b0-direction", "0.1", "0.2", "1", "--background", "--snr", "100", "--echoes", *TIMES]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    assert main(["--bids", str(folder / "study"), *WORDS]) == 0
    return folder / "study"


def test_the_validator_accepts_it(study, validate):
    assert validate(study) == []
    assert validate(study / "derivatives/qsm-phantom") == []


def test_our_search_finds_the_echoes_and_the_mask(study):
    found = find_recordings(study, None, None, study / "derivatives/qsm-deploy")
    [recording] = found.recordings
    assert (recording.name, recording.source) == ("sub-01", "megre")
    assert (found.failures, found.notes()) == ({}, [])
    echoes = recording.echoes()
    assert len(echoes) == 3
    mask = recording.mask(echoes[0][0])
    assert mask == study / f"derivatives/qsm-phantom/{ANAT}_desc-brain_mask.nii.gz"


def test_the_map_of_the_echoes_is_near_the_truth(study, capsys):
    assert run(["--bids", str(study)]) == 0
    err = capsys.readouterr().err
    assert "3 echoes, phase in radians from -pi to pi" in err
    assert "bipolar" not in err
    found, truth = (
        load_volume(study / f"derivatives/{name}/{ANAT}_Chimap.nii.gz").data
        for name in ("qsm-deploy", "qsm-phantom")
    )
    inside = (found != 0) & (np.abs(truth) < 0.3)
    assert np.corrcoef(found[inside], truth[inside])[0, 1] > 0.5
    sidecar = json.loads((study / f"derivatives/qsm-phantom/{ANAT}_Chimap.json").read_text())
    assert (sidecar["Units"], sidecar["seed"], sidecar["background"]) == ("ppm", 0, True)


def test_a_bipolar_readout_is_seen(tmp_path, capsys):
    assert main(["--bids", str(tmp_path / "study"), *WORDS, "--bipolar"]) == 0
    assert run(["--bids", str(tmp_path / "study")]) == 0
    assert "bipolar" in capsys.readouterr().err


def test_folder_and_dataset_hold_the_same(tmp_path, study, capsys):
    folder, dataset = tmp_path / "head", tmp_path / "study"
    assert main([str(folder), "--bids", str(dataset), *WORDS]) == 0
    printed = capsys.readouterr().out.split()
    there = [path for root in (folder, dataset) for path in root.rglob("*") if path.is_file()]
    assert sorted(printed) == sorted(map(str, there))
    for path in dataset.rglob("*.*"):
        assert path.read_bytes() == (study / path.relative_to(dataset)).read_bytes()
    pairs = {
        "phase2": f"{ANAT}_echo-2_part-phase_MEGRE",
        "magnitude1": f"{ANAT}_echo-1_part-mag_MEGRE",
    }
    for name, other in pairs.items():
        volumes = [
            load_volume(p).data for p in (folder / f"{name}.nii.gz", dataset / f"{other}.nii.gz")
        ]
        np.testing.assert_array_equal(*volumes)


def test_only_a_new_folder_is_taken(tmp_path, study, capsys):
    for place in (study, tmp_path / "no" / "study"):
        assert main(["--bids", str(place), *WORDS, "--force"]) != 0
    assert main([str(tmp_path / "x"), "--bids", str(tmp_path / "x"), *WORDS]) == 2
    err = capsys.readouterr().err
    assert "is not empty; --bids writes a new dataset" in err
    assert "name another folder" in err
    assert not list(tmp_path.iterdir())


def test_somewhere_to_write_is_needed(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "name a folder, or --bids DIR" in capsys.readouterr().err
