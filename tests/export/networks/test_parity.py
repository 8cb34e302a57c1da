"""IR2QSM against the outputs of the published network, and against three ways to get it wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qsm_deploy.export.networks.ir2qsm import IR2QSM, Residual

GOLDEN = Path(__file__).parent / "golden" / "ir2qsm.npz"
TOLERANCE_PPM = 1e-5
WRONG_PPM = 1e-3
CASES = {"published": "input", "legacy": "iteration"}
STRIDE = int(np.load(GOLDEN)["stride"])


def run(network: IR2QSM, formula_state) -> tuple[np.ndarray, np.ndarray]:
    """Return the output and the intermediate ones, (x, y, z) and (iterations, x, y, z)."""
    network.load_state_dict(formula_state(network.state_dict()))
    with torch.inference_mode():
        chi, outputs = network.eval().all_outputs(torch.from_numpy(np.load(GOLDEN)["input"]))
    return chi[0, 0].numpy(), torch.cat(outputs, dim=1)[0].numpy()


def subset(residual: str) -> tuple[np.ndarray, np.ndarray]:
    golden = np.load(GOLDEN)
    return golden[f"output_{residual}"], golden[f"all_{residual}"]


@pytest.mark.parametrize("residual", ["input", "iteration"])
def test_equals_the_committed_voxels(residual: Residual, formula_state) -> None:
    chi, outputs = run(IR2QSM(residual=residual), formula_state)
    expected, expected_all = subset(residual)
    assert expected.size > 900
    assert np.abs(chi.reshape(-1)[::STRIDE] - expected).max() <= TOLERANCE_PPM
    assert np.abs(outputs.reshape(4, -1)[:, ::STRIDE] - expected_all).max() <= TOLERANCE_PPM


@pytest.mark.parametrize("case", list(CASES))
def test_equals_every_golden_voxel(case: str, shared: Path, formula_state) -> None:
    golden = np.load(shared / "specs" / "golden" / f"ir2qsm_noisefree_{case}_residual.npz")
    chi, outputs = run(IR2QSM(residual=CASES[case]), formula_state)
    assert np.abs(chi - golden["output"][0, 0]).max() <= TOLERANCE_PPM
    assert np.abs(outputs - golden["all_output"][0]).max() <= TOLERANCE_PPM


def largest_difference(network: IR2QSM, formula_state) -> float:
    chi, _ = run(network, formula_state)
    return float(np.abs(chi.reshape(-1)[::STRIDE] - subset("input")[0]).max())


@pytest.mark.slow
def test_the_other_residual_fails(formula_state) -> None:
    assert largest_difference(IR2QSM(residual="iteration"), formula_state) > WRONG_PPM


@pytest.mark.slow
def test_a_swapped_concatenation_fails(formula_state, monkeypatch) -> None:
    cat = torch.cat

    def swapped(tensors: list[Tensor], dim: int = 0) -> Tensor:
        return cat(tensors[::-1] if len(tensors) == 2 else tensors, dim=dim)

    network = IR2QSM()
    monkeypatch.setattr("qsm_deploy.export.networks.ir2qsm.torch.cat", swapped)
    assert largest_difference(network, formula_state) > WRONG_PPM


@pytest.mark.slow
def test_a_missing_final_add_fails(formula_state) -> None:
    class WithoutFinalAdd(IR2QSM):
        def all_outputs(self, local_field_ppm: Tensor) -> tuple[Tensor, list[Tensor]]:
            chi, outputs = super().all_outputs(local_field_ppm)
            return chi - local_field_ppm, outputs

    assert largest_difference(WithoutFinalAdd(), formula_state) > WRONG_PPM


def test_noise_and_dropout_are_gone(tiny_ir2qsm) -> None:
    field = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(tiny_ir2qsm(field), tiny_ir2qsm(field))
    assert not [m for m in tiny_ir2qsm.modules() if "Dropout" in type(m).__name__]
