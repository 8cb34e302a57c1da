"""The weights of a Keras model, as ``save_weights`` writes them to HDF5."""

from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from qsm_deploy.export.checkpoints.file_kind import DAMAGED, refuse_inflated
from qsm_deploy.kernels.errors import WeightsError


def load_keras_h5(path: Path) -> dict[str, Tensor]:
    """Read every array of an HDF5 file, by its path in the file.

    Raises
    ------
    WeightsError
        If the file is damaged, of another kind, or holds anything but numbers, or not itself.
    """
    arrays: dict[str, Tensor] = {}

    def collect(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise WeightsError(f"{path}: the values of {name} are in another file; copy them")
            refuse_inflated(path, item.nbytes + sum(array.nbytes for array in arrays.values()))
            array = np.asarray(item[()])
            if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
                raise WeightsError(f"{path}: {name} is of type {array.dtype}, expected numbers")
            arrays[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))

    try:
        with h5py.File(str(path), "r") as file:
            file.visititems(collect)
    except DAMAGED as error:
        raise WeightsError(f"{path}: truncated, or not an HDF5 file") from error
    if not arrays:
        raise WeightsError(f"{path}: no weights in it; pass the file of save_weights")
    return arrays
