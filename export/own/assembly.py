"""From a user's module and what is stated of it to a network that can be exported."""

import inspect
from collections.abc import Callable, Sequence

from torch import nn

from qsm_deploy.export.networks.network import MASK, Network, require_network
from qsm_deploy.export.networks.own import TENSORS, OwnNetwork
from qsm_deploy.export.own.card_file import (
    MAY_BE_TAKEN,
    OF_EVERY_NETWORK,
    Scaling,
    Stated,
    require_asked,
)
from qsm_deploy.export.own.probing import find_divisor, find_reach, odd_shapes, what_is_wrong
from qsm_deploy.kernels.errors import ExportError, UsageError
from qsm_deploy.kernels.geometry import Shape, shape_text
from qsm_deploy.runtime.card.card import TASKS, TensorInfo, Tiles

LAST_TRIED = 16
IN_TILES = "it runs in blocks of {}, as its author says"
AT_ONE_SIZE = "its graph computes at {} alone"


def network_from_module(
    module: nn.Module,
    stated: Stated,
    say: Callable[[str], None] = lambda line: None,
    *,
    size: Shape | None = None,
) -> Network:
    """Return a module as the export asks of every network.

    Parameters
    ----------
    module
        A user's, put into evaluation mode; of a ``Network`` everything is read.
    stated
        What its author says of it.
    say
        Called with what was found out by running it.
    size
        What it computes at by all means, if that is known; where no divisor fits, it computes at
        nothing else.

    Raises
    ------
    UsageError
        If something is missing or does not fit the module.
    ExportError
        If its output is not of its input's shape.
    """
    if module.training:
        say("the module is in training mode: taking it in evaluation mode")
    module = module.eval().float().requires_grad_(False)
    if isinstance(module, Network):
        if more := sorted(stated.fields - set(OF_EVERY_NETWORK)):
            raise UsageError(
                f"{stated.where}: {more[0]} is read off the Network; take it out of the card"
            )
        return require_network(module, stated.network or type(module).__name__)
    groups = stated.inputs or _inputs_of(module)
    if groups is None:
        require_asked(stated)
    require_asked(stated, read=("inputs",))
    assert groups is not None
    if stated.inputs is None:
        say(f"inputs read off forward: {', '.join(name for (name,) in groups)}")
    _require_arguments(module, len(groups), stated.where)
    network = _wrapped(module, groups, stated)
    _probe(network, stated, size, say)
    return network


def _inputs_of(module: nn.Module) -> tuple[tuple[str, ...], ...] | None:
    """Return the names of the arguments of ``forward``, if all are names of what may be taken."""
    names = [p.name for p in _parameters(module) if p.default is p.empty]
    if not names or any(name not in MAY_BE_TAKEN for name in names):
        return None
    return tuple((name,) for name in names)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(module.forward).parameters.values())


def _require_arguments(module: nn.Module, count: int, where: str) -> None:
    parameters = _parameters(module)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in by_place)
    if not least <= count <= len(by_place):
        names = ", ".join(p.name for p in by_place)
        raise UsageError(
            f"{where}: inputs names {count} arguments, forward takes {len(by_place)} ({names}); "
            "several names in one list are channels of one argument"
        )


def _wrapped(module: nn.Module, groups: Sequence[Sequence[str]], stated: Stated) -> OwnNetwork:
    assert stated.outputs is not None
    assert stated.normalisation is not None
    assert stated.geometry is not None
    names = [name for group in groups for name in group]
    given = stated.normalisation
    masked = frozenset(name for name in names if name in given and given[name].masked)
    if masked and MASK.name not in names:
        names.append(MASK.name)
    inputs = _in_order(names, stated)
    _require_normalisation(stated, names)
    network = OwnNetwork(
        module,
        groups,
        stated.outputs,
        {name: (scaling.mean, scaling.std) for name, scaling in given.items()},
        masked,
        {name: s.at_least for name, s in given.items() if s.at_least is not None},
    )
    network.inputs = inputs
    for group in groups:
        if len(group) > 1 and not all(TENSORS[name].is_volume for name in group):
            raise UsageError(f"{stated.where}: {', '.join(group)} cannot be channels of one volume")
    network.geometry, network.why_whole = stated.geometry, stated.why_whole
    network.axes, network.pad_front = stated.axes, stated.pad_front
    network.constants = stated.constants
    network.normalisation = {
        f"{name}_{what}": value
        for name, s in given.items()
        if s != Scaling(0.0, 1.0)
        for what, value in (("mean", s.mean), ("std", s.std))
    }
    return network.eval()


