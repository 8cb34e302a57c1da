"""A stand-in for ``tensorrt`` and ``tensorrt_rtx``: the documented interface, nothing more.

It computes twice the first input, in host memory. What the documentation forbids fails as the
library would fail, and what it leaves undefined is an assertion.
"""

import ctypes
import json
import struct
import zlib
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import onnx

MAGIC = b"made-up plan"
SCRATCH_PER_VOXEL = 8


class Levers:
    """What goes wrong, and what was seen."""

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.gpu = "sm_90 NVIDIA Made-up 100"
        self.plugins: list[Any] = []
        self.runs: list[dict[str, Any]] = []
        self.contexts = 0
        self.configs: list[Any] = []
        self.phases = (("Building engine", None, 2), ("Timing", "Building engine", 3))
        self.during_build = lambda: None
        self.parsed_without_plugin = False
        self.enqueue = lambda stream, task: task()


def as_bytes(header: dict[str, Any], card: str) -> bytes:
    head = json.dumps(header).encode()
    body = MAGIC + struct.pack("<ii", len(head), len(card)) + head + card.encode()
    return body + struct.pack("<I", zlib.crc32(body))


def from_bytes(data: bytes) -> tuple[dict[str, Any], str] | None:
    if data[: len(MAGIC)] != MAGIC or len(data) < len(MAGIC) + 12:
        return None
    if struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
        return None
    first, second = struct.unpack_from("<ii", data, len(MAGIC))
    start = len(MAGIC) + 8
    card = data[start + first : start + first + second].decode()
    return json.loads(data[start : start + first]), card


