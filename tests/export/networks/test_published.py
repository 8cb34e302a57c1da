"""Networks of one volume against the outputs of the published ones, and ways to get them wrong."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks import after_qsm, octave, xqsm, xqsm_unet
from qsm_deploy.export.networks.after_qsm import RECON, REFINE, AfterRecon, AfterRefine
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder, encoder_decoder_size
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.xqsm import XQSM
from qsm_deploy.export.networks.xqsm_unet import XqsmUnet
from qsm_deploy.kernels.errors import WeightsError

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE_PPM = 1e-5
WRONG_PPM = 1e-3
BACKENDS = ["pytorch", "onnxruntime", "openvino"]
State = Mapping[str, Tensor]
Spoil = Callable[[Network, pytest.MonkeyPatch], None]


def swap_concatenations(network: Network, patch: pytest.MonkeyPatch) -> None:
    cat = torch.cat
    patch.setattr(torch, "cat", lambda tensors, dim: cat(tensors[::-1], dim))


def swap_octaves(network: Network, patch: pytest.MonkeyPatch) -> None:
    concatenate = octave.concatenate
    patch.setattr(octave, "concatenate", lambda up, skip: concatenate(skip, up))


def take_the_maximum(network: Network, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(octave, "avg_pool3d", nn.functional.max_pool3d)


def activate(layer: str) -> Spoil:
    """Return what puts an activation behind a layer that is outside the dense ones."""

    def spoil(network: Network, patch: pytest.MonkeyPatch) -> None:
        layers = network.refine_model_state._modules
        patch.setitem(layers, layer, nn.Sequential(layers[layer], nn.ReLU()))

    return spoil


@dataclass(frozen=True)
class Published:
    """A network, what is known of the published one, and what must make a difference.

    Attributes
    ----------
    shapes
        Its state at the published size.
    prefix
        What stands before the keys of its list; the formula knows them without.
    build
        From a state to the network.
    golden
        The name of the file of every voxel.
    committed
        The file of some voxels, the name of the array in it, and more than how many they are.
    crop
        The voxels of the input that the golden vector was computed of.
    other
        Another batch and size.
    size
        Parameters, keys and divisor.
    residual
        1 if the published network does not add its input, and -1 if it does.
    spoil
        Ways to get it wrong.
    """

    shapes: Callable[[], State]
    prefix: str
    build: Callable[[State], Network]
    golden: str
    committed: tuple[str, str, int]
    crop: slice
    other: tuple[int, ...]
    size: tuple[int, int, int]
    residual: int
    spoil: tuple[Spoil, ...]


def build_part(part: str) -> Callable[[State], Network]:
    """Return what builds one of the CNNs of AFTER-QSM from its half of the weights."""
    return lambda state: after_qsm.network_from_state(state, Choices({"part": part}))


CASES = {
    "xqsm": Published(
        lambda: XQSM().state_dict(),
        "",
        lambda state: xqsm.network_from_state(state, Choices()),
        "xqsm",
        ("xqsm", "output", 900),
        slice(None),
        (2, 1, 8, 24, 16),
        (5_215_681, 398, 8),
        -1,
        (swap_octaves, take_the_maximum),
    ),
    "xqsm-unet": Published(
        lambda: XqsmUnet().state_dict(),
        "",
        lambda state: xqsm_unet.network_from_state(state, Choices()),
        "xqsm_unet",
        ("xqsm_unet", "output", 900),
        slice(None),
        (2, 1, 4, 24, 16),
        (4_150_785, 86, 4),
        1,
        (swap_concatenations,),
    ),
    "after-qsm recon": Published(
        lambda: AfterRecon().recon_model_state.state_dict(),
        RECON,
        build_part("recon"),
        "after_recon_unet",
        ("after_qsm", "output_recon", 120),
        slice(None),
        (2, 1, 16, 32, 48),
        (5_648_337, 156, 16),
        1,
        (swap_concatenations,),
    ),
    "after-qsm refine": Published(
        lambda: AfterRefine().refine_model_state.state_dict(),
        REFINE,
        build_part("refine"),
        "after_refine",
        ("after_qsm", "output_refine", 120),
        slice(8, 24),
        (2, 1, 7, 5, 9),
        (3_181_761, 44, 1),
        1,
        (
            swap_concatenations,
            *map(activate, ("feature_extraction2", "feature_fusion_global")),
        ),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Published:
    return CASES[request.param]


@pytest.fixture(scope="module")
def field(case) -> Tensor:
    whole = torch.from_numpy(np.load(GOLDEN / "ir2qsm.npz")["input"])
    return whole[:, :, case.crop, case.crop, case.crop].contiguous()


@pytest.fixture(scope="module")
def network(case, formula_state) -> Network:
    state = formula_state(case.shapes())
    return case.build({case.prefix + key: value for key, value in state.items()})


@pytest.fixture(scope="module")
def graph(network) -> onnx.ModelProto:
    return onnx_from_module(network)


@pytest.fixture(scope="module")
def outputs(run_everywhere, network, graph, field) -> dict[str, np.ndarray]:
    return run_everywhere(network, graph, field)


def difference(chi: np.ndarray, case: Published) -> float:
    """Return the largest difference from the committed voxels [ppm]."""
    file, array, count = case.committed
    golden = np.load(GOLDEN / f"{file}.npz")
    assert golden[array].size > count
    return float(np.abs(chi.reshape(-1)[:: int(golden["stride"])] - golden[array]).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_committed_voxels(backend: str, case, outputs) -> None:
    assert difference(outputs[backend], case) <= TOLERANCE_PPM


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_every_golden_voxel(backend: str, shared: Path, case, outputs) -> None:
    golden = np.load(shared / "specs" / "golden" / f"{case.golden}.npz")["output"]
    assert outputs[backend].shape == golden.shape
    assert np.abs(outputs[backend] - golden).max() <= TOLERANCE_PPM


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_its_graph_takes_any_batch_and_size(backend: str, run, case, network, graph) -> None:
    other = 0.02 * torch.randn(case.other, generator=torch.Generator().manual_seed(0))
    chi = run(network, other)
    assert np.abs(run(graph, other, backend=backend) - chi).max() <= TOLERANCE_PPM


@pytest.mark.slow
def test_what_differs_in_structure_fails(run, case, network, field) -> None:
    for spoil in case.spoil:
        with pytest.MonkeyPatch.context() as patch:
            spoil(network, patch)
            assert difference(run(network, field), case) > WRONG_PPM


def test_another_residual_fails(case, outputs, field) -> None:
    assert difference(outputs["pytorch"] + case.residual * field.numpy(), case) > WRONG_PPM


def keys_in(shared: Path, name: str) -> dict[str, str]:
    """Return the shapes in the list of a published network's keys."""
    lines = (shared / "specs" / "keys" / f"{name}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {key: shape for key, shape, _ in rows}


def test_has_the_published_keys(shared: Path, case, network) -> None:
    own = {key: str(tuple(value.shape)) for key, value in network.state_dict().items()}
    listed = keys_in(shared, case.golden)
    assert own == {case.prefix + key: shape for key, shape in listed.items()}


def test_has_the_published_size(case, network) -> None:
    parameters = sum(p.numel() for p in network.parameters())
    assert (parameters, len(network.state_dict()), network.divisor) == case.size


# iQSM's have the same layers as xqsm-unet: channels_in, base, depth
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("xqsm_unet", (1, 64, 2)),
        ("iqsm_v1_unet_only", (1, 16, 4)),
        ("iqsm_v2_unet_only", (16, 16, 4)),
    ],
)
def test_iqsm_has_the_layers_of_xqsm_unet(name: str, size, shared: Path) -> None:
    state = EncoderDecoder(*size).state_dict()
    own = {key: str(tuple(value.shape)) for key, value in state.items()}
    assert own == keys_in(shared, name)
    assert encoder_decoder_size(state, name) == size


