"""What an export writes: an ONNX file, or an engine's plan; by its suffix, or by what is there."""

from pathlib import Path

from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import GraphPrecision
from qsm_deploy.runtime.card.read import ONNX, PLAN
from qsm_deploy.runtime.gpu.tensorrt_library import Flavour, installed_engines


def choose_output(
    given: Path | None, engine: Flavour | None, network: str, precision: GraphPrecision
) -> tuple[Path, Flavour | None, str]:
    """Return the file, the engine that it is for, ``None`` for ONNX, and why in words.

    Parameters
    ----------
    given, engine
        What was asked for, if anything was.
    network, precision
        What a file is named after.

    Raises
    ------
    UsageError
        If the suffix is another, or an engine was asked for that an ONNX file does not need.
    """
    installed = installed_engines()
    if given is not None:
        if given.suffix not in (ONNX, PLAN):
            raise UsageError(f"-o {given}: give it the suffix {ONNX}, or {PLAN} for TensorRT")
        if given.suffix == ONNX and engine is not None:
            raise UsageError(f"-o {given}: --engine {engine} builds a plan; give it {PLAN}")
        if given.suffix == ONNX:
            return given, None, "asked for"
        return given, engine or (installed or ("tensorrt",))[0], "asked for"
    stem = f"{network}-{precision}"
    if engine is not None:
        return Path(stem + PLAN), engine, "asked for"
    if precision == "fp32":
        return Path(stem + ONNX), None, "a file for every backend"
    if installed:
        return Path(stem + PLAN), installed[0], f"{installed[0]} is installed"
    return Path(stem + ONNX), None, "no flavour of TensorRT is installed"
