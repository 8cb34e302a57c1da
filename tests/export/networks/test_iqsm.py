"""iQSM and folded iQSM+ against the outputs of the published networks, and wrong ones too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks import iqsm, iqsm_plus
from qsm_deploy.export.networks.blocks import ConvBlock
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder
from qsm_deploy.export.networks.iqsm import IQSM
from qsm_deploy.export.networks.iqsm_plus import IQSMPlus
from qsm_deploy.export.networks.lot import LotLayer, fixed_laplacian
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.kernels.errors import WeightsError

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE_PPM = 1e-5
WRONG_PPM = 1e-3
TILTED = (0.0, float(np.sin(0.4)), float(np.cos(0.4)))
# case: kernels of the LoT layer, subset and array in it, whole vector, list of keys
CASES = {
    "v1": (1, "iqsm", "output_v1", "iqsm_v1_fixedLoT", "iqsm_v1_fixedLoT"),
    "v2": (16, "iqsm", "output_v2", "iqsm_v2_learnableLoT", "iqsm_learnableLoT"),
    "plus": (16, "iqsm_plus", "output", "iqsm_plus_v1", "iqsm_plus_v1"),
}
TRACED = ("v2", "plus")  # tracing takes long; a small v1 is traced on its own
PLUS = pytest.param("plus", marks=pytest.mark.slow)
BACKENDS = ("onnxruntime", "openvino")
State = dict[str, Tensor]


def empty_state(case: str, base: int = 16, depth: int = 4) -> State:
    """Return a state dict under the authors' names, its values of no meaning."""
    features = CASES[case][0]
    plain, lot = EncoderDecoder(features, base, depth), LotLayer(features)
    if case == "plus":
        return IQSMPlus(ConvBlock(features, features), plain, lot).state_dict()
    return IQSM(plain, lot, plain.divisor).state_dict()


def built(case: str, state: State, b0_direction: tuple[float, float, float] = TILTED) -> IQSM:
    make = iqsm_plus.network_from_state if case == "plus" else iqsm.network_from_state
    return make(state, Choices(b0_direction=b0_direction))


@pytest.fixture(scope="module")
def network(formula_state) -> Callable[[str], IQSM]:
    made: dict[str, IQSM] = {}

    def of(case: str) -> IQSM:
        if case not in made:
            made[case] = built(case, formula_state(empty_state(case)))
        return made[case]

    return of


@pytest.fixture(scope="module")
def exported(network) -> Callable[[str], onnx.ModelProto]:
    made: dict[str, onnx.ModelProto] = {}

    def of(case: str) -> onnx.ModelProto:
        if case not in made:
            made[case] = onnx_from_module(network(case))
        return made[case]

    return of


@pytest.fixture(scope="module")
def scan() -> tuple[Tensor, ...]:
    """Return phase [rad], mask, echo time [s] and field strength [T] of the golden vectors."""
    phase = 40 * torch.from_numpy(np.load(GOLDEN / "ir2qsm.npz")["input"])
    from_centre = torch.arange(32) - 15.5
    squared = from_centre[:, None, None] ** 2 + from_centre[:, None] ** 2 + from_centre**2
    mask = (squared <= 12**2).float()[None, None]
    return phase, mask, torch.tensor([0.02]), torch.tensor([3.0])


def difference(chi: np.ndarray, case: str) -> float:
    """Return the largest difference from the committed voxels [ppm]."""
    _, subset, array, *_ = CASES[case]
    golden = np.load(GOLDEN / f"{subset}.npz")
    assert golden[array].size > 900
    return float(np.abs(chi.reshape(-1)[:: int(golden["stride"])] - golden[array]).max())


@pytest.mark.parametrize("case", list(CASES))
def test_equals_the_committed_voxels(case: str, run, network, scan) -> None:
    assert difference(run(network(case), *scan), case) <= TOLERANCE_PPM


