"""Reading the weights files that authors publish, without running what may hide in them."""

import hashlib
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qsm_deploy.export.checkpoints.file_kind import (
    DAMAGED,
    TENSORFLOW,
    Format,
    no_pickle,
    refused_pickle,
    require_weights_file,
    weights_format,
)
from qsm_deploy.export.checkpoints.npz_state import load_npz
from qsm_deploy.export.checkpoints.plain_tensors import plain_tensors
from qsm_deploy.export.checkpoints.wrappers import Fits, unwrap
from qsm_deploy.kernels.errors import WeightsError

# a loss beside the weights; a scalar is made of its type and its bytes, and nothing is run
SCALAR: Any = np.float64(0).__reduce__()[0]
NUMPY_SCALARS: list[Any] = [
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType),
]
BATCH_COUNTER = ".num_batches_tracked"
StateDict = dict[str, Tensor]


def load_state(
    *paths: Path,
    fits: Fits = lambda keys: False,
    say: Callable[[str], None] = lambda note: None,
) -> StateDict:
    """Read the file or files of one network, as float32, without what training wrapped it in.

    PyTorch pickles, safetensors, Keras ``.h5`` and ``.npz`` of TensorFlow variables, each told by
    its content. Several files are one network in parts.

    Parameters
    ----------
    paths
        The files.
    fits
        Whether keys are those of a network: tells its own from those with a wrapper's prefix, and
        its state dict from others in the file.
    say
        Called with a line on what was taken off the keys of a file.

    Raises
    ------
    WeightsError
        If a file is missing, damaged, of another kind, holds several state dicts that fit or
        anything but tensors by name, or is a pickle with code in it (nothing of which is run), or
        two files share a key.
    """
    state: StateDict = {}
    for path in paths:
        part, note = _load_file(path, fits)
        if note:
            say(f"{path}: {note}")
        if twice := state.keys() & part.keys():
            raise WeightsError(
                f"{path}: has the key {min(twice)}, as another of the files; pass each file once"
            )
        state |= part
    return state


def _load_file(path: Path, fits: Fits) -> tuple[StateDict, str]:
    if Path(f"{path}.index").is_file():
        raise WeightsError(f"{path}: a checkpoint {TENSORFLOW}")
    require_weights_file(path, "pass the weights that the authors publish")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # odd protocols, headers of Python 2
        content = _reader(weights_format(path))(path)
    state, note = unwrap(content, fits, path)
    strangers = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strangers or not state:
        what = f"{strangers[0]!r} is not a tensor" if strangers else "it is empty"
        raise WeightsError(f"{path}: not a state dict ({what}); save model.state_dict()")
    return plain_tensors(state, path), note


def _load_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, *DAMAGED) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error


def _load_pickle(path: Path) -> Mapping[str, Any]:
    try:
        # unchecked indices of a sparse tensor end the process
        checked = torch.sparse.check_sparse_tensor_invariants()  # type: ignore[no-untyped-call]
        scalars = torch.serialization.safe_globals(NUMPY_SCALARS)
        with checked, scalars, path.open("rb") as file:  # of a path torch believes the suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: {refused_pickle(path, str(error))}") from error
    except DAMAGED as error:
        raise WeightsError(f"{path}: {no_pickle(path)}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()"
        )
    return dict(content)


def _reader(kind: Format) -> Callable[[Path], Mapping[str, Any]]:
    if kind == "hdf5":
        from qsm_deploy.export.checkpoints.keras_h5 import load_keras_h5

        return load_keras_h5
    readers = {"safetensors": _load_safetensors, "npz": load_npz, "pickle": _load_pickle}
    return readers[kind]


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    unused: Set[str] = frozenset(),
    authors_keys: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Copy ``state`` into ``module``, every key and every shape of it.

    Only the counters of batches may lack, as in files of PyTorch before 0.4.1: no inference uses
    them.

    Parameters
    ----------
    module
        The network to fill.
    state
        Tensors by name.
    unused
        Names that the published network stores but never uses: these may be there or not.
    authors_keys
        What the authors' file calls a key, where that is another name: messages say both.

    Raises
    ------
    WeightsError
        If a key is missing, left over, of another shape, or not finite.
    """
    own = module.state_dict()
    given = {key: value for key, value in own.items() if key.endswith(BATCH_COUNTER)}
    given |= {key: value for key, value in state.items() if key not in unused}
    name = type(module).__name__

    def both(key: str) -> str:
        return f"{authors_keys[key]} (here {key})" if key in authors_keys else key

    if missing := [key for key in own if key not in given]:
        raise WeightsError(
            f"the weights lack {len(missing)} of {name}'s keys, the first is {both(missing[0])}; "
            "pass the whole file of this network"
        )
    if left := [key for key in given if key not in own]:
        raise WeightsError(
            f"the weights have {len(left)} keys that {name} does not know, the first is {left[0]}; "
            "pass the file for this network"
        )
    for key, tensor in own.items():
        if given[key].shape != tensor.shape:
            raise WeightsError(
                f"{both(key)} has shape {tuple(given[key].shape)} in the weights, "
                f"{name} needs {tuple(tensor.shape)}"
            )
        if not torch.isfinite(given[key]).all():
            raise WeightsError(f"{both(key)} holds NaN or infinite values; get the file again")
    module.load_state_dict(given)


def require_keys(state: Mapping[str, Tensor], keys: Sequence[str], name: str) -> None:
    """Check for the keys that a network's size is read from.

    Raises
    ------
    WeightsError
        If one is missing.
    """
    if missing := [key for key in keys if key not in state]:
        seen = ", ".join(list(state)[:2])
        raise WeightsError(
            f"these are not the weights of {name}: no {missing[0]} (found {seen}, ...)"
        )


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return a digest of names, shapes and values, the same for every file format."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
