"""Variables of a TensorFlow checkpoint, saved by name in a NumPy ``.npz`` file."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qsm_deploy.export.checkpoints.file_kind import DAMAGED
from qsm_deploy.kernels.errors import WeightsError

NUMBERS = "fiu"


def load_npz(path: Path) -> dict[str, Tensor]:
    """Read every array of a ``.npz`` file, as numpy has it.

    Raises
    ------
    WeightsError
        If the file is damaged, of another kind, or holds anything but numbers; pickles in it are
        not run.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except DAMAGED as error:
        if "allow_pickle" in str(error):
            raise WeightsError(
                f"{path}: more than arrays of numbers in it, refused without running it; "
                "convert it again as docs/qsmnet-weights.md says"
            ) from error
        raise WeightsError(f"{path}: truncated, or not a NumPy .npz file") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise WeightsError(f"{path}: {name} is no NumPy array, expected numbers")
        if array.dtype.kind not in NUMBERS or array.dtype.itemsize > 8:
            raise WeightsError(f"{path}: {name} is of type {array.dtype}, expected numbers")
    # torch knows only the byte order of this machine
    return {
        name: torch.from_numpy(np.asarray(array, dtype=array.dtype.newbyteorder("=")))
        for name, array in arrays.items()
    }
