"""A made-up TensorRT on a made-up GPU, and plans built with it."""

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qsm_deploy.runtime.card.card as card_module
from qsm_deploy.export.graph.onnx_export import with_card
from qsm_deploy.kernels.errors import EngineError
from qsm_deploy.runtime.card.card import MemoryUse, ModelCard, parse_card
from qsm_deploy.runtime.card.plan_file import FORM, PROMISE, plan_bytes
from qsm_deploy.runtime.gpu.building.builder import build_plan
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.building.config import plan_target
from qsm_deploy.runtime.gpu.building.profile import profile_from
from qsm_deploy.runtime.gpu.device import DeviceProperties

VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}


@pytest.fixture(scope="session")
def stand_in_module() -> Any:
    path = Path(__file__).with_name("stand_in.py")
    spec = importlib.util.spec_from_file_location("tensorrt_stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeDriver:
    """Two GPUs, and what stands for the one that is opened; notes what it is told."""

    def __init__(self) -> None:
        self.gpus = [DeviceProperties(0, "NVIDIA Made-up 100", (9, 0))]
        self.gpus.append(DeviceProperties(1, "NVIDIA Made-up 4090", (8, 9)))
        self.current: list[int] = []
        self.ordered: list[tuple[int, int]] = []
        self.closed: list[int] = []

    def gpu(self, number: int) -> DeviceProperties:
        if number >= len(self.gpus):
            raise EngineError(f"there is no GPU {number}; this machine has none")
        return self.gpus[number]

    def open(self, number: int) -> "FakeDriver":
        self.number, self.properties = number, self.gpu(number)
        self.current.append(number)
        return self

    def open_stream(self) -> int:
        return 0x5000

    def order(self, first: int, then: int) -> None:
        self.ordered.append((first, then))

    def synchronize(self) -> None:
        pass

    def close_stream(self, stream: int) -> None:
        self.closed.append(stream)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Put a made-up driver where one is looked for."""
    driver = FakeDriver()
    stand_in = SimpleNamespace(device_properties=driver.gpu, CudaDevice=driver.open)
    monkeypatch.setitem(sys.modules, "qsm_deploy.runtime.gpu.cuda_device", stand_in)
    return driver


@pytest.fixture
def levers(stand_in_module: Any) -> Any:
    return stand_in_module.Levers()


@pytest.fixture
def install(
    stand_in_module: Any, levers: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ModuleType]:
    """Return a function that installs a stand-in of a library, by its name and version."""

    def install(name: str = "tensorrt", version: str | None = None) -> ModuleType:
        module = stand_in_module.stand_in(name, version or VERSIONS[name], levers)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def card() -> ModelCard:
    """Return the card of a network with one volume and the voxel size, divisor 8."""
    bundled = parse_card(
        (Path(card_module.__file__).parents[1] / "models" / "tv-unet.json").read_text()
    )
    field = bundled.inputs[0]
    size = replace(field, name="voxel_size_mm", unit="mm", shape=(3,))
    used = {"onnxruntime": MemoryUse(1000, 10)}
    return replace(
        bundled,
        network="ir2qsm",
        priors=(),
        anchor=None,
        inputs=(field, size),
        divisor=8,
        memory=used,
        options={"residual": "input"},
    )


@pytest.fixture
def model(card: ModelCard) -> onnx.ModelProto:
    """Return a graph with the card's inputs and output."""

    def value(tensor: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.shape)

    field, size = (tensor.name for tensor in card.inputs)
    nodes = [helper.make_node("ReduceSum", [size], ["s"], keepdims=0)]
    nodes.append(helper.make_node("Mul", [field, "s"], [card.output.name]))
    inputs, outputs = [value(t) for t in card.inputs], [value(card.output)]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def build(
    tmp_path: Path, card: ModelCard, model: onnx.ModelProto, driver: FakeDriver
) -> Callable[..., Path]:
    """Return a function that builds a plan for a card into a file, of the former form or whole."""

    def build(
        engine: Any = "tensorrt", card: ModelCard = card, whole: bool = False, **choices: Any
    ) -> Path:
        chosen = PlanChoices(engine, **choices)
        profile = profile_from("16,32,64", card.divisor, patchable=True)
        options = card.options | plan_target(chosen).options() | {"shapes": str(profile)}
        if whole:
            options |= {PROMISE: f"{FORM}"}
        graph = with_card(model, card)
        plan = build_plan(graph, replace(card, options=options), profile, chosen)
        path = tmp_path / "x.plan"
        path.write_bytes(plan_bytes(plan.data, graph) if whole else plan.data)
        return path

    return build


@pytest.fixture
def buffer() -> Callable[[int], tuple[int, np.ndarray]]:
    """Return a function that makes floats at a multiple of 256 bytes: address and array.

    They live as long as the test, of which many keep the address alone.
    """
    kept = []

    def buffer(count: int) -> tuple[int, np.ndarray]:
        store = np.zeros(4 * count + 256, np.uint8)
        kept.append(store)
        offset = -store.ctypes.data % 256
        array = store[offset : offset + 4 * count].view(np.float32)
        return array.ctypes.data, array

    return buffer


@pytest.fixture
def press_ctrl_c() -> Iterator[Callable[[], None]]:
    """Return what calls whoever waits for Ctrl-C.

    No signal is sent: in a process that has loaded all the libraries of this project, one of them
    leaves signals a stack that is gone.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press() -> None:
        handler = signal.getsignal(signal.SIGINT)
        assert callable(handler)
        handler(signal.SIGINT, None)

    yield press
    signal.signal(signal.SIGINT, before)
