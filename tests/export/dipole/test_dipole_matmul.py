"""The dipole operator of matrix products against the one of fast transforms, and how to miss it."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsm_deploy.export.dipole import matmul as dipole_matmul
from qsm_deploy.export.dipole.matmul import dipole_conv_matmul
from qsm_deploy.export.dipole.multiplier import respond
from qsm_deploy.export.dipole.op import dipole_conv
from qsm_deploy.kernels.geometry import Geometry

TOLERANCE = 1e-6  # 5e-7 was seen
WRONG = 1e-3
LENGTHS = (160, 257, 1030)
OBLIQUE = Geometry((12, 8, 10), (0.6, 0.7, 2.0), (0.6, 0.2, 0.7))


def long(n: int) -> Geometry:
    return Geometry((4, n, 4), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9))


def inputs(geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    x = np.random.default_rng(0).standard_normal((1, 3, *geometry.shape), dtype=np.float32)
    return (
        torch.from_numpy(x),
        torch.tensor(geometry.voxel_size_mm),
        torch.tensor(geometry.b0_direction),
    )


def run(geometry: Geometry, multiplier: str = "dipole") -> NDArray[np.float32]:
    g = functools.partial(respond, multiplier=multiplier, parameter=0.1)
    return dipole_conv_matmul(*inputs(geometry), g).numpy()


def expected(geometry: Geometry, multiplier: str = "dipole") -> NDArray[np.float64]:
    x, *arguments = inputs(geometry)
    return dipole_conv(x.double(), *arguments, multiplier, threshold=0.1, lam=0.1).numpy()


def relative_error(seen: NDArray[np.floating], truth: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(seen - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("multiplier", ["dipole", "dipole_squared", "tkd", "tikhonov"])
@pytest.mark.parametrize(
    "geometry", [OBLIQUE, *map(long, LENGTHS)], ids=["oblique", *map(str, LENGTHS)]
)
def test_it_is_the_fast_operator(geometry: Geometry, multiplier: str) -> None:
    assert relative_error(run(geometry, multiplier), expected(geometry, multiplier)) < TOLERANCE


def test_channels_do_not_mix() -> None:
    x, *arguments = inputs(OBLIQUE)
    each = dipole_conv_matmul(x, *arguments, lambda d: d)
    assert torch.equal(dipole_conv_matmul(x[:, 1:2], *arguments, lambda d: d), each[:, 1:2])
    turned = dipole_conv_matmul(x.transpose(0, 1), *arguments, lambda d: d)
    assert torch.equal(turned.transpose(0, 1), each)


def test_a_constant_becomes_zero() -> None:
    x, *arguments = inputs(Geometry((9, 13, 7), (2.0, 0.6, 0.9), (-0.1, 0.9, 0.4)))
    assert dipole_conv_matmul(torch.ones_like(x), *arguments, lambda d: d).abs().max() < 1e-6


def test_without_symmetry_on_the_nyquist_planes_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    of_size = dipole_matmul._Transform.of_size

    def one_sided(n: int, *, half: bool) -> dipole_matmul._Transform:
        t = of_size(n, half=half)
        frequency = t.frequencies[0]
        return dataclasses.replace(t, frequencies=torch.stack([frequency, -frequency]))

    monkeypatch.setattr(dipole_matmul._Transform, "of_size", one_sided)
    assert relative_error(run(OBLIQUE), expected(OBLIQUE)) > WRONG


def test_squaring_after_the_symmetry_fails() -> None:
    x, *arguments = inputs(OBLIQUE)
    once = dipole_conv_matmul(x, *arguments, lambda d: d)
    twice = dipole_conv_matmul(once, *arguments, lambda d: d).numpy()
    assert relative_error(twice, expected(OBLIQUE, "dipole_squared")) > WRONG


@pytest.mark.parametrize("n", LENGTHS)
def test_angles_of_products_that_are_not_reduced_are_worse(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_size = dipole_matmul._Transform.of_size

    def unreduced(n: int, *, half: bool) -> dipole_matmul._Transform:
        t = of_size(n, half=half)
        i = torch.arange(n, dtype=torch.float32)
        angle = i[:, None] * i[: t.cos.shape[1]] * (2 * math.pi / n)
        return dataclasses.replace(t, cos=torch.cos(angle), sin=torch.sin(angle))

    geometry = long(n)
    good = relative_error(run(geometry), expected(geometry))
    monkeypatch.setattr(dipole_matmul._Transform, "of_size", unreduced)
    assert relative_error(run(geometry), expected(geometry)) > 20 * good
