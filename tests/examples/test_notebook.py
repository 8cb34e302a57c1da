"""The notebook of the Python API, cell by cell in one namespace: what it shows must work."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "python_api.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    """Return the cells of one kind, in order."""
    if not NOTEBOOK.exists():
        pytest.skip("the examples are not part of the source distribution")
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_is_committed_without_outputs_and_its_links_lead_somewhere() -> None:
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells("code"))
    text = "".join(line for cell in cells("markdown") for line in cell["source"])
    assert (NOTEBOOK.parent / "../docs/python.md").is_file()
    assert "(../docs/python.md)" in text


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what its code leaves, run in an empty folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "Agg")
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        names["folder"] = Path.cwd()
        for cell in cells("code"):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}#{cell['id']}", "exec"), names)
        names["plt"].close("all")
    return names


def test_the_map_is_one_and_the_network_serves_again(left) -> None:
    chi, mask = left["chi_ppm"], left["mask"]
    assert max(left["SHAPE"]) <= 64
    assert chi.shape == left["SHAPE"]
    assert np.isfinite(chi).all()
    assert not chi[~mask].any()
    assert np.array_equal(left["network_ppm"], left["once_more"])


def test_total_variation_and_the_network_are_nearer_to_the_truth_than_tkd(left) -> None:
    variation, network, tkd = (left["scores"][name] for name in ("TV", "tv-unet", "TKD"))
    nearer = max(variation["nrmse_percent"], network["nrmse_percent"])
    assert nearer < tkd["nrmse_percent"]
    assert network["correlation"] > 0.8


def test_files_give_the_map_that_arrays_give(left) -> None:
    assert np.abs(left["result"].chi_ppm - left["chi_ppm"]).max() < 1e-6
    written = nib.load(left["folder"] / "reconstructed.nii.gz").get_fdata()
    assert np.abs(written - left["chi_ppm"]).max() < 1e-6
    found = left["result"].report["metrics"]["nrmse_percent"]
    assert found == pytest.approx(left["scores"]["TV"]["nrmse_percent"], rel=1e-4)


def test_it_draws_and_shows_a_refusal(left) -> None:
    assert (left["folder"] / "maps.png").stat().st_size > 10_000
    assert "\n" not in left["refusal"]
    assert "(63, 64, 64)" in left["refusal"]
