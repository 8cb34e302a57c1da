"""The CPU backends, and the choice among those installed: a new one is a file here and a row."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import EngineError, MissingDependencyError, UsageError
from qsm_deploy.kernels.threads import of_task
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.card.graph import require_bounded_graph
from qsm_deploy.runtime.console.time_limit import LONGEST_S
from qsm_deploy.runtime.sessions.session import AUTO, BACKENDS, Backend, Precision, Session

DIPOLE_NODE = re.compile(r"qsm[.:]+DipoleConv")  # as one library or the other writes it


def choose_backend(wanted: Backend, precision: Precision) -> tuple[Backend, str]:
    """Return a backend and why: the one asked for, else the fastest that is installed.

    Raises
    ------
    UsageError
        If the backend does not compute in ``precision``.
    """
    able = [name for name, row in BACKENDS.items() if precision in row.precisions]
    if wanted not in (AUTO, *able):
        raise UsageError(
            f"--precision {precision} needs --backend {' or '.join(able)}: "
            f"{BACKENDS[wanted].label} has no {precision} convolution on a CPU"
        )
    if len(able) == 1:
        return able[0], f"the only CPU backend that computes in {precision}"
    if wanted != AUTO:
        return wanted, "asked for"
    here = [name for name in installed_backends() if name in able]
    if not here or here[0] == able[0]:
        return able[0], "the fastest CPU backend installed"
    return here[0], f"{able[0]}, which is faster, is not installed"


def installed_backends() -> tuple[Backend, ...]:
    """Return the backends whose library is installed, the fastest first."""
    return tuple(b for b in BACKENDS if importlib.util.find_spec(b) is not None)


def require_backend(backend: Backend) -> Callable[..., Session]:
    """Import the library of a backend, and return what opens a file in it.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    if importlib.util.find_spec(backend) is None:
        raise MissingDependencyError(backend, backend, f"--backend {backend}")
    module = importlib.import_module(f"qsm_deploy.runtime.sessions.{backend}")
    opened: Any = getattr(module, BACKENDS[backend].session)
    return opened  # type: ignore[no-any-return]


def open_session(
    path: Path,
    backend: Backend,
    *,
    precision: Precision = "fp32",
    threads: int = 0,
    time_limit: float = LONGEST_S,
) -> Session:
    """Load a model file.

    Parameters
    ----------
    path
        An ONNX file with a card, or a plan, whose graph is run.
    backend
        The library that runs it.
    precision
        What the backend computes in.
    threads
        CPU threads; 0 takes all cores.
    time_limit
        For opening it, and for each run [s].

    Raises
    ------
    DataError
        If the file is missing.
    EngineError
        If the backend cannot load it in time or does not support the precision, or if the model
        may never end.
    CardError
        If it has no card, or one that contradicts the graph.
    MissingDependencyError
        If the backend is not installed.
    """
    require_bounded_graph(path)
    opened = require_backend(backend)
    return opened(path, precision=precision, threads=threads or of_task(), time_limit=time_limit)


def cannot_load(path: Path, library: str, error: Exception) -> EngineError:
    """Return what to say of a file that a library refuses."""
    text = str(error).strip()
    if DIPOLE_NODE.search(text):
        return EngineError(
            f"{path}: {library} has no operator qsm::DipoleConv; export the network with "
            "--dipole-op matmul, which every backend runs (ONNX Runtime runs function too, "
            "TensorRT with its plugin runs plugin)"
        )
    return EngineError(f"{path}: {library} cannot load it ({text.splitlines()[-1]})")


def joined_outputs(
    outputs: Sequence[Any], tensors: Mapping[str, NDArray[np.float32]], card: ModelCard
) -> NDArray[np.float32]:
    """Return what a model gave as channels of one array, if these are the volumes of its card.

    Raises
    ------
    EngineError
        If its shape or its type is another.
    """
    shape = tensors[card.inputs[0].name].shape
    for output, info in zip(outputs, card.outputs, strict=True):
        expected = (shape[0], info.shape[1], *shape[2:])
        seen = getattr(output, "shape", None), getattr(output, "dtype", type(output))
        if seen != (expected, np.float32):
            raise EngineError(
                f"the model of {card.network} gives {seen[0]} of {seen[1]}, its card says "
                f"{expected} of float32; export the model again"
            )
    return cast(
        NDArray[np.float32], outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=1)
    )