@pytest.mark.parametrize(
    ("kind", "base", "depth"),
    [
        *(("xqsm", 1, 1), ("xqsm", 3, 2), ("xqsm", 2, 3)),
        *(("xqsm-unet", 2, 1), ("xqsm-unet", 3, 2), ("xqsm-unet", 2, 4)),
    ],
)
def test_sizes_are_read_off_the_shapes(kind: str, base: int, depth: int, formula_state) -> None:
    module = (XQSM if kind == "xqsm" else XqsmUnet)(base, depth)
    network = CASES[kind].build(formula_state(module.state_dict()))
    last = network.FinalOct.FinalConv if kind == "xqsm" else network.FinalConv
    halvings, channels = (depth + 1, 2 * base) if kind == "xqsm" else (depth, base)
    assert (network.divisor, last.in_channels) == (2**halvings, channels)
    volume = torch.zeros(1, 1, *(network.divisor * n for n in (1, 2, 3)))
    with torch.inference_mode():
        assert network(volume).shape == volume.shape


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("xqsm", "FinalOct.BN_LH.bias"),
        ("xqsm", "DecodeConvs.1.up.up_LH.weight"),
        ("xqsm-unet", "FinalConv.bias"),
        ("xqsm-unet", "DecodeConvs.1.up.0.weight"),
    ],
)
def test_other_weights_are_refused_by_key(kind: str, key: str, formula_state) -> None:
    state = formula_state((XQSM if kind == "xqsm" else XqsmUnet)(2).state_dict())
    without = {k: value for k, value in state.items() if k != key}
    for wrong in (without, state | {key: state[key][..., None]}, state | {f"{key}2": state[key]}):
        with pytest.raises(WeightsError, match=key):
            CASES[kind].build(wrong)


def test_squeeze_and_excitation_is_refused(formula_state) -> None:
    state = formula_state(XQSM(2).state_dict())
    stranger = "EncodeConvs.0.EncodeConv1.se_HH.fc.0.weight"
    with pytest.raises(WeightsError, match=stranger):
        CASES["xqsm"].build(state | {stranger: torch.zeros(1, 2)})


def test_more_input_channels_are_refused(formula_state) -> None:
    state = formula_state(EncoderDecoder(16, 2, 2).state_dict())
    with pytest.raises(WeightsError, match=r"EncodeConvs\.0\.EncodeConv\.0\.weight has shape"):
        CASES["xqsm-unet"].build(state)


@pytest.mark.parametrize("kind", ["xqsm", "xqsm-unet"])
def test_weights_of_another_network_are_refused(kind: str) -> None:
    with pytest.raises(WeightsError, match=f"not the weights of {kind}"):
        CASES[kind].build({"conv.weight": torch.zeros(1)})


def test_up_sampling_normalises_the_sum(formula_state) -> None:
    up = octave.OctaveUp(3).eval()
    up.load_state_dict(formula_state(up.state_dict()))
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randn(1, 3, n, n, n, generator=generator) for n in (8, 4))
    with torch.inference_mode():
        got = up((high, low))
        sums = up.up_HH(high) + up.up_LH(low), up.up_LL(low) + up.up_HL(high)
        expected = [torch.relu(norm(s)) for norm, s in zip((up.BN_H, up.BN_L), sums, strict=True)]
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
