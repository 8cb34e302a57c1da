"""Networks small enough to export in a second, and weights that follow from a formula."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qsm_deploy.export import write_network
from qsm_deploy.export.dipole.op import dipole_conv
from qsm_deploy.export.graph.dipole_lowering import DEFAULT, DipoleOp
from qsm_deploy.export.graph.onnx_export import onnx_from_module
from qsm_deploy.export.networks.blocks import fold_batch_norm
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.network import LOCAL_FIELD, VOXEL_SIZE, Network
from qsm_deploy.runtime.card.card import MemoryUse, ReceptiveField, TensorInfo
from tests.export.authors_files import modl_state
from tests.export.formula import State, fill
from tests.export.table import SMALL, shallow

Array = NDArray[np.float32]
BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="session")
def formula_state() -> Callable[[Mapping[str, Tensor]], State]:
    """Return a function that fills a state dict's shapes by the published formula."""
    return fill


@pytest.fixture(scope="session")
def run() -> Callable[..., Array]:
    """Return a function that runs a module, or a graph in a backend, and gives its output."""
    return _run


def _run(
    model: nn.Module | onnx.ModelProto, *inputs: Tensor | Array, backend: str = "onnxruntime"
) -> Array:
    return _outputs(model, *inputs, backend=backend)[0]


def _outputs(
    model: nn.Module | onnx.ModelProto, *inputs: Tensor | Array, backend: str = "onnxruntime"
) -> list[Array]:
    if isinstance(model, nn.Module):
        with torch.inference_mode():
            y = model(*map(torch.as_tensor, inputs))
        return [part.numpy() for part in (y if isinstance(y, tuple) else (y,))]
    arrays = map(np.asarray, inputs)
    feeds = {info.name: array for info, array in zip(model.graph.input, arrays, strict=True)}
    data = model.SerializeToString()
    if backend == "onnxruntime":
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return session.run(None, feeds)
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    return list(core.compile_model(core.read_model(data), "CPU", settings)(feeds).values())


@pytest.fixture(scope="session")
def outputs() -> Callable[..., list[Array]]:
    """Return what runs a module, or a graph in a backend, and gives all its outputs."""
    return _outputs


@pytest.fixture(scope="session")
def run_everywhere() -> Callable[..., dict[str, Array]]:
    """Return a function that runs a module and its graph: the outputs, by what made them."""

    def everywhere(
        module: nn.Module, graph: onnx.ModelProto, *inputs: Tensor | Array
    ) -> dict[str, Array]:
        in_backends = {b: _run(graph, *inputs, backend=b) for b in BACKENDS}
        return {"pytorch": _run(module, *inputs)} | in_backends

    return everywhere


class DipoleNetwork(Network):
    """The dipole operator as a network."""

    inputs = (LOCAL_FIELD, VOXEL_SIZE, TensorInfo("b0_direction", "1", (3,)))
    divisor = 1

    def __init__(self, multiplier: str, *, threshold: float = 0.15, lam: float = 0.02) -> None:
        super().__init__()
        self.multiplier, self.threshold, self.lam = multiplier, threshold, lam

    def forward(self, x: Tensor, voxel_size_mm: Tensor, b0_direction: Tensor) -> Tensor:
        chosen = {"threshold": self.threshold, "lam": self.lam}
        return dipole_conv(x, voxel_size_mm, b0_direction, self.multiplier, **chosen)


@pytest.fixture(scope="session")
def dipole_network() -> Callable[..., Network]:
    """Return a function that makes a network of the dipole operator with a multiplier."""
    return lambda multiplier, **parameters: DipoleNetwork(multiplier, **parameters).eval()


@pytest.fixture(scope="session")
def small(formula_state: Callable[[Mapping[str, Tensor]], State]) -> Callable[[str], Network]:
    """Return what makes a network of the table of small ones, by its name."""

    def make(name: str) -> Network:
        with shallow():
            network = SMALL[name]()
        network.load_state_dict(formula_state(network.state_dict()))
        if "unrolled" in name or "loopnet" in name:
            fold_batch_norm(network)
        return network.eval()

    return make


@pytest.fixture(scope="session")
def traced(small: Callable[[str], Network], kept: None) -> Callable[..., onnx.ModelProto]:
    """Return what traces a network of that table; every caller gets a graph of its own."""

    def trace(name: str, dipole_op: DipoleOp = DEFAULT) -> onnx.ModelProto:
        with shallow():
            return onnx_from_module(small(name), dipole_op)

    return trace


@pytest.fixture(scope="session")
def tiny_ir2qsm(formula_state: Callable[[Mapping[str, Tensor]], State]) -> nn.Module:
    network = IR2QSM((2, 4, 8), iterations=2)
    network.load_state_dict(formula_state(network.state_dict()))
    return network.eval()


@pytest.fixture(scope="session")
def tiny_tv_unet(small: Callable[[str], Network]) -> nn.Module:
    return small("tv-unet")


@pytest.fixture(scope="session")
def keras_weights() -> State:
    """Return a small MoDL-QSM's weights under Keras names and axes."""
    return modl_state()


@pytest.fixture(scope="session", autouse=True)
def kept(kept_traces: None) -> None:
    """Trace no network twice."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests measure out of the user's cache, and what is there out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the slow measurements, which have own tests."""
    monkeypatch.setattr(write_network, "measure_memory", lambda path, backend: MemoryUse(1, 2))
    monkeypatch.setattr(
        write_network,
        "cached_receptive_field",
        lambda card, measure: ReceptiveField(3, 2, 0.999),
    )


@pytest.fixture
def tiny_weights(tmp_path: Path, tiny_ir2qsm: nn.Module) -> Path:
    path = tmp_path / "tiny.pth"
    torch.save(tiny_ir2qsm.state_dict(), path)
    return path
