"""The LoT layer: an analytic Laplacian, its indifference to wraps, and its published form."""

import math

import pytest
import torch
from torch import Tensor

from qsm_deploy.export.networks.lot import LotLayer, fixed_laplacian

ECHO_TIME_S, FIELD_STRENGTH_T = torch.tensor([0.02]), torch.tensor([3.0])


def features(layer: LotLayer, phase: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        return layer(phase, mask, ECHO_TIME_S, FIELD_STRENGTH_T)


@pytest.fixture
def volumes() -> tuple[Tensor, Tensor]:
    """Return phase [rad] and mask of an odd, oblong grid."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, 5, 7, 9)
    phase = 4 * torch.randn(shape, generator=generator)
    return phase, (torch.rand(shape, generator=generator) < 0.8).float()


def test_the_kernel_is_a_laplacian() -> None:
    kernel = fixed_laplacian()
    assert kernel.shape == (1, 1, 3, 3, 3)
    assert abs(kernel.sum()) < 1e-6
    x = torch.arange(-1.0, 2.0)
    for squared in (x[:, None, None] ** 2, x[:, None] ** 2, x**2):
        assert (kernel[0, 0] * squared).sum() == pytest.approx(2, abs=1e-6)


def test_of_a_wrapped_paraboloid_is_its_curvature() -> None:
    curvature = 0.02
    steps = torch.arange(-4.0, 5.0)
    squared = steps[:, None, None] ** 2 - 2 * steps[:, None] ** 2 + 3 * steps**2
    phase = 0.5 * curvature * squared + math.pi
    wrapped = torch.remainder(phase + math.pi, 2 * math.pi) - math.pi
    assert 100 < (phase - wrapped > 1).sum() < 600
    inside = features(LotLayer(1), wrapped[None, None], torch.ones(1, 1, 9, 9, 9))
    assert inside[0, 0, 1:-1, 1:-1, 1:-1] == pytest.approx(2 * curvature, rel=0.05)


def test_wraps_do_not_matter(volumes) -> None:
    phase, mask = volumes
    wrapped = torch.remainder(phase, 2 * math.pi)
    layer = LotLayer(3)
    assert (features(layer, wrapped, mask) - features(layer, phase, mask)).abs().max() < 1e-5


def test_equals_a_padded_convolution_with_its_faces_zeroed(volumes) -> None:
    phase, mask = volumes
    layer = LotLayer(3)
    with torch.no_grad():
        layer.conv_y.mul_(torch.randn(2, 1, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
    kernels = torch.cat([layer.conv_x, layer.conv_y])

    def laplacian(volume: Tensor) -> Tensor:
        made = torch.nn.functional.conv3d(volume, kernels, padding=1)
        for axis in (2, 3, 4):
            made.index_fill_(axis, torch.tensor([0, made.shape[axis] - 1]), 0)
        return made

    with torch.inference_mode():
        expected = laplacian(phase.sin()) * phase.cos() - laplacian(phase.cos()) * phase.sin()
        expected = expected * mask / (FIELD_STRENGTH_T * ECHO_TIME_S) * 0.06
    assert (features(layer, phase, mask) - expected).abs().max() < 1e-5


def test_scales_with_echo_time_and_field_strength(volumes) -> None:
    layer = LotLayer(2)
    with torch.inference_mode():
        one = layer(*volumes, torch.tensor([0.01]), torch.tensor([1.5]))
        other = layer(*volumes, torch.tensor([0.03]), torch.tensor([7.0]))
    assert torch.allclose(one * (0.01 * 1.5), other * (0.03 * 7.0), rtol=1e-5, atol=1e-7)
