"""One small protocol for every inference backend, and the choice among those installed."""

import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qsm_deploy.kernels.errors import (
    CardError,
    DataError,
    EngineError,
    MissingDependencyError,
    UsageError,
)
from qsm_deploy.runtime.card.card import ModelCard
from qsm_deploy.runtime.card.read import PLAN, card_from, refuse_plan, require_onnx

Backend = Literal["onnxruntime", "openvino"]
Precision = Literal["fp32", "bf16"]
DIPOLE_NODE = re.compile(r"qsm[.:]+DipoleConv")  # as one library or the other writes it
BY_SPEED: tuple[Backend, ...] = ("openvino", "onnxruntime")


class Session(Protocol):
    """A loaded model, ready to run."""

    card: ModelCard
    version: str
    precision: Precision

    @property
    def backend(self) -> str:
        """What runs it."""

    def run(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the model once.

        Parameters
        ----------
        tensors
            (n, c, x, y, z) arrays by input name, sizes multiples of the card's divisor.

        Returns
        -------
        (n, 1, x, y, z) array
            The card's output, owned by the caller.
        """


def choose_backend(wanted: Backend | Literal["auto"], precision: Precision) -> tuple[Backend, str]:
    """Return a backend and why: the one asked for, else the fastest that is installed.

    Raises
    ------
    UsageError
        If the backend does not compute in ``precision``.
    """
    if precision == "bf16":
        if wanted == "onnxruntime":
            raise UsageError(
                "--precision bf16 needs --backend openvino: ONNX Runtime has no bf16 "
                "convolution on a CPU"
            )
        return "openvino", "the only CPU backend that computes in bf16"
    if wanted != "auto":
        return wanted, "asked for"
    if installed_backends()[0] == "openvino":
        return "openvino", "the fastest CPU backend installed"
    return "onnxruntime", "openvino, which is faster, is not installed"


def installed_backends() -> tuple[Backend, ...]:
    """Return the backends whose library is installed, the fastest first."""
    return tuple(b for b in BY_SPEED if importlib.util.find_spec(b) is not None)


def require_backend(backend: Backend) -> None:
    """Import the library of a backend.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    if importlib.util.find_spec(backend) is None:
        raise MissingDependencyError(backend, backend, f"--backend {backend}")
    importlib.import_module(f"qsm_deploy.runtime.sessions.{backend}")


def open_session(
    path: Path, backend: Backend, *, precision: Precision = "fp32", threads: int = 0
) -> Session:
    """Load a model file.

    Parameters
    ----------
    path
        An ONNX file with a card.
    backend
        The library that runs it.
    precision
        What the backend computes in.
    threads
        CPU threads; 0 takes all cores.

    Raises
    ------
    DataError
        If the file is missing.
    EngineError
        If the backend cannot load it or does not support the precision.
    CardError
        If it has no card, or one that contradicts the graph.
    MissingDependencyError
        If the backend is not installed.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such model file")
    if path.suffix == PLAN:
        raise refuse_plan(path)
    require_onnx(path)
    require_backend(backend)
    if backend == "openvino":
        from qsm_deploy.runtime.sessions.openvino import OpenVinoSession

        return OpenVinoSession(path, precision, threads)
    from qsm_deploy.runtime.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(path, threads)


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


def read_card(path: Path, text: str | None, inputs: list[str], outputs: list[str]) -> ModelCard:
    """Return the card in a model's metadata, checked against the graph's names.

    Raises
    ------
    CardError
        If there is none, or it names other inputs or outputs than the graph has.
    """
    card = card_from(text, path)
    stated = [tensor.name for tensor in card.inputs]
    if sorted(stated) != sorted(inputs) or [card.output.name] != outputs:
        raise CardError(
            f"{path}: the card contradicts the graph: inputs {stated} -> {card.output.name}, "
            f"the graph has {inputs} -> {', '.join(outputs)}; export it again"
        )
    return card