def stand_in(name: str, version: str, levers: Levers) -> ModuleType:
    """Return the module; ``tensorrt_rtx`` has compute capabilities, and no plugins."""
    trt: Any = ModuleType(name)
    trt.__version__, trt.__spec__ = version, ModuleSpec(name, None, origin=__file__)
    rtx = name == "tensorrt_rtx"

    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

        def log(self, severity: Severity, msg: str) -> None:
            raise NotImplementedError

    logger: list[ILogger] = []

    def complain(message: str) -> None:
        logger[-1].log(Severity.WARNING, "not of interest")
        logger[-1].log(Severity.ERROR, message)

    class Dims:
        def __init__(self, shape: list[int]) -> None:
            self._shape = [int(n) for n in shape]

        def __len__(self) -> int:
            return len(self._shape)

        def __getitem__(self, index: int) -> int:
            return self._shape[index]

    DataType = Enum("DataType", "FLOAT HALF")
    TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
    Strategy = Enum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
    BuilderFlag = Enum("BuilderFlag", "TF32 VERSION_COMPATIBLE")
    levels = "NONE AMPERE_PLUS" + " SAME_COMPUTE_CAPABILITY" * ("old" not in levers.fails)
    HardwareCompatibilityLevel = Enum("HardwareCompatibilityLevel", levels)
    Pool = Enum("Pool", "WORKSPACE")
    Verbosity = Enum("Verbosity", "LAYER_NAMES_ONLY NONE DETAILED")
    Format = Enum("Format", "ONELINE JSON")

    class Creation(IntEnum):
        STRONGLY_TYPED = 1

    class Context:
        def __init__(self, engine: "Engine", first: bool) -> None:
            self.engine, self.shapes, self.first = engine, {}, first
            self.addresses: dict[str, int] = {}
            self.active_optimization_profile = 0 if first else -1
            self.needed: int | None = None
            self.memory: tuple[int, int] | None = None

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            self.active_optimization_profile = profile_index
            return "profile" not in levers.fails

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert self.active_optimization_profile == 0, "no profile chosen"
            assert isinstance(shape, tuple)
            limits = self.engine.profile.get(name)
            if limits is None or not all(
                a <= n <= b for a, n, b in zip(limits[0], shape, limits[2], strict=True)
            ):
                complain(f"setInputShape: {name} {shape}")
                return False
            self.shapes[name], self.needed, self.memory = shape, None, None
            return "input shape" not in levers.fails

        def get_tensor_shape(self, name: str) -> Dims:
            if "output shape" in levers.fails:
                return Dims([-1])
            if name == self.engine.output:
                return Dims(list(self.shapes[self.engine.inputs[0]]))
            return Dims(list(self.shapes[name]))

        def update_device_memory_size_for_shapes(self) -> int:
            assert self.shapes.keys() == set(self.engine.inputs), "shapes are missing"
            self.needed = SCRATCH_PER_VOXEL * int(np.prod(self.shapes[self.engine.inputs[0]]))
            if "grows" in levers.fails and not self.first:
                self.needed += 256
            return self.needed

        def set_device_memory(self, memory: int, size: int) -> None:
            assert self.needed is not None, "the size was not updated for these shapes"
            assert memory % 256 == 0
            assert size >= self.needed
            self.memory = memory, size

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert memory % 256 == 0
            if name not in (*self.engine.inputs, self.engine.output) or "address" in levers.fails:
                complain(f"setTensorAddress: {name}")
                return False
            self.addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            names = {*self.engine.inputs, self.engine.output}
            ready = self.memory is not None and self.addresses.keys() == names
            if not ready or "execute" in levers.fails:
                complain("enqueueV3: not everything is set")
                return False
            shape = self.shapes[self.engine.inputs[0]]
            count = int(np.prod(shape))
            first, last = (
                np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[n]))
                for n in (self.engine.inputs[0], self.engine.output)
            )
            levers.enqueue(stream_handle, lambda: np.multiply(first, 2, out=last) is None)
            levers.runs.append({"stream": stream_handle, "memory": self.memory, "shape": shape})
            return True

    if "old" in levers.fails:
        # the first versions of TensorRT 10 are given no size
        del Context.set_device_memory

        def take(self: Any, memory: int) -> None:
            assert self.needed is not None
            self.memory = memory, self.needed

        Context.device_memory = property(None, take)
    if rtx:
        Context.is_stream_capturable = lambda self, stream: False

    class Engine:
        def __init__(self, header: dict[str, Any], name: str) -> None:
            self.name = name
            self.inputs, self.output = header["inputs"], header["output"]
            self.kinds, self.profile = header["kinds"], header["profile"]
            self.shapes = header["shapes"]
            self.num_io_tensors = len(self.inputs) + 1

        def get_tensor_name(self, index: int) -> str:
            return [*self.inputs, self.output][index]

        def get_tensor_mode(self, name: str) -> Any:
            return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return DataType[self.kinds[name]]

        def get_tensor_shape(self, name: str) -> Dims:
            return Dims(self.shapes[name])

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
            assert profile_index == 0
            assert min(self.shapes[name]) < 0, "it is not dynamic"
            return [Dims(shape) for shape in self.profile[name]]

        def create_execution_context(self, strategy: Any = Strategy.STATIC) -> Context | None:
            assert strategy is Strategy.USER_MANAGED, "it would allocate by itself"
            if "context" in levers.fails:
                complain("createExecutionContext: out of memory")
                return None
            levers.contexts += 1
            return Context(self, levers.contexts == 1)

        def create_engine_inspector(self) -> Any:
            return Inspector()

    class Inspector:
        def get_engine_information(self, format: Any) -> str:
            assert format is Format.JSON
            fused = {"Name": "conv + relu", "LayerType": "CaskConvolution", "TacticName": "sm90_x"}
            fused["Outputs"] = [{"Name": "y", "Format/Datatype": "Row major linear FP16"}]
            return json.dumps({"Layers": [fused, "a name alone"]})

    class Runtime:
        def __init__(self, logger_: ILogger) -> None:
            assert isinstance(logger_, ILogger)
            logger.append(logger_)
            self.engine_host_code_allowed = False
            if "start" in levers.fails:
                complain("CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            found = from_bytes(serialized_engine)
            if found is None or "deserialise" in levers.fails:
                complain("deserializeCudaEngine: magic tag does not match\nmore")
                return None
            if "other GPU" in levers.fails:
                complain("The engine cannot run on this GPU, which has another capability")
                return None
            if found[0]["carries code"] and not self.engine_host_code_allowed:
                complain("engine host code is not allowed")
                return None
            return Engine(*found)

    class Network:
        name = ""

        def __init__(self) -> None:
            self.num_layers, self.inputs, self.outputs = 0, {}, []

        def get_layer(self, index: int) -> Any:
            class Layer:
                name, type = f"layer {index}", DataType.FLOAT
                get_output = staticmethod(lambda n: Layer)
                dtype = DataType.FLOAT

            return Layer

    class Parser:
        def __init__(self, network: Network, logger: ILogger) -> None:
            self.network, self.num_errors = network, 0

        def parse(self, model: bytes, path: str = "") -> bool:
            graph = onnx.load_from_string(model).graph
            levers.parsed_without_plugin = not levers.plugins
            self.network.num_layers = len(graph.node)
            for value in (*graph.input, *graph.output):
                dims = [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]
                self.network.inputs[value.name] = dims
            self.network.outputs = [value.name for value in graph.output]
            return True

        def get_error(self, index: int) -> Any:
            raise IndexError(index)

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, list[list[int]]] = {}

        def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
            self.shapes[input] = [list(dims) for dims in (min, opt, max)]

    class TimingCache:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> bytes:
            return self.data

    class Config:
        def __init__(self) -> None:
            self.flags, self.limits, self.profiles = {BuilderFlag.TF32}, {}, []
            self.profiling_verbosity = Verbosity.LAYER_NAMES_ONLY
            self.progress_monitor: Any = None
            self.cache: TimingCache | None = None
            self._level = HardwareCompatibilityLevel.NONE
            self.given_cache: bytes | None = None
            if rtx:
                self.num_compute_capabilities, self.capabilities = 0, {}
            levers.configs.append(self)

        @property
        def hardware_compatibility_level(self) -> Any:
            return self._level

        @hardware_compatibility_level.setter
        def hardware_compatibility_level(self, level: Any) -> None:
            if not rtx:
                self._level = level

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            assert isinstance(pool_size, int)
            self.limits[pool.name] = pool_size

        def add_optimization_profile(self, profile: Profile) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
            return TimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache.data and not cache.data.startswith(levers.gpu.encode()):
                complain("the timing cache is of another device")
                return False
            self.cache, self.given_cache = cache, cache.data
            return True

        def get_timing_cache(self) -> TimingCache | None:
            return self.cache

    if rtx:

        def set_compute_capability(self: Any, compute_capability: Any, index: int) -> bool:
            assert index < self.num_compute_capabilities
            self.capabilities[index] = compute_capability
            return True

        Config.set_compute_capability = set_compute_capability
        named = "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121"
        trt.ComputeCapability = Enum("ComputeCapability", named)

    class Builder:
        def __init__(self, logger_: ILogger) -> None:
            assert isinstance(logger_, ILogger)
            logger.append(logger_)
            if "start" in levers.fails:
                complain("CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int = 0) -> Network:
            assert flags == 1 << Creation.STRONGLY_TYPED
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            monitor = config.progress_monitor
            for phase_name, parent, steps in levers.phases if monitor else ():
                monitor.phase_start(phase_name, parent, steps)
                for step in range(steps):
                    levers.during_build()
                    if not monitor.step_complete(phase_name, step):
                        complain("BuildCanceled")
                        return None
            for phase_name, _, _ in reversed(levers.phases if monitor else ()):
                monitor.phase_finish(phase_name)
            if "build" in levers.fails:
                complain("no implementation for node conv")
                return None
            if config.cache is not None:
                config.cache.data = levers.gpu.encode() + b" measured"
            profile = config.profiles[0].shapes
            inputs = [n for n in network.inputs if n not in network.outputs]
            header = {
                "inputs": inputs,
                "output": network.outputs[0],
                "kinds": dict.fromkeys(network.inputs, "FLOAT"),
                "shapes": network.inputs,
                "profile": {n: profile.get(n, [network.inputs[n]] * 3) for n in inputs},
                "carries code": BuilderFlag.VERSION_COMPATIBLE in config.flags,
            }
            return as_bytes(header, network.name)

    class IProgressMonitor:
        pass

    class Registry:
        all_creators = levers.plugins

        def load_library(self, plugin_path: str) -> Any:
            if "plugin" in levers.fails:
                return None
            levers.plugins.append(
                type("Creator", (), {"name": "DipoleConv", "plugin_namespace": ""})
            )
            return object()

    trt.ILogger, trt.Dims, trt.DataType, trt.TensorIOMode = ILogger, Dims, DataType, TensorIOMode
    trt.ExecutionContextAllocationStrategy = Strategy
    trt.BuilderFlag, trt.MemoryPoolType, trt.ProfilingVerbosity = BuilderFlag, Pool, Verbosity
    trt.HardwareCompatibilityLevel = HardwareCompatibilityLevel
    trt.LayerInformationFormat, trt.NetworkDefinitionCreationFlag = Format, Creation
    trt.Runtime, trt.Builder, trt.OnnxParser = Runtime, Builder, Parser
    trt.ICudaEngine, trt.IExecutionContext, trt.IBuilderConfig = Engine, Context, Config
    trt.IOptimizationProfile, trt.ITimingCache = Profile, TimingCache
    trt.EngineInspector, trt.INetworkDefinition = Inspector, Network
    trt.IProgressMonitor = IProgressMonitor
    if not rtx:
        trt.IPluginV3, trt.get_plugin_registry = object, lambda: Registry()
        trt.IPluginRegistry = Registry
    return trt
