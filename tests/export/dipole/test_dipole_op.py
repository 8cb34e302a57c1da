"""``qsm::dipole_conv`` against the operator of numpy and against float64, and what it refuses."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsm_deploy.export.dipole.op import dipole_conv
from qsm_deploy.kernels.dipole import CONE, dipole_convolve, tikhonov, tkd
from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry

THRESHOLD, LAM = 0.15, 0.02
TOLERANCE = 1e-6  # 4.3e-7 was seen
GRIDS = {
    "even oblique anisotropic": Geometry((12, 8, 10), (0.6, 0.7, 2.0), (0.6, 0.2, 0.7)),
    "odd": Geometry((7, 9, 11)),
    "prime oblique": Geometry((13, 17, 7), (2.0, 0.6, 0.9), (-0.1, 0.9, 0.4)),
    "flat": Geometry((1, 8, 5), (1.0, 1.0, 3.0), (0.5, 0.5, 0.7)),
    "long": Geometry((6, 257, 4), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9)),
    "cube": Geometry((32, 32, 32)),
}
NUMPY = {
    "dipole": dipole_convolve,
    "dipole_squared": lambda x, g: dipole_convolve(x, g, power=2),
    "tkd": lambda x, g: tkd(x, g, threshold=THRESHOLD),
    "tikhonov": lambda x, g: tikhonov(x, g, lam=LAM),
}
RESPONSES = {
    "dipole": lambda d: d,
    "dipole_squared": lambda d: d**2,
    "tkd": lambda d: np.where(abs(d) < CONE, 0, np.sign(d)) / np.maximum(abs(d), THRESHOLD),
    "tikhonov": lambda d: d / (d**2 + LAM),
}
each_grid = pytest.mark.parametrize("geometry", GRIDS.values(), ids=GRIDS)
each_multiplier = pytest.mark.parametrize("multiplier", NUMPY)


def inputs(geometry: Geometry, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return two batches of three channels, voxel size and direction."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2, 3, *geometry.shape)))
    return x.to(dtype), torch.tensor(geometry.voxel_size_mm), torch.tensor(geometry.b0_direction)


def run(arguments: tuple[Tensor, ...], multiplier: str) -> NDArray:
    return dipole_conv(*arguments, multiplier, threshold=THRESHOLD, lam=LAM).numpy()


def as_defined(arguments: tuple[Tensor, ...], multiplier: str) -> NDArray:
    """Return the operator in float64, voxel by voxel as its definition reads."""
    x, voxel_size_mm, b0 = (t.double().numpy() for t in arguments)
    e = np.zeros(x.shape[2:])
    for sign in (1, -1):
        k = np.meshgrid(
            *(
                np.fft.fftfreq(n, size)[sign * np.arange(n) % n]
                for n, size in zip(e.shape, voxel_size_mm, strict=True)
            ),
            indexing="ij",
        )
        squared = sum(axis**2 for axis in k)
        squared[0, 0, 0] = 1
        d = 1 / 3 - sum(axis * b for axis, b in zip(k, b0, strict=True)) ** 2 / squared
        d[0, 0, 0] = 0
        e += RESPONSES[multiplier](d) / 2
    y = np.fft.ifftn(e * np.fft.fftn(x, axes=(2, 3, 4)), axes=(2, 3, 4))
    assert np.linalg.norm(y.imag) < 1e-12 * np.linalg.norm(y)
    return y.real


def relative_error(seen: NDArray, expected: NDArray) -> float:
    return float(np.linalg.norm(seen - expected) / np.linalg.norm(expected))


@each_grid
@each_multiplier
def test_it_is_the_operator_of_numpy(geometry: Geometry, multiplier: str) -> None:
    arguments = inputs(geometry)
    seen = run(arguments, multiplier)
    assert seen.shape == arguments[0].shape
    assert seen.dtype == np.float32
    volumes, maps = (a.reshape(-1, *geometry.shape) for a in (arguments[0].numpy(), seen))
    for volume, y in zip(volumes, maps, strict=True):
        assert relative_error(y, NUMPY[multiplier](volume, geometry)) < TOLERANCE


@each_grid
@each_multiplier
def test_it_is_as_defined(geometry: Geometry, multiplier: str) -> None:
    expected = as_defined(inputs(geometry), multiplier)
    assert relative_error(run(inputs(geometry), multiplier), expected) < TOLERANCE
    doubles = run(inputs(geometry, torch.float64), multiplier)
    assert relative_error(doubles, as_defined(inputs(geometry, torch.float64), multiplier)) < 1e-13


@each_multiplier
def test_opcheck(multiplier: str) -> None:
    x, *geometry = inputs(Geometry((6, 5, 4), b0_direction=(0.6, 0.2, 0.7)))
    for volume in (x, x.clone().requires_grad_(), x.transpose(0, 1), x[:, :1]):
        arguments = (volume, *geometry, multiplier)
        torch.library.opcheck(torch.ops.qsm.dipole_conv.default, arguments)


@each_multiplier
def test_its_gradient_is_itself(multiplier: str) -> None:
    x, *geometry = inputs(Geometry((6, 5, 4), (0.6, 0.7, 2.0), (0.6, 0.2, 0.7)), torch.float64)
    x = x[:1, :1].requires_grad_()
    voxel_size_mm, b0 = (t.double().requires_grad_() for t in geometry)

    def operator(volume: Tensor) -> Tensor:
        return dipole_conv(volume, *geometry, multiplier, threshold=THRESHOLD, lam=LAM)

    assert torch.autograd.gradcheck(operator, (x,), fast_mode=True)
    y = dipole_conv(x, voxel_size_mm, b0, multiplier)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    (y * weights).sum().backward()
    expected = dipole_conv(weights, *geometry, multiplier)
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, rtol=1e-6)
    assert voxel_size_mm.grad is None
    assert b0.grad is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 4, 4)}, GeometryError, r"\(n, c, x, y, z\).* got \(4, 4, 4\)"),
        ({"x": torch.zeros(1, 1, 4, 4, 4).half()}, GeometryError, "float16"),
        ({"voxel_size_mm": torch.ones(1, 3)}, GeometryError, r"voxel_size_mm .* \(1, 3\)"),
        ({"b0_direction": torch.ones(2)}, GeometryError, r"b0_direction .* \(2,\)"),
        ({"multiplier": "laplace"}, UsageError, "'laplace' is unknown; known are dipole, "),
        ({"multiplier": "tkd", "threshold": 0.0}, UsageError, r"\(0, 2/3\], got 0.0"),
        ({"multiplier": "tkd", "threshold": 0.67}, UsageError, r"\(0, 2/3\], got 0.67"),
        ({"multiplier": "tkd", "threshold": float("nan")}, UsageError, "got nan"),
        ({"multiplier": "tikhonov", "lam": 0.0}, UsageError, "positive and finite, got 0.0"),
        ({"multiplier": "tikhonov", "lam": float("inf")}, UsageError, "got inf"),
    ],
)
def test_what_it_cannot_do_is_one_line(change: dict, error: type, message: str) -> None:
    names = ("x", "voxel_size_mm", "b0_direction")
    arguments = dict(zip(names, inputs(Geometry((4, 4, 4))), strict=True))
    with pytest.raises(error, match=message) as caught:
        dipole_conv(**(arguments | change))
    assert "\n" not in str(caught.value)
