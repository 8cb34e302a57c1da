"""What the runtime makes of files with published networks: tiles, echoes, several maps, chains."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.export.measure.verification import ModuleSession
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.runtime.card.card import MemoryUse
from qsm_deploy.runtime.model import Model
from qsm_deploy.runtime.reconstruction.network import CpuNetwork
from qsm_deploy.runtime.reconstructor import Reconstructor
from tests.export.golden import Golden
from tests.export.networks.conftest import Known

TOLERANCE = 1e-5


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, np.ndarray], Path]:
    """Return what writes a volume as a file on a grid of 1 mm."""

    def volume(name: str, values: np.ndarray) -> Path:
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), path)
        return path

    return volume


@pytest.fixture
def opened(known: Callable[[str], Known]) -> Callable[..., tuple[Model, Golden]]:
    """Return what opens published networks, each after the one before, and the golden vector."""

    def model(*cases: str) -> tuple[Model, Golden]:
        chain, golden = None, {}
        for case in cases:
            network, vector, golden = known(case)
            spec = REGISTRY[case.split()[0]]
            choices = Choices(spec.chosen_options(vector.options))
            card = provisional_card(spec, network, choices, "none", "0" * 64)
            card = replace(card, memory={"pytorch": MemoryUse(0, 1)})
            session = ModuleSession(network, card)
            chain = Reconstructor(CpuNetwork(session, Path(f"{case}.onnx")), before=chain)
        assert chain is not None
        return Model(chain, ()), golden

    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weighted", [True, False])
def test_echoes_are_combined_by_the_square_of_magnitude_and_time(
    weighted: bool, opened, write
) -> None:
    model, golden = opened("iqfm")
    phases, signals = (
        [write(f"{name}{n}", golden[name][..., n]) for n in range(2)]
        for name in ("phase", "magnitude")
    )
    made = model.run(
        phases,
        mask=write("mask", golden["mask"]),
        echo_times=golden["te_s"].tolist(),
        field_strength=float(golden["b0_t"]),
        magnitude=signals if weighted else None,
    )
    expected = golden["local_field" if weighted else "local_field_without_magnitude"]
    assert list(made.maps) == ["local_field_ppm"]
    assert np.abs(made.maps["local_field_ppm"] - expected).max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["chi-sepnet", "susep-net"])
def test_sources_are_parted(name: str, opened, write) -> None:
    model, golden = opened(name)
    made = model.run(
        write("field", golden["local_field"]),
        mask=write("mask", golden["mask"]),
        chi=write("chi", golden["chi"]),
        r2prime=write("r2prime", golden["r2prime_hz"]),
    )
    for sign in ("positive", "negative"):
        expected = golden[f"chi_{sign}"]
        assert np.abs(made.maps[f"chi_{sign}_ppm"] - expected).max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_the_background_is_removed(opened, write) -> None:
    model, golden = opened("bfrnet")
    made = model.run(
        write("total", golden["total_field"]),
        mask=write("mask", golden["mask"]),
    )
    expected = golden["local_field"] * golden["mask"]
    assert np.abs(made.maps["local_field_ppm"] - expected).max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_both_parts_of_nextqsm_follow_each_other(opened, write, tmp_path: Path) -> None:
    model, golden = opened("nextqsm bf", "nextqsm vn")
    local = tmp_path / "local.nii.gz"
    made = model.run(
        total_field=write("total", golden["total_field"]),
        mask=write("mask", golden["mask"]),
        local_field=local,
    )
    inside = golden["mask"] > 0
    assert np.abs(nib.load(local).get_fdata() - golden["local_field"]).max() <= TOLERANCE
    error = np.abs(made.maps["chi_ppm"] - golden["chi"])[inside]
    assert (error <= TOLERANCE).mean() >= 0.999  # ReLU and sign may flip where a voxel is near 0
    assert error.max() <= 1e-3


@pytest.mark.filterwarnings("ignore")
def test_tiles_of_qsmgan_lie_side_by_side(opened, write) -> None:
    model, golden = opened("qsmgan")
    everywhere = write("mask", np.ones_like(golden["mask"]))
    field = write("field", golden["local_field"])
    made = model.run(field, mask=everywhere, negate=True, allow_geometry=True)
    expected = golden["chi_stitched_unmasked_sub2"]
    assert np.abs(made.maps["chi_ppm"][::2, ::2, ::2] - expected).max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_tiles_of_autoqsm_fade_into_each_other(opened, write) -> None:
    model, golden = opened("autoqsm")
    field = write("total", golden["total_field"])
    brain = np.zeros(golden["total_field"].shape, dtype=np.uint8)
    brain[4:-4, 4:-4, 4:-4] = 1
    made = model.run(field, mask=write("mask", brain), negate=True)
    expected = golden["chi"] * brain  # the field counts outside the mask too
    assert np.abs(made.maps["chi_ppm"] - expected).max() <= TOLERANCE
