"""tv-unet: total variation before training, and afterwards what its channels allow."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qsm_deploy.export.measure.receptive_field import theoretical_receptive_field
from qsm_deploy.export.networks import tv_unet
from qsm_deploy.export.networks.network import ANY_GEOMETRY, Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.export.networks.tv_unet import TvUnet
from qsm_deploy.kernels.errors import WeightsError
from qsm_deploy.runtime.card.read import load_card
from qsm_deploy.runtime.sessions.bundled import BUNDLED

NUMBER = "field_noise_ppm"
Inputs = dict[str, Tensor]


def inputs(*size: int, seed: int = 0) -> Inputs:
    """Return volumes of the size that each has in ppm, a mask of half the voxels, and a noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 1, *size)
    given = {n: 0.02 * torch.randn(shape, generator=generator) for n in REGISTRY["tv-unet"].inputs}
    mask = (torch.rand(shape, generator=generator) < 0.5).float()
    return given | {"mask": mask, NUMBER: torch.tensor([0.003])}


def run(network: nn.Module, given: Inputs) -> Tensor:
    with torch.inference_mode():
        chi: Tensor = network(*given.values())
    return chi


def scaled(given: Inputs, factor: float, kept: tuple[str, ...]) -> Inputs:
    return {name: value * (1 if name in kept else factor) for name, value in given.items()}


def test_untrained_it_is_total_variation_bit_for_bit() -> None:
    torch.manual_seed(0)
    given = inputs(8, 12, 16)
    assert torch.equal(run(TvUnet(4, 8, 4), given), given["tv_chi_ppm"])
    for end in ("last", "linear"):
        trained = TvUnet(4, 8, 4)
        trained.get_submodule(end).reset_parameters()
        assert not torch.equal(run(trained, given), given["tv_chi_ppm"])


@pytest.mark.parametrize("name", REGISTRY["tv-unet"].inputs)
def test_everything_that_it_takes_counts(tiny_tv_unet: Network, name: str) -> None:
    given = inputs(8, 8, 8)
    other = given | {name: 1.5 * given[name]}
    difference = (run(tiny_tv_unet, other) - run(tiny_tv_unet, given)).abs().max()
    assert difference > 1e-5


def test_the_noise_counts_in_the_mask_alone(tiny_tv_unet: Network) -> None:
    given = inputs(8, 8, 8)
    given["mask"] *= 0
    louder = given | {NUMBER: 2 * given[NUMBER]}
    assert torch.equal(run(tiny_tv_unet, given), run(tiny_tv_unet, louder))


@pytest.mark.parametrize("factor", [1e-2, 0.5, 7.0])
def test_it_is_homogeneous_in_its_channels_the_mask_among_them(
    tiny_tv_unet: Network, factor: float
) -> None:
    """The mask is a channel that has no unit, so that twice the field alone is another case."""
    given = inputs(8, 4, 12)
    expected = factor * run(tiny_tv_unet, given)
    # the noise is given in the mask, which brings the factor
    together = run(tiny_tv_unet, scaled(given, factor, (NUMBER,)))
    assert torch.allclose(together, expected, rtol=1e-4, atol=1e-7 * factor)
    field_and_noise = run(tiny_tv_unet, scaled(given, factor, ("mask",)))
    assert (field_and_noise - expected).abs().max() > 1e-2 * expected.abs().max()


def test_it_has_no_bias() -> None:
    modules = TvUnet(4, 8, 4).modules()
    convolutions = [m for m in modules if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    assert len(convolutions) == 15
    assert all(m.bias is None for m in convolutions)


@pytest.mark.parametrize("size", [(4, 4, 4), (8, 12, 4), (20, 8, 16)])
def test_any_size_that_its_divisor_divides(tiny_tv_unet: Network, size: tuple[int, ...]) -> None:
    assert tiny_tv_unet.divisor == REGISTRY["tv-unet"].divisor == 4
    assert run(tiny_tv_unet, inputs(*size)).shape == (1, 1, *size)
    with pytest.raises(RuntimeError, match="size"):
        run(tiny_tv_unet, inputs(size[0] + 2, *size[1:]))


def test_it_sees_as_far_as_the_bundled_card_says(tiny_tv_unet: Network) -> None:
    seen = load_card(BUNDLED["tv-unet"]).receptive_field.theoretical
    assert seen == theoretical_receptive_field(tiny_tv_unet)
    given, cut = inputs(96, 4, 4), 32
    part = {n: v if n == NUMBER else v[:, :, cut:] for n, v in given.items()}
    whole, patch = run(tiny_tv_unet, given)[:, :, cut:], run(tiny_tv_unet, part)
    off = (whole - patch).abs().amax(dim=(0, 1, 3, 4)) / whole.abs().max()
    assert off[seen:].max() < 1e-6
    assert off[: seen // 2].max() > 1e-4


def test_the_bundled_card_says_what_it_takes_and_that_it_takes_any_geometry() -> None:
    card = load_card(BUNDLED["tv-unet"])
    assert (card.network, card.pipeline, card.divisor) == ("tv-unet", "cnn", TvUnet.divisor)
    assert (card.inputs, card.priors, card.geometry) == (TvUnet.inputs, TvUnet.priors, ANY_GEOMETRY)


@pytest.mark.parametrize("widths", [(4, 8, 4), (3, 5, 2), (32, 64, 12)])
def test_widths_are_read_off_the_shapes(widths: tuple[int, int, int]) -> None:
    source = TvUnet(*widths)
    source.linear.reset_parameters()
    network = tv_unet.network_from_state(source.state_dict(), Choices())
    assert not network.training
    given = inputs(8, 8, 8)
    assert torch.equal(run(network, given), run(source, given))
    assert network.stem.out_channels == widths[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("join.weight"), "join.weight"),
        (lambda state: state.pop("bottom.1.second.weight"), "bottom.1.second.weight"),
        (lambda state: state.update(more=torch.zeros(1)), "more"),
        (lambda state: state.update({"linear.weight": torch.zeros(1, 8, 3, 3, 3)}), "linear"),
    ],
)
def test_other_weights_are_refused_by_name(change: Callable[[Any], Any], message: str) -> None:
    state = dict(TvUnet(4, 8, 4).state_dict())
    change(state)
    with pytest.raises(WeightsError, match=message):
        tv_unet.network_from_state(state, Choices())


def test_every_backend_computes_it(tiny_tv_unet: Network, traced, run_everywhere) -> None:
    given = inputs(12, 8, 16)
    found = run_everywhere(tiny_tv_unet, traced("tv-unet"), *given.values())
    expected = found.pop("pytorch")
    assert np.abs(expected - given["tv_chi_ppm"].numpy()).max() > 0.01
    for backend, chi in found.items():
        assert np.abs(chi - expected).max() < 2e-6 * np.abs(expected).max(), backend
