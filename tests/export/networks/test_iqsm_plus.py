"""iQSM+ folded for a direction against the published network unfolded, and what it refuses."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from qsm_deploy.export.by_name import export_network
from qsm_deploy.export.networks.blocks import ConvBlock
from qsm_deploy.export.networks.encoder_decoder import EncoderDecoder
from qsm_deploy.export.networks.iqsm_plus import (
    IQSMPlus,
    OrientedConv,
    OrientedConvs,
    network_from_state,
)
from qsm_deploy.export.networks.lot import LotLayer
from qsm_deploy.export.networks.network import Choices
from qsm_deploy.kernels.errors import UsageError, WeightsError
from qsm_deploy.runtime.card.read import load_card

TOLERANCE_PPM = 1e-5
NUMBERS = (torch.tensor([0.02]), torch.tensor([3.0]))
Direction = tuple[float, float, float]


@pytest.fixture(scope="module")
def state(formula_state) -> dict[str, Tensor]:
    return formula_state(tiny().state_dict())


@pytest.fixture(scope="module")
def volumes() -> tuple[Tensor, Tensor]:
    """Return phase [rad] and mask."""
    generator = torch.Generator().manual_seed(0)
    phase = 3 * torch.randn(1, 1, 8, 12, 16, generator=generator)
    return phase, (torch.rand(phase.shape, generator=generator) < 0.9).float()


def tiny() -> IQSMPlus:
    return IQSMPlus(ConvBlock(3, 3), EncoderDecoder(3, base=2, depth=2), LotLayer(3))


def folded(state: dict[str, Tensor], direction: Direction, volumes: tuple[Tensor, ...]) -> Tensor:
    network = network_from_state(state, Choices(b0_direction=direction))
    with torch.inference_mode():
        return network(*volumes, *NUMBERS)


def oriented(layer: OrientedConv, x: Tensor, embedding: Tensor) -> Tensor:
    """Convolve, add the edit of the summed channels, normalise, rectify."""
    kernel = layer.embed_hwd(embedding).reshape(1, 1, 3, 3, 3)
    scale, shift = (v[:, None, None, None] for v in layer.embed_c(embedding).chunk(2))
    edit = nn.functional.conv3d(x.sum(dim=1, keepdim=True), kernel, padding=1)
    return layer.BN_RELU(layer.EncodeConv(x) + scale * edit + shift).relu()


def unfolded(state: dict[str, Tensor], direction: Direction, volumes: tuple[Tensor, ...]) -> Tensor:
    """Run the published network as published, its direction an input."""
    network = tiny()
    network.load_state_dict(state)
    unet = network.eval().Unet
    embedding = unet.Z_embed(torch.tensor(direction))

    def both(convs: OrientedConvs, x: Tensor) -> Tensor:
        return oriented(convs.embd_layer2, oriented(convs.embd_layer1, x, embedding), embedding)

    features = network.LoT_Layer(*volumes, *NUMBERS)
    v = oriented(unet.ini_embd_layer, features, embedding)
    skips = []
    for level in unet.EncodeConvs:
        skips.append(both(level, v))
        v = nn.functional.max_pool3d(skips[-1], 2)
    v = both(unet.MidConv1, v)
    for level in unet.DecodeConvs:
        v = both(level, torch.cat([level.up(v), skips.pop()], dim=1))
    return ((unet.FinalConv(v) + features[:, :1]) / 4).detach()


def spherical(polar_deg: float, azimuth_deg: float) -> Direction:
    polar, azimuth = math.radians(polar_deg), math.radians(azimuth_deg)
    return (
        math.sin(polar) * math.cos(azimuth),
        math.sin(polar) * math.sin(azimuth),
        math.cos(polar),
    )


@pytest.mark.parametrize("direction", [spherical(0, 0), spherical(23, 90), spherical(60, 200)])
def test_folded_equals_unfolded(direction: Direction, state, volumes) -> None:
    chi = folded(state, direction, volumes)
    assert (chi - unfolded(state, direction, volumes)).abs().max() <= TOLERANCE_PPM


def test_every_direction_gives_another_network(state, volumes) -> None:
    maps = [folded(state, spherical(polar, 0), volumes) for polar in (0, 10, 20)]
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(maps))


def test_the_sign_of_the_direction_has_no_meaning(state, volumes) -> None:
    x, y, z = spherical(30, 50)
    assert torch.equal(folded(state, (x, y, z), volumes), folded(state, (-x, -y, -z), volumes))


@pytest.mark.parametrize("direction", [(0.0, 1.0, 0.0), spherical(80, 95), spherical(100, 70)])
def test_b0_along_the_second_axis_is_as_along_the_third(
    direction: Direction, state, volumes
) -> None:
    x, y, z = direction
    sign = math.copysign(1, y)
    exchanged = tuple(v.transpose(3, 4) for v in volumes)
    expected = unfolded(state, (sign * x, sign * z, sign * y), exchanged).transpose(3, 4)
    assert (folded(state, direction, volumes) - expected).abs().max() <= TOLERANCE_PPM


def test_says_which_direction_it_is_for(state) -> None:
    direction = spherical(20, 30)
    geometry = network_from_state(state, Choices(b0_direction=direction)).geometry
    assert geometry.b0_direction == direction
    assert geometry.b0_tolerance_deg == 5


def test_needs_a_direction(state) -> None:
    with pytest.raises(UsageError, match="--b0-direction X Y Z"):
        network_from_state(state, Choices())


@pytest.mark.parametrize(
    "key", ["Unet.Z_embed.0.weight", "Unet.EncodeConvs.1.embd_layer2.embed_c.embd.3.weight"]
)
def test_weights_without_an_embedding_are_refused_by_key(key: str, state) -> None:
    without = {k: value for k, value in state.items() if k != key}
    for wrong in (without, state | {key: state[key][1:]}):
        with pytest.raises(WeightsError, match=key):
            network_from_state(wrong, Choices(b0_direction=(0, 0, 1)))


@pytest.mark.slow
def test_it_is_exported_for_canonical_axes(state, tmp_path) -> None:
    """In which B0 lies nearest to the third axis, as in every scan that it will be given."""
    weights, output = tmp_path / "weights.pth", tmp_path / "engine.onnx"
    torch.save(state, weights)
    export_network("iqsm-plus", weights=weights, output=output, b0_direction=(-4, 0, 3))
    assert load_card(output).geometry.b0_direction == pytest.approx((0.6, 0, -0.8))
