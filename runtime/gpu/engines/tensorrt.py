"""Plans in TensorRT and in TensorRT for RTX, on device pointers and memory of the caller.

Written against both libraries' interfaces. No plan has run on a GPU yet: the one there
was, an H100, is none that TensorRT for RTX serves, and TensorRT was not there.
"""

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_deploy.kernels.errors import CardError, EngineError
from qsm_deploy.kernels.geometry import shape_text
from qsm_deploy.kernels.tensorrt_plugin import load_dipole_plugin
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.card.read import read_card
from qsm_deploy.runtime.gpu.device import ALIGNMENT, DeviceProperties
from qsm_deploy.runtime.gpu.engines.inference import DeviceBackend, Shapes
from qsm_deploy.runtime.gpu.engines.plan_target import PlanTarget, rebuild_command
from qsm_deploy.runtime.gpu.engines.shapes import ServedShapes, bound_shape
from qsm_deploy.runtime.gpu.engines.tensorrt_library import (
    RUNS,
    Library,
    compute_capabilities,
    error_log,
    open_library,
    start,
)

if TYPE_CHECKING:
    import tensorrt

    from qsm_deploy.runtime.gpu.cuda_device import CudaDevice

PROFILE = 0  # a plan of qsm-export has one
UNSERVED = "cannot run on this GPU"  # in what the library says of a plan that is whole


class TensorRtInference:
    """One execution context for one set of shapes."""

    def __init__(self, context: "tensorrt.IExecutionContext", session: "TensorRtSession") -> None:
        self._context: tensorrt.IExecutionContext | None = context
        self._log = session.log
        self._inputs = {tensor.name for tensor in session.card.inputs}
        self._output = session.card.output.name

    def enqueue(self, inputs: Mapping[str, int], output: int, stream: int) -> None:
        """Enqueue one run; see :class:`qsm_deploy.runtime.gpu.engines.inference.Inference`.

        Every pointer must be aligned to 256 bytes.
        """
        if self._context is None:
            raise EngineError("this inference was closed with its session")
        self._log.messages.clear()
        if inputs.keys() != self._inputs:
            raise EngineError(f"the plan takes {sorted(self._inputs)}, got {sorted(inputs)}")
        for name, address in {**inputs, self._output: output}.items():
            if address == 0 or address % ALIGNMENT:
                raise EngineError(
                    f"{name} is at {address:#x}; TensorRT takes multiples of {ALIGNMENT} bytes"
                )
            if not self._context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT refuses the address of {name}: {self._log.reason()}")
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"TensorRT cannot run the plan: {self._log.reason()}")

    def close(self) -> None:
        """Free the context."""
        self._context = None


