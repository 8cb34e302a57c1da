"""What training puts around a network's weights, taken off where the keys then fit a network."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qsm_deploy.kernels.errors import WeightsError

Place = tuple[str, ...]  # the names of the mappings around it
Fits = Callable[[Collection[str]], object]
# parts of a key that DataParallel, torch.compile and FSDP add, at the start or between
ADDED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COUNT_OF_AVERAGES = "n_averaged"  # beside the weights in torch.optim.swa_utils.AveragedModel
PARTS_SUFFIX = "_model_state"  # of the names under which one file holds the parts of a network
MOST_PREFIXES = 8


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
    states = _states(content)
    fitting = {place: keys for place, state in states.items() if (keys := _fitting(state, fits))}
    most = max(states, key=lambda place: _tensors(states[place]), default=())
    chosen = _choose(fitting, path) if fitting else most
    state = states.get(chosen, {str(key): value for key, value in content.items()})
    keys = fitting.get(chosen) or _without_added(state)
    seen = {_name((*chosen, key)): name for key, name in keys.items()}
    changed = [f"{key} is read as {name}" for key, name in seen.items() if key != name]
    notes = [f"{note}, the others likewise" for note in changed[:1]]
    if others := ", ".join(_name(place) for place in fitting if place != chosen):
        notes.append(f"left out: {others}")
    return {name: state[key] for key, name in keys.items()}, "; ".join(notes)


def _choose(fitting: Collection[Place], path: Path) -> Place:
    averaged = [place for place in fitting if "ema" in re.split(r"[^a-z]+", _name(place).lower())]
    for clear in (fitting, averaged):
        if len(clear) == 1:
            return next(iter(clear))
    if () in fitting:
        return ()
    wanted = "".join(f"[{part!r}]" for part in next(iter(fitting)))
    raise WeightsError(
        f"{path}: several sets of weights in it ({', '.join(map(_name, fitting))}); save the "
        f"wanted one: torch.save(torch.load({str(path)!r}){wanted}, 'weights.pth')"
    )


def _name(place: Place) -> str:
    return ".".join(place)


def _tensors(state: Mapping[str, Any]) -> int:
    return sum(isinstance(value, Tensor) for value in state.values())


def _states(content: Mapping[Any, Any]) -> dict[Place, dict[str, Any]]:
    """Return the mappings that hold tensors by their places, the outermost first."""
    states: dict[Place, dict[str, Any]] = {}
    waiting: list[tuple[Place, Mapping[Any, Any]]] = [((), content)]
    known = set[int]()  # a mapping may be in itself
    for place, mapping in waiting:
        if id(mapping) in known:
            continue
        known.add(id(mapping))
        state = {str(key): value for key, value in mapping.items()}
        inner = {key: value for key, value in state.items() if isinstance(value, Mapping)}
        for key, value in inner.items():
            if key.endswith(PARTS_SUFFIX):
                del state[key]
                state |= {f"{key}.{name}": part for name, part in value.items()}
            else:
                waiting.append(((*place, key), value))
        if _tensors(state):
            states[place] = state
    return states


def _fitting(keys: Collection[str], fits: Fits) -> dict[str, str] | None:
    """Return names that fit by the keys that they are made of, if there are any."""
    if fits(keys):
        return {key: key for key in keys}
    names = _without_added(keys)
    for _ in range(MOST_PREFIXES):
        if fits(names.values()):
            return names
        firsts = {name.partition(".")[0] for name in names.values()}
        names = {key: name.partition(".")[2] for key, name in names.items()}
        if len(firsts) != 1 or "" in names.values():
            break
    return None


def _without_added(keys: Collection[str]) -> dict[str, str]:
    """Return the keys without the parts that wrappers add, unless two would be the same then."""
    wrapped = any("module" in key.split(".") for key in keys)
    own = [key for key in keys if not (wrapped and key == COUNT_OF_AVERAGES)]
    names = {key: ".".join(part for part in key.split(".") if part not in ADDED) for key in own}
    unique = len(set(names.values())) == len(names) and "" not in names.values()
    return names if unique else {key: key for key in keys}
