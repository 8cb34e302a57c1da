"""Networks small enough to export in a second, and weights that follow from a formula."""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qsm_deploy.export import export_network
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.network import Network
from qsm_deploy.export.networks.tkd_unet import TkdUnet
from qsm_deploy.export.onnx_export import onnx_from_module
from qsm_deploy.runtime.card import MemoryUse, ReceptiveField

State = dict[str, Tensor]


@pytest.fixture(scope="session")
def formula_state() -> Callable[[Mapping[str, Tensor]], State]:
    """Return a function that fills a state dict's shapes by the published formula."""
    return _fill


def _fill(shapes: Mapping[str, Tensor]) -> State:
    norms = {key.removesuffix("running_mean") for key in shapes if key.endswith("running_mean")}
    return {key: _value(key, tensor, norms) for key, tensor in shapes.items()}


def _value(key: str, like: Tensor, norms: set[str]) -> Tensor:
    if not like.is_floating_point():
        return like
    r = _pseudo_random(key, like.numel()).reshape(tuple(like.shape))
    if key.endswith("running_var"):
        r = 1 + 0.5 * r
    elif key.endswith("weight") and key.removesuffix("weight") in norms:
        r = 1 + 0.2 * r
    elif key == "alpha":
        r = np.full_like(r, 1.5)
    elif "params_" in key:
        r = 1 + 0.5 * r
    elif like.ndim <= 1:
        r = 0.1 * r
    else:
        r = r * np.sqrt(3 / np.prod(like.shape[1:]))
    return torch.from_numpy(np.asarray(r, dtype=np.float32))


def _pseudo_random(name: str, count: int) -> np.ndarray:
    s = zlib.crc32(name.encode()) % 10007
    v = np.sin(12.9898 * (np.arange(count) + 1) + 78.233 * (s + 1)) * 43758.5453
    return (v - np.floor(v)) * 2 - 1


@pytest.fixture(scope="session")
def tiny_ir2qsm(formula_state: Callable[[Mapping[str, Tensor]], State]) -> nn.Module:
    network = IR2QSM((2, 4, 8), iterations=2)
    network.load_state_dict(formula_state(network.state_dict()))
    return network.eval()


@pytest.fixture(scope="session")
def tiny_tkd_unet(formula_state: Callable[[Mapping[str, Tensor]], State]) -> nn.Module:
    network = TkdUnet((2, 4))
    network.load_state_dict(formula_state(network.state_dict()))
    return network.eval()


@pytest.fixture(scope="session")
def traced() -> dict[tuple[str, str], onnx.ModelProto]:
    """Return the graphs that were traced already, by kind of network and residual."""
    return {}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, traced: dict[tuple[str, str], onnx.ModelProto]) -> None:
    """Trace each tiny network once; leave out the slow measurements, which have own tests."""

    def trace_once(module: Network) -> onnx.ModelProto:
        key = (type(module).__name__, str(getattr(module, "residual", "")))
        if key not in traced:
            traced[key] = onnx_from_module(module)
        return traced[key]

    monkeypatch.setattr(export_network, "onnx_from_module", trace_once)
    monkeypatch.setattr(
        export_network, "measure_memory", lambda path, card, backend: MemoryUse(1, 2)
    )
    monkeypatch.setattr(
        export_network, "measure_receptive_field", lambda module, card: ReceptiveField(3, 2, 0.999)
    )


@pytest.fixture
def tiny_weights(tmp_path: Path, tiny_ir2qsm: nn.Module) -> Path:
    path = tmp_path / "tiny.pth"
    torch.save(tiny_ir2qsm.state_dict(), path)
    return path
