"""Both CNNs of AFTER-QSM against the published ones, and against ways to get them wrong."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.after_qsm import (
    RECON,
    REFINE,
    AfterRecon,
    AfterRefine,
    network_from_state,
)
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.kernels.errors import WeightsError

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE_PPM = 1e-5
WRONG_PPM = 1e-3
BACKENDS = ["pytorch", "onnxruntime", "openvino"]
VECTORS = {"recon": "after_recon_unet", "refine": "after_refine"}
CENTRE = slice(8, 24)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def volumes() -> dict[str, Tensor]:
    """Return the input of the golden vector of each part."""
    field = torch.from_numpy(np.load(GOLDEN / "ir2qsm.npz")["input"])
    return {"recon": field, "refine": field[:, :, CENTRE, CENTRE, CENTRE].contiguous()}


@pytest.fixture(scope="module")
def checkpoint(formula_state) -> State:
    """Return both halves; the formula knows the keys without what stands before them."""
    halves = {RECON: AfterRecon().recon_model_state, REFINE: AfterRefine().refine_model_state}
    return {
        prefix + key: value
        for prefix, half in halves.items()
        for key, value in formula_state(half.state_dict()).items()
    }


@pytest.fixture(scope="module")
def networks(checkpoint) -> dict[str, Network]:
    return {part: built(part, checkpoint) for part in VECTORS}


@pytest.fixture(scope="module")
def graphs(networks) -> dict[str, onnx.ModelProto]:
    return {part: onnx_from_module(network) for part, network in networks.items()}


def built(part: str, state: State) -> Network:
    return network_from_state(state, Choices({"part": part}))


@pytest.fixture(scope="module")
def outputs(run_everywhere, networks, graphs, volumes) -> dict[str, dict[str, np.ndarray]]:
    return {part: run_everywhere(networks[part], graphs[part], volumes[part]) for part in VECTORS}


def difference(chi: np.ndarray, part: str) -> float:
    """Return the largest difference from the committed voxels [ppm]."""
    golden = np.load(GOLDEN / "after_qsm.npz")
    expected = golden[f"output_{part}"]
    assert expected.size > 120
    return float(np.abs(chi.reshape(-1)[:: int(golden["stride"])] - expected).max())


@pytest.mark.parametrize("part", list(VECTORS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_committed_voxels(part: str, backend: str, outputs) -> None:
    assert difference(outputs[part][backend], part) <= TOLERANCE_PPM


@pytest.mark.parametrize("part", list(VECTORS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_every_golden_voxel(part: str, backend: str, shared: Path, outputs) -> None:
    golden = np.load(shared / "specs" / "golden" / f"{VECTORS[part]}.npz")["output"]
    assert outputs[part][backend].shape == golden.shape
    assert np.abs(outputs[part][backend] - golden).max() <= TOLERANCE_PPM


@pytest.mark.parametrize(("part", "shape"), [("recon", (16, 32, 48)), ("refine", (7, 5, 9))])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_its_graph_takes_any_batch_and_size(part, shape, backend, run, networks, graphs) -> None:
    other = 0.02 * torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    chi = run(networks[part], other)
    assert np.abs(run(graphs[part], other, backend=backend) - chi).max() <= TOLERANCE_PPM


@pytest.mark.slow
@pytest.mark.parametrize("part", list(VECTORS))
def test_a_swapped_concatenation_fails(part: str, run, networks, volumes, monkeypatch) -> None:
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, dim: cat(tensors[::-1], dim))
    assert difference(run(networks[part], volumes[part]), part) > WRONG_PPM


@pytest.mark.parametrize("part", list(VECTORS))
def test_a_global_residual_fails(part: str, outputs, volumes) -> None:
    assert difference(outputs[part]["pytorch"] + volumes[part].numpy(), part) > WRONG_PPM


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["feature_extraction2", "feature_fusion_global"])
def test_an_activation_outside_the_dense_layers_fails(run, layer, checkpoint, volumes) -> None:
    network = built("refine", checkpoint)
    own = network.refine_model_state
    setattr(own, layer, nn.Sequential(own.get_submodule(layer), nn.ReLU()))
    assert difference(run(network, volumes["refine"]), "refine") > WRONG_PPM


@pytest.mark.parametrize("part", list(VECTORS))
def test_has_the_published_keys(part: str, shared: Path, networks) -> None:
    lines = (shared / "specs" / "keys" / f"{VECTORS[part]}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    state = networks[part].state_dict()
    own = {key: str(tuple(value.shape)) for key, value in state.items()}
    prefix = {"recon": RECON, "refine": REFINE}[part]
    assert own == {prefix + key: shape for key, shape, _ in rows}


def test_has_the_published_size(networks, checkpoint) -> None:
    parameters = {
        part: sum(p.numel() for p in network.parameters()) for part, network in networks.items()
    }
    assert parameters == {"recon": 5_648_337, "refine": 3_181_761}
    assert len(checkpoint) == 156 + 44
    assert (networks["recon"].divisor, networks["refine"].divisor) == (16, 1)


def test_each_part_says_what_it_takes(networks) -> None:
    assert [t.name for t in networks["recon"].inputs] == ["local_field_ppm"]
    assert [t.name for t in networks["refine"].inputs] == ["rough_chi_ppm"]
    assert {network.pipeline for network in networks.values()} == {"after"}
    assert {network.geometry.b0_direction for network in networks.values()} == {None}


@pytest.fixture(scope="module")
def tiny(formula_state) -> State:
    return formula_state(
        AfterRecon(2, 2).state_dict() | AfterRefine(2, 3, 2, 2, last=5).state_dict()
    )


def test_sizes_are_read_off_the_shapes(tiny) -> None:
    recon, refine = built("recon", tiny), built("refine", tiny)
    assert (recon.divisor, refine.divisor) == (4, 1)
    dense = refine.refine_model_state
    assert (len(dense.blocks), len(dense.blocks[0].layers)) == (2, 2)
    assert dense.conv.weight.shape[:2] == (5, 2)
    assert dense.blocks[0].layers[1].conv.weight.shape[:2] == (3, 5)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("recon", f"{RECON}_output.bias"),
        ("recon", f"{RECON}_decoders.1._mid.0.weight"),
        ("refine", f"{REFINE}output.weight"),
        ("refine", f"{REFINE}blocks.1.feature_fusion_local.bias"),
    ],
)
def test_other_weights_are_refused_by_key(part: str, key: str, tiny) -> None:
    without = {k: value for k, value in tiny.items() if k != key}
    for wrong in (without, tiny | {key: tiny[key][..., None]}, tiny | {f"{key}2": tiny[key]}):
        with pytest.raises(WeightsError, match=key):
            built(part, wrong)
        built("refine" if part == "recon" else "recon", wrong)


@pytest.mark.parametrize("part", list(VECTORS))
def test_what_belongs_to_neither_half_is_refused(part: str, tiny) -> None:
    with pytest.raises(WeightsError, match="optimiser"):
        built(part, tiny | {"optimiser.weight": torch.zeros(1)})


@pytest.mark.parametrize("part", list(VECTORS))
def test_weights_of_another_network_are_refused(part: str) -> None:
    with pytest.raises(WeightsError, match=f"not the weights of after-qsm, part {part}"):
        built(part, {"conv.weight": torch.zeros(1)})