class TensorRtSession:
    """A plan on a GPU; see :class:`qsm_deploy.runtime.gpu.engines.inference.DeviceSession`.

    ``weights_bytes`` is the size of the engine: weights, kernels and what describes them. Whether
    the work can be captured must be asked of each context and stream where the library compiles
    kernels while it runs, as TensorRT for RTX does; ``capturable`` is false there.

    Parameters
    ----------
    path
        The plan, for messages.
    data
        Its engine's bytes.
    card, target
        As they stand in them.
    gpu
        What is to run it.

    Raises
    ------
    EngineError
        If the plan was built for another version or GPU, or cannot be loaded.
    CardError
        If it has no card or contradicts it.
    MissingDependencyError
        If its flavour of TensorRT is not installed.
    """

    def __init__(
        self,
        path: Path,
        data: bytes,
        card: ModelCard,
        target: PlanTarget,
        gpu: "CudaDevice",
    ) -> None:
        self.backend: DeviceBackend = target.engine
        library = _matching_library(path, card, target, gpu.properties)
        if card.options.get("dipole_op") == "plugin":
            load_dipole_plugin()
        self.log = error_log(library)
        self.log.messages.clear()
        self._library = library
        self._runtime: tensorrt.Runtime | None = start(library.Runtime, self.log)
        if target.newer:
            self._runtime.engine_host_code_allowed = True  # such a plan brings what runs it
        self._engine: tensorrt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            reason = self.log.reason()
            damaged = "" if UNSERVED in reason else ", it may be truncated or damaged"
            changes = _changes_for(target, gpu.properties, library)
            raise EngineError(
                f"{path}: {target.engine} {library.__version__} cannot load it{damaged} "
                f"({reason}); rebuild it with: {rebuild_command(card, path.name, changes)}"
            )
        self.card = _checked_card(path, card, library, self._engine)
        self.served = ServedShapes(path, self.card, _profile(self.card, self._engine))
        self.version = library.__version__
        self.device = gpu.number
        self.weights_bytes = len(data)
        self.capturable = not hasattr(library.IExecutionContext, "is_stream_capturable")
        # builds another for shapes that this one does not serve
        self.rebuild: Callable[[Exception, str], TensorRtSession] | None = None
        self._asked: tensorrt.IExecutionContext | None = None
        self._open: weakref.WeakSet[TensorRtInference] = weakref.WeakSet()
        # what a caller has enqueued and forgotten must not go while the GPU works on it
        self._latest: TensorRtInference | None = None

    def output_shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Return the output's shape for inputs of these shapes."""
        shape = _sizes(self._ask(shapes).get_tensor_shape(self.card.output.name))
        if not shape or min(shape) < 1:
            raise EngineError(f"TensorRT cannot tell the output's shape: {self.log.reason()}")
        if shape != (expected := bound_shape(self.card, shapes)):
            raise EngineError(
                f"the plan of {self.card.network} gives {shape_text(shape)}, its card says "
                f"{shape_text(expected)}; export it again"
            )
        return shape

    def scratch_bytes(self, shapes: Shapes) -> int:
        """Return the device memory that one inference needs besides inputs and output."""
        return int(self._ask(shapes).update_device_memory_size_for_shapes())

    def own_bytes(self, shapes: Shapes) -> int:
        """Return 0: TensorRT computes in the caller's memory."""
        self.served.require(shapes)
        return 0

    def open_inference(self, shapes: Shapes, scratch: int) -> TensorRtInference:
        """Return an execution context for shapes, in memory of the caller.

        Raises
        ------
        EngineError
            If the plan does not serve the shapes, or scratch is not aligned.
        """
        promised = self.scratch_bytes(shapes)
        context = self._context()
        self._set_shapes(context, shapes)
        size = context.update_device_memory_size_for_shapes()
        if size > promised:
            raise EngineError(f"TensorRT now wants {size} bytes of scratch, before {promised}")
        if (size and not scratch) or scratch % ALIGNMENT:
            raise EngineError(
                f"the scratch memory is at {scratch:#x}; TensorRT takes {size} bytes at a "
                f"multiple of {ALIGNMENT}"
            )
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(scratch, size)
        else:  # the first versions of TensorRT 10 take no size
            context.device_memory = scratch
        self._latest = TensorRtInference(context, self)
        self._open.add(self._latest)
        return self._latest

    def close(self) -> None:
        """Free the engine and its inferences."""
        for inference in self._open:
            inference.close()
        self._asked = None
        self._engine = None
        self._runtime = None  # which must outlive the engine

    def _ask(self, shapes: Shapes) -> "tensorrt.IExecutionContext":
        """Return the context that is only asked, set to shapes."""
        if self._asked is None:
            self._asked = self._context()
        self._set_shapes(self._asked, shapes)
        return self._asked

    def _context(self) -> "tensorrt.IExecutionContext":
        """Return a new context without memory."""
        if self._engine is None:
            raise EngineError("this session was closed")
        self.log.messages.clear()
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"TensorRT cannot make a context: {self.log.reason()}")
        if context.active_optimization_profile != PROFILE and not (
            context.set_optimization_profile_async(PROFILE, 0)
        ):
            raise EngineError(f"TensorRT cannot take the plan's shapes: {self.log.reason()}")
        return context

    def _set_shapes(self, context: "tensorrt.IExecutionContext", shapes: Shapes) -> None:
        self.served.require(shapes)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise EngineError(f"TensorRT refuses {name} of {shape}: {self.log.reason()}")


def _matching_library(
    path: Path, card: ModelCard, target: PlanTarget, gpu: DeviceProperties
) -> Library:
    """Return the library that runs a plan, if it is the one that the plan was built for."""
    library = open_library(target.engine, f"{path}, a plan for {target.engine},", RUNS)
    if mismatch := target.mismatch(library.__version__, gpu):
        changes = _changes_for(target, gpu, library)
        never = f", which {target.engine} does not serve" if "engine" in changes else ""
        command = rebuild_command(card, path.name, changes)
        raise EngineError(f"{path}: {mismatch}{never}; rebuild it here with: {command}")
    return library


def _checked_card(
    path: Path, found: ModelCard, library: Library, engine: "tensorrt.ICudaEngine"
) -> ModelCard:
    """Return the card that the engine holds, which must be that of the file's bytes."""
    names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == library.TensorIOMode.INPUT]
    card = read_card(path, engine.name, inputs, [n for n in names if n not in inputs])
    if card != found:
        raise CardError(f"{path} holds two cards that differ; export it again")
    for name in names:
        if (kind := engine.get_tensor_dtype(name)) != library.DataType.FLOAT:
            raise EngineError(f"{path}: {name} is {kind}, expected float32; export it again")
    return card


def _profile(
    card: ModelCard, engine: "tensorrt.ICudaEngine"
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the smallest and the largest shape of every input."""
    limits = {}
    for tensor in card.inputs:
        shape = _sizes(engine.get_tensor_shape(tensor.name))
        smallest = largest = shape
        if min(shape) < 0:
            first, _, last = engine.get_tensor_profile_shape(tensor.name, PROFILE)
            smallest, largest = _sizes(first), _sizes(last)
        limits[tensor.name] = (smallest, largest)
    return limits


def _sizes(dims: "tensorrt.Dims") -> tuple[int, ...]:
    return tuple(int(dims[n]) for n in range(len(dims)))


def _changes_for(target: PlanTarget, gpu: DeviceProperties, library: Library) -> dict[str, str]:
    """Return what to build differently for a GPU that a plan does not serve."""
    known = compute_capabilities(library)
    if not known or gpu.capability > max(known):
        return {}  # the GPU that is there, or all from the highest on, need no naming
    if gpu.capability not in known:
        return {"engine": "tensorrt"}
    return {} if target.serves(gpu) else {"compute_capability": "{}.{}".format(*gpu.capability)}
