"""What can be found out about a module by running it: its divisor, and how far it sees."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from qsm_deploy.export.graph.onnx_export import example_tensors
from qsm_deploy.export.measure.receptive_field import theoretical_receptive_field
from qsm_deploy.export.networks.network import outputs_of
from qsm_deploy.export.networks.own import OwnNetwork
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.kernels.geometry import Shape, shape_text

DIVISORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SMALLEST = 16  # voxels a side: convolutions with reflected padding need some
MOST_VOXELS = 2**20  # of one run: seconds and a gigabyte for the largest networks
# of a volume to see how far a network sees, in divisors and in voxels: shorter than for networks
# whose receptive field is known to end
FIRST, LONGEST = 8, 1024
SAME = 1e-4  # of the largest value; rounding makes 1e-6
NO_END = "every voxel sees more of the volume than a patch could hold"
NOT_SEEN = "how far a voxel sees could not be measured"
NOT_ALIKE = "what it computes depends on where in the volume a voxel lies"


def find_divisor(network: OwnNetwork, dims: tuple[int, ...] = DIVISORS) -> int | None:
    """Return the smallest divisor with whose multiples the output is of the input's shape.

    Shapes of three odd multiples tell it from twice itself. Leaves it in ``network``.

    Parameters
    ----------
    network
        In evaluation mode.
    dims
        What to try, in order.
    """
    for divisor in dims:
        if all(what_is_wrong(network, shape) is None for shape in odd_shapes(divisor)):
            network.multiple = divisor
            return divisor
    return None


def odd_shapes(divisor: int) -> tuple[Shape, ...]:
    """Return one shape of three odd multiples, or three thin ones if that were too large."""
    least = max(3, math.ceil(SMALLEST / divisor))
    k = least + 1 - least % 2
    x, y, z = (divisor * n for n in (k, k + 2, k + 4))
    if x * y * z <= MOST_VOXELS:
        return ((x, y, z),)
    wide = divisor * _cells_across(divisor)
    return ((x, wide, wide), (wide, x, wide), (wide, wide, x))


def _cells_across(divisor: int) -> int:
    """Return how wide a thin volume is, in divisors: padding by reflection takes two."""
    return max(2, math.ceil(SMALLEST / divisor)) if divisor <= 2 * SMALLEST else 1


def what_is_wrong(network: OwnNetwork, shape: Shape) -> str | None:
    """Return why a network cannot be run on a shape, ``None`` if it can."""
    try:
        outputs = run_on(network, shape)
    except Exception as error:  # a user's code: whatever it raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    for output in outputs:
        if tuple(output.shape[2:]) != shape:
            seen = "x".join(map(str, output.shape[2:]))
            return f"of an input of {shape_text(shape)} the module makes an output of {seen}"
    return None


def run_on(
    network: OwnNetwork, shape: Shape, given: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Return the outputs for volumes of a shape, noise unless they are given."""
    given = noise(network, shape) if given is None else given
    with torch.inference_mode():
        return outputs_of(network, [given[tensor.name] for tensor in network.inputs])


def noise(network: OwnNetwork, shape: Shape) -> dict[str, Tensor]:
    """Return noise of the training's spread for each map, and ones for mask and numbers."""
    made = {}
    generator = torch.Generator().manual_seed(0)
    sizes = {"n": 1} | dict(zip("xyz", shape, strict=True))
    for info, tensor in zip(network.inputs, example_tensors(network.inputs, sizes), strict=True):
        if info.is_volume and info.name != "mask":
            mean, std = network.scale.get(info.name, (0.0, 0.05))
            tensor = mean + std * torch.randn(tensor.shape, generator=generator)
        made[info.name] = tensor
    return made


def find_reach(network: OwnNetwork, say: Callable[[str], None]) -> None:
    """Find how far an output voxel sees, or why the network cannot be run in patches.

    In patches it can if the receptive field ends, and if a volume without its first planes gives
    the same map: a larger divisor may do what the smallest does not. Leaves ``reach``,
    ``why_whole`` and the divisor in ``network``.
    """
    smallest = network.multiple
    for divisor in (d for d in DIVISORS if d >= smallest):
        if divisor > smallest and (divisor % smallest or find_divisor(network, (divisor,)) is None):
            continue
        try:
            reach = max(_reaches(network))
            alike = _alike(network, reach)
        except ExportError:
            network.multiple, network.why_whole = smallest, NO_END
            return
        except Exception as error:  # a user's code: whatever it raises on a thin volume
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            network.multiple, network.why_whole = smallest, f"{NOT_SEEN} ({reason})"
            return
        if alike:
            network.reach = reach
            if divisor > smallest:
                say(f"patches must begin at multiples of {divisor}, though {smallest} would run")
            return
    network.multiple, network.why_whole = smallest, NOT_ALIKE


def _reaches(network: OwnNetwork) -> Iterator[int]:
    divisor = network.multiple
    across = _cells_across(divisor) if divisor <= SMALLEST else 1
    longest = min(LONGEST, max(FIRST * divisor, MOST_VOXELS // (across * divisor) ** 2))
    first = max(FIRST, 2 * math.ceil(SMALLEST / divisor))
    positions = sorted({0, divisor // 2, divisor - 1})
    for axis in range(3):
        yield theoretical_receptive_field(
            network, axis=axis, positions=positions, across=across, first=first, longest=longest
        )


def _alike(network: OwnNetwork, reach: int) -> bool:
    """Whether a volume whose first planes are cut off gives the same map beyond the reach."""
    divisor = network.multiple
    for axis in range(3):
        wide = divisor * _cells_across(divisor)
        length = divisor * math.ceil((2 * reach + 2 * wide) / divisor)
        shape = [wide] * 3
        shape[axis] = length
        given = noise(network, (shape[0], shape[1], shape[2]))
        cut = {
            name: a.narrow(2 + axis, divisor, length - divisor) if a.ndim == 5 else a
            for name, a in given.items()
        }
        inner = (reach + divisor, length - reach)
        for y, z in zip(
            run_on(network, (0, 0, 0), given), run_on(network, (0, 0, 0), cut), strict=True
        ):
            whole = y.narrow(2 + axis, inner[0], inner[1] - inner[0])
            part = z.narrow(2 + axis, reach, inner[1] - inner[0])
            if not (whole - part).abs().max() <= SAME * whole.abs().max():
                return False
    return True
