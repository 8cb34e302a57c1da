"""How far an output voxel sees: what the layers allow, and what the weights make of it."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from qsm_deploy.export.graph.onnx_export import example_tensors
from qsm_deploy.export.measure.verification import phantom_inputs, phantom_scan
from qsm_deploy.export.networks.network import Network, outputs_of
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.runtime.card.card import ModelCard, ReceptiveField

ENERGY_KEPT = 0.999999
FIRST, LONGEST = 32, 4096
# Trained dipole networks see farthest along B0, here the last axis: in a (160, 160, 160) box
# the energy of IR2QSM's gradient ends 33, 34 and 57 voxels from its voxel, in this box at 58.
BOX = (48, 48, 192)
HEAD = (160, 160, 192)  # the phantom it is cut from: in a smaller one the box is half empty
OFF_CENTRE = ((0, 0, 0), (3, -5, 6))


def measure_receptive_field(module: Network, card: ModelCard) -> ReceptiveField:
    """Return the theoretical receptive field and the measured halo [voxels to each side]."""
    if module.why_whole is not None:
        return ReceptiveField(None, None, ENERGY_KEPT)
    known = module.reach
    theoretical = theoretical_receptive_field(module) if known is None else known
    halo = min(theoretical, effective_halo(module, card, theoretical))
    return ReceptiveField(theoretical, halo, ENERGY_KEPT)


def theoretical_receptive_field(
    module: Network,
    *,
    axis: int = 0,
    positions: Sequence[int] | None = None,
    across: int = 1,
    first: int = FIRST,
    longest: int = LONGEST,
) -> int:
    """Return how far one input voxel reaches at most, over all positions on the pooling grid.

    A NaN spreads through every layer exactly as far as the layer looks, whatever the weights;
    a long thin volume is enough to see how far.

    Parameters
    ----------
    module
        In evaluation mode.
    axis
        Along which to look.
    positions
        On the pooling grid; by default all.
    across
        How wide the volume is, in divisors.
    first, longest
        How long it is at first, in divisors, and at most, in voxels.

    Raises
    ------
    ExportError
        If it has no end.
    """
    divisor = module.divisor
    length = first * divisor
    while length <= longest:
        middle = length // 2
        distances = []
        for i in range(divisor) if positions is None else positions:
            distances.append(_reach(module, axis, (length, across * divisor), middle + i))
            if distances[-1] >= middle - divisor:
                break
        else:
            return max(distances)
        length *= 2
    raise ExportError(
        f"{type(module).__name__} sees farther than {longest // 2} voxels; "
        "only convolutional networks can be run in patches"
    )


def _reach(module: Network, axis: int, size: tuple[int, int], at: int) -> int:
    """Return how far the inputs at one place are seen along an axis, in a volume of that size."""
    length, width = size
    sizes = {"n": 1} | dict.fromkeys("xyz", width) | {"xyz"[axis]: length}
    tensors = example_tensors(module.inputs, sizes)
    for tensor, info in zip(tensors, module.inputs, strict=True):
        if info.is_volume and info.name != "mask":
            tensor.select(2 + axis, at).fill_(float("nan"))
    with torch.inference_mode():
        outputs = outputs_of(module, tensors)
    reached = [y.isnan().movedim(2 + axis, 0).flatten(1).any(dim=1) for y in outputs]
    seen = torch.nonzero(torch.stack(reached).any(dim=0))[:, 0]
    return int((seen - at).abs().max()) if len(seen) else 0


def effective_halo(module: Network, card: ModelCard, theoretical: int) -> int:
    """Return the distance that holds nearly all energy of the input gradient of one voxel.

    Distance is the largest over the axes, as a patch has its halo; the gradient is that of the
    phantom's field, the largest of a few voxels counts.
    """
    inputs = phantom_inputs(card, phantom_scan(card, HEAD))
    d, enough = card.divisor, 2 * theoretical + 16
    box = [
        d * min(math.ceil(b / d), math.ceil(enough / d), n // d)
        for b, n in zip(BOX, HEAD, strict=True)
    ]
    x, y, z = (slice((n - b) // 2, (n - b) // 2 + b) for n, b in zip(HEAD, box, strict=True))
    tensors, sources = [], []
    for name, value in inputs.items():
        tensor = torch.from_numpy(value[:, x, y, z].copy()[None] if value.ndim == 4 else value)
        tensors.append(tensor)
        if value.ndim == 4 and name != "mask":
            sources.append(tensor.requires_grad_())
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:  # keeps activations from being stored for the weights' gradients
        parameter.requires_grad_(False)
    try:
        outputs = outputs_of(module, tensors)
        halos = []
        for offset in OFF_CENTRE:
            i, j, k = (n // 2 + o for n, o in zip(box, offset, strict=True))
            voxels = torch.stack([output[0, 0, i, j, k] for output in outputs])
            gradients = torch.autograd.grad(voxels.sum(), sources, retain_graph=True)
            energy = sum(
                ((g[0].double().numpy() ** 2).sum(axis=0) for g in gradients), np.zeros(box)
            )
            if energy.any():  # what is clipped at 0 has no gradient
                halos.append(_radius_of_energy(energy, (i, j, k)))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return max(halos, default=theoretical)


def _radius_of_energy(energy: NDArray[np.float64], centre: tuple[int, int, int]) -> int:
    axes = [np.abs(np.arange(n) - c) for n, c in zip(energy.shape, centre, strict=True)]
    x, y, z = np.ix_(*axes)
    distance = np.maximum(np.maximum(x, y), z)
    within = np.cumsum(np.bincount(distance.ravel(), weights=energy.ravel()))
    return int(np.searchsorted(within, ENERGY_KEPT * within[-1]))
