"""The dipole operator of matrix products against the one of fast transforms, in every engine."""

import dataclasses
import math

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor

from qsm_deploy.export.networks import dipole
from qsm_deploy.export.networks.dipole import Power, dipole_filter
from qsm_deploy.export.networks.network import CHI, LOCAL_FIELD, VOXEL_SIZE, Network
from qsm_deploy.export.onnx_export import onnx_from_module
from qsm_deploy.kernels.dipole import dipole_convolve
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card import TensorInfo

TOLERANCE = 2e-6  # 9e-7 was seen at 1030 voxels, 6e-7 below 260
WRONG = 1e-3
GRIDS = {
    "even": Geometry((16, 12, 10)),
    "odd": Geometry((7, 9, 11)),
    "mixed oblique": Geometry((8, 9, 10), b0_direction=(0.3, -0.5, 0.8)),
    "even oblique anisotropic": Geometry((12, 8, 10), (0.6, 0.7, 2.0), (0.6, 0.2, 0.7)),
    "odd oblique anisotropic": Geometry((9, 13, 7), (2.0, 0.6, 0.9), (-0.1, 0.9, 0.4)),
    "flat": Geometry((1, 8, 5), (1.0, 1.0, 3.0), (0.5, 0.5, 0.7)),
    "long x": Geometry((160, 6, 5), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9)),
    "long y": Geometry((5, 257, 6), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9)),
    "long z": Geometry((6, 4, 192), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9)),
    "long odd z": Geometry((6, 4, 257), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9)),
    "longest": Geometry((4, 1030, 4), (0.9, 1.0, 1.1), (0.1, 0.2, 0.9)),
}
each_grid = pytest.mark.parametrize("geometry", GRIDS.values(), ids=GRIDS)
each_power = pytest.mark.parametrize("power", [1, 2])


class Filter(Network):
    inputs = (LOCAL_FIELD, VOXEL_SIZE, TensorInfo("b0_direction", "1", (3,)))
    output = CHI
    divisor = 1

    def __init__(self, power: Power) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor, voxel_size_mm: Tensor, b0_direction: Tensor) -> Tensor:
        return dipole_filter(x, voxel_size_mm, b0_direction, self.power)


@pytest.fixture(scope="module")
def engines():
    """Return for each power the functions that filter, by the name of their engine."""
    found = {}
    for power in (1, 2):
        module = Filter(power).eval()
        data = onnx_from_module(module).SerializeToString()
        ort = onnxruntime.InferenceSession(data)
        names = [value.name for value in ort.get_inputs()]
        compiled = openvino.Core().compile_model(
            openvino.Core().read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        found[power] = {
            "torch": lambda arrays, m=module: m(*map(torch.from_numpy, arrays)).numpy(),
            "onnxruntime": lambda arrays, s=ort, n=names: s.run(
                None, dict(zip(n, arrays, strict=True))
            )[0],
            "openvino": lambda arrays, c=compiled: c(arrays)[0],
        }
    return found


def volumes(geometry: Geometry, count: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, 1, *geometry.shape), dtype=np.float32)


def tensors(geometry: Geometry) -> list[np.ndarray]:
    return [np.float32(geometry.voxel_size_mm), np.float32(geometry.b0_direction)]


def relative_error(seen: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(seen - expected) / np.linalg.norm(expected))


@each_grid
@each_power
@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
def test_it_is_the_fast_operator(engines, geometry, power, engine) -> None:
    x = volumes(geometry, count=2)
    seen = engines[power][engine]([x, *tensors(geometry)])
    assert seen.shape == x.shape
    for volume, y in zip(x[:, 0], seen[:, 0], strict=True):
        assert relative_error(y, dipole_convolve(volume, geometry, power=power)) < TOLERANCE


@each_power
def test_channels_do_not_mix(power) -> None:
    geometry = GRIDS["even oblique anisotropic"]
    x = torch.from_numpy(volumes(geometry, count=3))
    arguments = [torch.from_numpy(t) for t in tensors(geometry)]
    each = dipole_filter(x, *arguments, power)
    assert torch.equal(dipole_filter(x.transpose(0, 1), *arguments, power).transpose(0, 1), each)


def test_a_constant_becomes_zero() -> None:
    geometry = GRIDS["odd oblique anisotropic"]
    arguments = [torch.from_numpy(t) for t in tensors(geometry)]
    assert dipole_filter(torch.ones(1, 1, *geometry.shape), *arguments).abs().max() < 1e-6


def run(geometry: Geometry, power: Power = 1) -> np.ndarray:
    arrays = [volumes(geometry), *tensors(geometry)]
    return dipole_filter(*map(torch.from_numpy, arrays), power)[0, 0].numpy()


def test_without_symmetry_on_the_nyquist_planes_it_fails(monkeypatch) -> None:
    geometry = GRIDS["even oblique anisotropic"]
    expected = dipole_convolve(volumes(geometry)[0, 0], geometry)
    of_size = dipole._Transform.of_size

    def one_sided(n: int, *, half: bool) -> dipole._Transform:
        t = of_size(n, half=half)
        frequency = t.frequencies[0]
        return dataclasses.replace(t, frequencies=torch.stack([frequency, -frequency]))

    monkeypatch.setattr(dipole._Transform, "of_size", one_sided)
    assert relative_error(run(geometry), expected) > WRONG


def test_squaring_after_the_symmetry_fails() -> None:
    geometry = GRIDS["even oblique anisotropic"]
    x, *arguments = map(torch.from_numpy, [volumes(geometry), *tensors(geometry)])
    twice = dipole_filter(dipole_filter(x, *arguments), *arguments)[0, 0].numpy()
    assert relative_error(twice, run(geometry, power=2)) > WRONG


def test_angles_of_products_that_are_not_reduced_are_worse(monkeypatch) -> None:
    geometry = GRIDS["longest"]
    expected = dipole_convolve(volumes(geometry)[0, 0], geometry)
    of_size = dipole._Transform.of_size

    def unreduced(n: int, *, half: bool) -> dipole._Transform:
        t = of_size(n, half=half)
        i = torch.arange(n, dtype=torch.float32)
        angle = i[:, None] * i[: t.cos.shape[1]] * (2 * math.pi / n)
        return dataclasses.replace(t, cos=torch.cos(angle), sin=torch.sin(angle))

    good = relative_error(run(geometry), expected)
    monkeypatch.setattr(dipole._Transform, "of_size", unreduced)
    assert relative_error(run(geometry), expected) > 20 * good
