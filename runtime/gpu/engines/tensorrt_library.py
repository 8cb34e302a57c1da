"""The two flavours of TensorRT as one library: what is installed, what it has, what it says.

Their classes have the same names. What this package takes of them is :class:`Library`, in the
types of the module ``tensorrt``; where its stubs are, a type checker holds every use against them.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

from qsm_deploy.kernels.errors import EngineError, MissingDependencyError

if TYPE_CHECKING:
    import tensorrt

LONGEST = 400  # of a reason, which may list a network's weights
Flavour = Literal["tensorrt", "tensorrt-rtx"]
LIBRARIES: Mapping[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# what tells the libraries from stubs of the same name; the runtime's part, and the builder's
RUNS = ("Runtime", "ILogger", "ExecutionContextAllocationStrategy")
BUILDS = (*RUNS, "Builder", "OnnxParser", "NetworkDefinitionCreationFlag")


class Library(Protocol):
    """What is used of the module ``tensorrt`` or ``tensorrt_rtx``."""

    __name__: str
    __version__: str
    Builder: "type[tensorrt.Builder]"
    BuilderFlag: "type[tensorrt.BuilderFlag]"
    DataType: "type[tensorrt.DataType]"
    Dims: "type[tensorrt.Dims]"
    ExecutionContextAllocationStrategy: "type[tensorrt.ExecutionContextAllocationStrategy]"
    HardwareCompatibilityLevel: "type[tensorrt.HardwareCompatibilityLevel]"
    IExecutionContext: "type[tensorrt.IExecutionContext]"
    ILogger: "type[tensorrt.ILogger]"
    IProgressMonitor: "type[tensorrt.IProgressMonitor]"
    LayerInformationFormat: "type[tensorrt.LayerInformationFormat]"
    MemoryPoolType: "type[tensorrt.MemoryPoolType]"
    NetworkDefinitionCreationFlag: "type[tensorrt.NetworkDefinitionCreationFlag]"
    OnnxParser: "type[tensorrt.OnnxParser]"
    ProfilingVerbosity: "type[tensorrt.ProfilingVerbosity]"
    Runtime: "type[tensorrt.Runtime]"
    TensorIOMode: "type[tensorrt.TensorIOMode]"


@dataclass(frozen=True)
class ErrorLog:
    """What a library is given to log to, and the errors that it logged."""

    logger: "tensorrt.ILogger"
    messages: list[str]

    def reason(self) -> str:
        """Return the first error since it was asked last, in one line."""
        said = " ".join(self.messages[0].split()) if self.messages else "it gives no reason"
        self.messages.clear()
        return said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."


def installed_engines() -> tuple[Flavour, ...]:
    """Return the flavours whose library is installed; a folder of stubs alone is none."""
    found = {e: importlib.util.find_spec(LIBRARIES[e]) for e in get_args(Flavour)}
    return tuple(e for e, spec in found.items() if spec is not None and spec.origin is not None)


def open_library(engine: Flavour, purpose: str, needed: Sequence[str] = BUILDS) -> Library:
    """Import the library of a flavour.

    Parameters
    ----------
    engine
        The flavour.
    purpose
        What it is for, in words for the user.
    needed
        The classes that it must have.

    Raises
    ------
    MissingDependencyError
        If it is not installed, or lacks a class.
    """
    name = LIBRARIES[engine]
    try:
        library: Any = importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(name, engine, purpose) from error
    if not all(hasattr(library, attribute) for attribute in needed):
        raise MissingDependencyError(name, engine, purpose)
    found: Library = library
    return found


def compute_capabilities(library: Library) -> dict[tuple[int, ...], Any]:
    """Return the compute capabilities that a library builds for by name; TensorRT has none.

    Those that TensorRT for RTX names are all that it serves, and what is above the highest.
    """
    kinds: Any = getattr(library, "ComputeCapability", None)
    named = {} if kinds is None else kinds.__members__
    return {(int(n[2:-1]), int(n[-1])): kind for n, kind in named.items() if n.startswith("SM")}


Entry = TypeVar("Entry")
_logs: dict[int, tuple[Library, ErrorLog]] = {}


def error_log(library: Library) -> ErrorLog:
    """Return the log of a library's errors; a process has one for each library."""
    messages: list[str] = []

    class Logger(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                messages.append(message)

    if id(library) not in _logs:
        _logs[id(library)] = library, ErrorLog(Logger(), messages)
    return _logs[id(library)][1]


def start(entry: "Callable[[tensorrt.ILogger], Entry]", log: ErrorLog) -> Entry:
    """Return a library's builder or runtime.

    Raises
    ------
    EngineError
        If it cannot start, as where the driver is too old for it.
    """
    try:
        return entry(log.logger)
    except (TypeError, RuntimeError) as error:
        raise EngineError(f"TensorRT cannot start here: {log.reason()}") from error
