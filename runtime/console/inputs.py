"""What a command line names as its input: that it is there, and that it is no weights."""

import os
from collections.abc import Iterable
from pathlib import Path

from qsm_deploy.kernels.errors import DataError, UsageError

# of weights and, unlike .npz and .mat, of no volumes
WEIGHTS_SUFFIXES = (".pth", ".pt", ".ckpt", ".pkl", ".safetensors", ".h5", ".hdf5", ".keras")


def require_files(paths: Iterable[Path | None], kind: str = "file") -> None:
    """Refuse inputs that are not there, before anything is said of the outputs.

    Raises
    ------
    DataError
        If one is missing, or a folder.
    """
    for path in paths:
        if path is not None and not os.path.isfile(path):  # which takes a name of any length
            raise DataError(f"{path}: {'a folder' if os.path.isdir(path) else f'no such {kind}'}")


def refuse_weights(path: Path) -> None:
    """Refuse weights where a model or a field is needed, and say what to make of them.

    Raises
    ------
    UsageError
        If the name is that of weights.
    """
    if path.suffix.lower() in WEIGHTS_SUFFIXES:
        raise UsageError(
            f"{path} are weights; make a model of them with: qsm-export --model NAME "
            f"--weights {path} -o NAME.onnx"
        )