def _require_normalisation(stated: Stated, names: Sequence[str]) -> None:
    """Refuse a normalisation that says nothing of a map, or something of none."""
    assert stated.outputs is not None
    given = stated.normalisation or {}
    maps = [n for n in names if TENSORS[n].is_volume and n != MASK.name]
    where = f"{stated.where}: normalisation"
    for name in given:
        if name not in (*names, *stated.outputs):
            raise UsageError(f"{where}.{name}: neither an input nor an output")
        if given[name].masked and name not in maps:
            raise UsageError(f"{where}.{name}.masked: for the maps that enter")
        if given[name].at_least is not None and name not in stated.outputs:
            raise UsageError(f"{where}.{name}.at_least: for the maps that leave")
    missing = [name for name in (*maps, *stated.outputs) if name not in given]
    if given and missing:
        raise UsageError(
            f'{where} says nothing of {missing[0]}; say normalisation.{missing[0]} = "none", or '
            "its mean and std"
        )


def _in_order(names: Sequence[str], stated: Stated) -> tuple[TensorInfo, ...]:
    """Return the inputs as the card has them, what the task takes first in front."""
    for first, besides, gives in TASKS.values():
        if gives == stated.outputs and first in names and set(besides) <= set(names):
            ordered = sorted(names, key=lambda name: name != first)
            return tuple(TENSORS[name] for name in ordered)
    tasks = "; ".join(
        f"{', '.join((first, *besides))} to {', '.join(gives)}"
        for first, besides, gives in TASKS.values()
    )
    raise UsageError(
        f"{stated.where}: nothing runs a network of {', '.join(names)} to "
        f"{', '.join(stated.outputs or ())}; known are {tasks}"
    )


def _probe(
    network: OwnNetwork, stated: Stated, size: Shape | None, say: Callable[[str], None]
) -> None:
    """Find divisor and reach by running the module, or check what is stated."""
    if stated.divisor is not None:
        network.multiple = stated.divisor
        for shape in odd_shapes(stated.divisor):
            if wrong := what_is_wrong(network, shape):
                raise ExportError(f"{stated.where}: divisor {stated.divisor}: {wrong}")
    elif (found := find_divisor(network)) is not None:
        say(f"divisor {found}, the smallest whose multiples give back the shape")
    elif stated.tiles is not None or size is not None:
        network.only_tiles = True
    else:
        raise ExportError(
            f"the module cannot be exported: {what_is_wrong(network, odd_shapes(LAST_TRIED)[0])}; "
            "it must give volumes of its input's shape, a channel for each output, at multiples of "
            "some divisor up to 64"
        )
    network.tiles = stated.tiles
    if network.only_tiles:
        _fix(network, stated, size, say)
    elif network.tiles is not None:
        if any(n % network.multiple for n in network.tiles.size):
            raise UsageError(
                f"{stated.where}: tiles of {shape_text(network.tiles.size)} are no multiples of "
                f"the divisor {network.multiple}"
            )
        network.why_whole = stated.why_whole or IN_TILES.format(shape_text(network.tiles.size))
    if network.why_whole is None:
        say("measuring how far an output voxel sees")
        find_reach(network, say)
        if network.why_whole is None:
            say(f"an output voxel sees {network.reach} voxels to each side: it runs in patches")
        else:
            say(f"{network.why_whole}: it runs on the whole volume")


def _fix(
    network: OwnNetwork, stated: Stated, size: Shape | None, say: Callable[[str], None]
) -> None:
    """Take a module that computes at one size in tiles of that size."""
    if network.tiles is None:
        assert size is not None
        x, y, z = (3 * n // 4 for n in size)
        network.tiles = Tiles(size, size, (x, y, z), "zero", "mean")
        say(f"tiles of {shape_text(size)}, one every {shape_text((x, y, z))}, as no card says it")
    tile = network.tiles.size
    if size is not None and tile != size:
        raise UsageError(
            f"{stated.where}: tiles of {shape_text(tile)}, but the graph computes at "
            f"{shape_text(size)} alone"
        )
    if wrong := what_is_wrong(network, tile):
        raise ExportError(f"the module cannot be exported: {wrong}")
    network.why_whole = stated.why_whole or AT_ONE_SIZE.format(shape_text(tile))
