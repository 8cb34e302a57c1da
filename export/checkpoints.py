"""Reading the weights files that authors publish, without running what may hide in them."""

import hashlib
import pickle
import struct
import warnings
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qsm_deploy.kernels.errors import WeightsError

WRAPPERS = ("state_dict", "model_state", "model_state_dict", "model")
# what torch's unpickler raises on damaged bytes, found by damaging them
DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError),
    *(AttributeError, TypeError, struct.error),
)
StateDict = dict[str, Tensor]


def load_state(path: Path) -> StateDict:
    """Read a PyTorch or safetensors state dict, as float32, without the ``module.`` prefix.

    Raises
    ------
    WeightsError
        If the file is missing, damaged, holds anything but tensors by name, or is a pickle with
        code in it (nothing of which is run).
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; pass the weights that the authors publish")
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: not a readable safetensors file ({error})") from error
    else:
        content = _load_pickle(path)
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = dict(content[wrapper])
    strangers = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers or not content:
        what = f"{strangers[0]!r} is not a tensor" if strangers else "it is empty"
        raise WeightsError(f"{path}: not a state dict ({what}); save model.state_dict()")
    return {
        str(key).removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in content.items()
    }


def _load_pickle(path: Path) -> StateDict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # odd protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: a pickle with more than tensors in it, refused without running it; "
            "save model.state_dict()"
        ) from error
    except DAMAGED as error:
        raise WeightsError(f"{path}: truncated, or not a PyTorch file") from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()"
        )
    return dict(content)


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], unused: Set[str] = frozenset()
) -> None:
    """Copy ``state`` into ``module``, every key and every shape of it.

    Parameters
    ----------
    module
        The network to fill.
    state
        Tensors by name.
    unused
        Names that the published network stores but never uses: these may be there or not.

    Raises
    ------
    WeightsError
        If a key is missing, left over, of another shape, or not finite.
    """
    own = module.state_dict()
    given = {key: value for key, value in state.items() if key not in unused}
    name = type(module).__name__
    if missing := [key for key in own if key not in given]:
        raise WeightsError(
            f"the weights lack {len(missing)} of {name}'s keys, the first is {missing[0]}; "
            "pass the file for this network"
        )
    if left := [key for key in given if key not in own]:
        raise WeightsError(
            f"the weights have {len(left)} keys that {name} does not know, the first is {left[0]}; "
            "pass the file for this network"
        )
    for key, tensor in own.items():
        if given[key].shape != tensor.shape:
            raise WeightsError(
                f"{key} has shape {tuple(given[key].shape)} in the weights, "
                f"{name} needs {tuple(tensor.shape)}"
            )
        if not torch.isfinite(given[key]).all():
            raise WeightsError(f"{key} holds NaN or infinite values; get the file again")
    module.load_state_dict(given)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return a digest of names, shapes and values, the same for every file format."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