@pytest.mark.parametrize("case", ["v2", PLUS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_its_graph_equals_the_committed_voxels(
    backend: str, case: str, run, exported, scan
) -> None:
    assert difference(run(exported(case), *scan, backend=backend), case) <= TOLERANCE_PPM


@pytest.mark.parametrize("case", ["v1", "v2", PLUS])
def test_equals_every_golden_voxel(case: str, run, shared: Path, network, exported, scan) -> None:
    golden = np.load(shared / "specs" / "golden" / f"{CASES[case][3]}.npz")["output"]
    backends = BACKENDS if case in TRACED else ()
    outputs = [run(exported(case), *scan, backend=backend) for backend in backends]
    for chi in (run(network(case), *scan), *outputs):
        assert chi.shape == golden.shape
        assert np.abs(chi - golden).max() <= TOLERANCE_PPM


@pytest.mark.parametrize("case", list(CASES))
def test_has_the_published_keys(case: str, shared: Path) -> None:
    lines = (shared / "specs" / "keys" / f"{CASES[case][4]}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    own = {key: str(tuple(value.shape)) for key, value in empty_state(case).items()}
    assert own == {key: shape for key, shape, _ in rows}


def random_scan(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(shape, generator=generator) < 0.9).float()
    phase = torch.randn(shape, generator=generator)
    return phase, mask, torch.tensor([0.011]), torch.tensor([7.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_its_graph_takes_any_batch_and_size(backend: str, run, network, exported) -> None:
    other = random_scan((2, 1, 16, 48, 32))
    chi = run(network("v2"), *other)
    assert np.abs(run(exported("v2"), *other, backend=backend) - chi).max() <= TOLERANCE_PPM


def test_the_graph_of_the_first_version_equals_its_module(run, formula_state) -> None:
    small = built("v1", formula_state(empty_state("v1", base=4, depth=1)))
    model, other = onnx_from_module(small), random_scan((1, 1, 10, 6, 8))
    for backend in BACKENDS:
        seen = run(model, *other, backend=backend)
        assert np.abs(seen - run(small, *other)).max() <= TOLERANCE_PPM


@pytest.mark.slow
def test_a_mask_of_ones_fails(run, network, scan) -> None:
    phase, mask, *numbers = scan
    chi = run(network("v2"), phase, torch.ones_like(mask), *numbers)
    assert difference(chi, "v2") > WRONG_PPM


@pytest.mark.slow
def test_the_opposite_sign_of_the_phase_fails(run, network, scan) -> None:
    phase, *others = scan
    chi = run(network("v2"), -phase, *others)
    assert difference(chi, "v2") > WRONG_PPM
    assert difference(-chi, "v2") > WRONG_PPM


@pytest.mark.slow
def test_a_missing_residual_fails(run, network, scan) -> None:
    with torch.inference_mode():
        residual = network("v2").LoT_Layer(*scan)[:, :1].numpy() / 4
    chi = run(network("v2"), *scan) - residual
    assert difference(chi, "v2") > WRONG_PPM


@pytest.mark.slow
def test_a_swapped_concatenation_fails(run, network, scan, monkeypatch) -> None:
    cat = torch.cat

    def swapped(tensors: list[Tensor], dim: int = 0) -> Tensor:
        return cat(tensors[::-1] if dim == 1 else tensors, dim=dim)

    monkeypatch.setattr("qsm_deploy.export.networks.encoder_decoder.torch.cat", swapped)
    assert difference(run(network("v2"), *scan), "v2") > WRONG_PPM


@pytest.mark.slow
@pytest.mark.parametrize("b0_direction", [(0.0, 0.0, 1.0), (TILTED[1], 0.0, TILTED[2])])
def test_another_direction_fails(run, b0_direction, formula_state, scan) -> None:
    other = built("plus", formula_state(empty_state("plus")), b0_direction)
    assert difference(run(other, *scan), "plus") > WRONG_PPM


@pytest.mark.parametrize("case", list(CASES))
def test_sizes_are_read_off_the_shapes(case: str, formula_state) -> None:
    tiny = built(case, formula_state(empty_state(case, base=4, depth=2)))
    assert tiny.divisor == 4
    assert (tiny.LoT_Layer.conv_y is None) == (CASES[case][0] == 1)
    plain = tiny.Unet[1] if case == "plus" else tiny.Unet
    assert plain.FinalConv.in_channels == 4


@pytest.mark.parametrize("case", list(CASES))
def test_two_files_without_their_prefixes_are_the_same(case: str, formula_state) -> None:
    state = formula_state(empty_state(case, base=2, depth=2))
    flat = {key.split(".", 1)[1]: value for key, value in state.items()}
    assert "conv_x" in flat
    one, other = (built(case, s).state_dict() for s in (state, flat))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_first_version_brings_its_own_kernel(formula_state) -> None:
    state = formula_state(empty_state("v1", base=2, depth=2))
    del state["LoT_Layer.conv_x"]
    assert torch.equal(built("v1", state).LoT_Layer.conv_x, fixed_laplacian())


@pytest.mark.parametrize("case", ["v2", "plus"])
def test_a_missing_lot_file_is_named(case: str, formula_state) -> None:
    state = formula_state(empty_state(case, base=2, depth=2))
    unet_only = {key: value for key, value in state.items() if not key.startswith("LoT_Layer.")}
    with pytest.raises(WeightsError, match=r"lack LoT_Layer\.conv_x.*two files"):
        built(case, unet_only)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("key", ["Unet.FinalConv.bias", "Unet.DecodeConvs.1.up.0.weight"])
def test_other_weights_are_refused_by_key(case: str, key: str, formula_state) -> None:
    state = formula_state(empty_state(case, base=2, depth=2))
    without = {k: value for k, value in state.items() if k != key}
    for wrong in (without, state | {key: state[key][..., None]}, state | {f"{key}2": state[key]}):
        with pytest.raises(WeightsError, match=key):
            built(case, wrong)


@pytest.mark.parametrize("case", list(CASES))
def test_weights_of_another_network_are_refused(case: str) -> None:
    with pytest.raises(WeightsError, match="not the weights of iqsm"):
        built(case, {"conv.weight": torch.zeros(1)})
