"""The example of a network of one's own: trained, exported in three precisions, and run."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.calibration.phantom.cli import main as draw
from qsm_deploy.export import write_network
from qsm_deploy.export.cli import main as export
from qsm_deploy.runtime.card.card import MemoryUse
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.cli import main as run

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_network"
BOX = (32, 32, 64)  # of the field that a halo is measured on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with weights of hardly any training, and a head."""
    if not EXAMPLE.exists():
        pytest.skip("the examples are not part of the source distribution")
    made: Path = tmp_path_factory.mktemp("own")
    command = [sys.executable, str(EXAMPLE / "train.py"), "--seconds", "0.1"]
    subprocess.run([*command, "--output", str(made / "weights.pth")], check=True)
    grid = ["--shape", "48", "40", "48", "--voxel-size", "2", "2", "2"]
    assert draw([str(made / "head"), *grid, "-q"]) == 0
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        "",
        "--fp16 --gate-ppb 100",
        "--int8 --calibration phantoms --budget-ppb 50 --budget-max-ppb 5000 --budget-xsim 0.1",
    ],
    ids=["fp32", "fp16", "int8"],
)
def test_from_training_to_a_map(folder: Path, monkeypatch, chosen: str) -> None:
    for name, value in (("HEAD", (48, 48, 64)), ("BOX", BOX)):
        monkeypatch.setattr(f"qsm_deploy.export.measure.receptive_field.{name}", value)
    monkeypatch.setattr(
        write_network, "measure_memory", lambda path, backend: MemoryUse(10**7, 200)
    )
    monkeypatch.chdir(folder)
    precision = chosen.partition(" ")[0].removeprefix("--") or "fp32"
    model, chi = f"{precision}.onnx", f"map-{precision}.nii.gz"
    stated = ["--weights", "weights.pth", "--card", str(EXAMPLE / "card.toml"), "-o", model]
    assert export(["--module", f"{EXAMPLE / 'net.py'}:build", *stated, *chosen.split()]) == 0
    card = load_card(Path(model))
    assert (card.network, card.precision, card.divisor) == ("small-unet", precision, 4)
    assert (card.patchable, card.receptive_field.theoretical) == ("yes", 23)
    assert card.geometry.voxel_size_mm == (2, 2, 2)
    assert run([model, "head/field.nii.gz", "-m", "head/mask.nii.gz", "-o", chi]) == 0
    chi_ppm = np.asanyarray(nib.load(chi).dataobj)
    mask = np.asanyarray(nib.load("head/mask.nii.gz").dataobj) > 0
    assert chi_ppm.shape == (48, 40, 48)
    assert np.isfinite(chi_ppm).all()
    assert chi_ppm[mask].std() > 0
    assert not chi_ppm[~mask].any()
