"""What training puts around a network's weights, taken off where the keys then fit a network."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qsm_deploy.kernels.errors import WeightsError

Fits = Callable[[Collection[str]], object]
# parts of a key that DataParallel, torch.compile and FSDP add, at the start or between
ADDED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COUNT_OF_AVERAGES = "n_averaged"  # beside the weights in torch.optim.swa_utils.AveragedModel
PARTS_SUFFIX = "_model_state"  # of the names under which one file holds the parts of a network
DEEPEST = 3


def unwrap(content: Mapping[Any, Any], fits: Fits, path: Path) -> tuple[dict[str, Any], str]:
    """Find the state dict in a checkpoint, under the keys of its network.

    Of several that fit, the averaged one (``ema`` in its name) is taken, if it is the only such:
    authors evaluate and publish with it. Prefixes go one after the other, until the keys fit; where
    they never do, only what no network has in its own keys goes.

    Parameters
    ----------
    content
        What the file holds.
    fits
        Whether keys are those of a network.
    path
        For messages.

    Returns
    -------
    state
        Values by key, of any type.
    note
        What was taken off, in words; empty if nothing was.

    Raises
    ------
    WeightsError
        If several state dicts fit; the message names them.
    """
    states = dict(_states(content, ""))
    fitting = {name: found for name, state in states.items() if (found := _fitting(state, fits))}
    averaged = [name for name in fitting if "ema" in re.split(r"[^a-z]+", name.lower())]
    if "" in fitting or not fitting:
        chosen = "" if "" in states else next(iter(states), "")
    elif len(fitting) == 1 or len(averaged) == 1:
        (chosen,) = averaged if len(averaged) == 1 else fitting
    else:
        wanted = "".join(f"[{part!r}]" for part in next(iter(fitting)).split("."))
        raise WeightsError(
            f"{path}: several sets of weights in it ({', '.join(fitting)}); save the wanted one: "
            f"torch.save(torch.load({str(path)!r}){wanted}, 'weights.pth')"
        )
    state = states.get(chosen, {str(key): value for key, value in content.items()})
    keys = fitting.get(chosen) or _without_added(state)
    seen = {".".join(filter(None, (chosen, key))): name for key, name in keys.items()}
    note = next((f"{key} is read as {name}" for key, name in seen.items() if key != name), "")
    if note:
        note += ", the others likewise"
    if others := [name for name in fitting if name != chosen]:
        note += f"; left out: {', '.join(others)}"
    return {name: state[key] for key, name in keys.items()}, note


def _states(content: Mapping[Any, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the mappings that hold tensors, the outermost first, by their names in dots."""
    state, inner = dict[str, Any](), dict[str, Mapping[Any, Any]]()
    for key, value in content.items():
        if not isinstance(value, Mapping):
            state[str(key)] = value
        elif str(key).endswith(PARTS_SUFFIX):
            state |= {f"{key}.{part}": of_part for part, of_part in value.items()}
        else:
            inner[".".join(filter(None, (name, str(key))))] = value
    if any(isinstance(value, Tensor) for value in state.values()):
        yield name, state
    if name.count(".") < DEEPEST:
        for path, value in inner.items():
            yield from _states(value, path)


def _fitting(keys: Collection[str], fits: Fits) -> dict[str, str] | None:
    """Return names that fit by the keys that they are made of, if there are any."""
    names = {key: key for key in keys}
    if fits(keys):
        return names
    names = _without_added(keys)
    while not fits(names.values()):
        firsts = {name.partition(".")[0] for name in names.values()}
        names = {key: name.partition(".")[2] for key, name in names.items()}
        if len(firsts) != 1 or "" in names.values():
            return None
    return names


def _without_added(keys: Collection[str]) -> dict[str, str]:
    """Return the keys without the parts that wrappers add, unless two would be the same then."""
    wrapped = any("module" in key.split(".") for key in keys)
    own = [key for key in keys if not (wrapped and key == COUNT_OF_AVERAGES)]
    names = {key: ".".join(part for part in key.split(".") if part not in ADDED) for key in own}
    unique = len(set(names.values())) == len(names) and "" not in names.values()
    return names if unique else {key: key for key in keys}
