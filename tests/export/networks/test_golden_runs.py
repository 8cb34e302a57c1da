"""What the runtime makes of files with published networks: tiles, echoes, several maps, chains."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.runtime import run
from qsm_deploy.runtime.card.card import MemoryUse, ReceptiveField
from tests.export.networks.test_golden import ROWS, TOLERANCE, State, built

Golden = Mapping[str, np.ndarray]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, np.ndarray], Path]:
    """Return what writes a volume as a file on a grid of 1 mm."""

    def volume(name: str, values: np.ndarray) -> Path:
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), path)
        return path

    return volume


@pytest.fixture
def model(
    tmp_path: Path, shared: Path, formula_state: Callable[..., State]
) -> Callable[[str, Golden], Path]:
    """Return what writes the graph of a row of the table with its card."""

    def written(name: str, golden: Golden) -> Path:
        row = ROWS[name]
        network = built(row, golden, shared, formula_state)
        spec = REGISTRY[row.network]
        choices = Choices(spec.chosen_options(row.options))
        card = provisional_card(spec, network, choices, "none", "0" * 64)
        if card.patchable == "yes":
            card = replace(card, receptive_field=ReceptiveField(8, 8, 1.0))
        card = replace(card, memory={"onnxruntime": MemoryUse(0, 1)})
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(with_card(onnx_from_module(network), card))
        return path

    return written


@pytest.fixture
def golden_of(shared: Path) -> Callable[[str], Golden]:
    return lambda name: np.load(shared / "specs" / "golden" / f"{ROWS[name].golden}.npz")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weighted", [True, False])
def test_echoes_are_combined_by_the_square_of_magnitude_and_time(
    weighted: bool, golden_of, model, write
) -> None:
    golden = golden_of("iqfm")
    phases, signals = (
        [write(f"{name}{n}", golden[name][..., n]) for n in range(2)]
        for name in ("phase", "magnitude")
    )
    made = run(
        phases,
        model=model("iqfm", golden),
        mask=write("mask", golden["mask"]),
        echo_times=golden["te_s"].tolist(),
        field_strength=float(golden["b0_t"]),
        magnitude=signals if weighted else None,
        backend="onnxruntime",
    )
    expected = golden["local_field" if weighted else "local_field_without_magnitude"]
    assert list(made.maps) == ["local_field_ppm"]
    assert np.abs(made.maps["local_field_ppm"] - expected).max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["chi-sepnet", "susep-net"])
def test_sources_are_parted(name: str, golden_of, model, write, tmp_path: Path) -> None:
    golden = golden_of(name)
    made = run(
        write("field", golden["local_field"]),
        model=model(name, golden),
        mask=write("mask", golden["mask"]),
        chi=write("chi", golden["chi"]),
        r2prime=write("r2prime", golden["r2prime_hz"]),
        output=tmp_path / "parted.nii.gz",
        backend="onnxruntime",
    )
    for sign in ("positive", "negative"):
        expected = golden[f"chi_{sign}"]
        assert np.abs(made.maps[f"chi_{sign}_ppm"] - expected).max() <= TOLERANCE
        stored = nib.load(tmp_path / f"parted_chi-{sign}.nii.gz").get_fdata()
        assert np.abs(stored - expected).max() <= TOLERANCE
