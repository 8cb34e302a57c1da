"""How far an output voxel sees: what the layers allow, and what the weights make of it."""

import numpy as np
import torch
from numpy.typing import NDArray

from qsm_deploy.export.graph.onnx_export import example_tensors
from qsm_deploy.export.measure.verification import phantom_inputs, phantom_scan
from qsm_deploy.export.networks.network import Network, outputs_of
from qsm_deploy.kernels.errors import ExportError
from qsm_deploy.runtime.card.card import ModelCard, ReceptiveField

ENERGY_KEPT = 0.999999
LONGEST = 4096
# Trained dipole networks see farthest along B0, here the last axis: in a (160, 160, 160) box
# the energy of IR2QSM's gradient ends 33, 34 and 57 voxels from its voxel, in this box at 58.
BOX = (48, 48, 192)
HEAD = (160, 160, 192)  # the phantom it is cut from: in a smaller one the box is half empty
OFF_CENTRE = ((0, 0, 0), (3, -5, 6))


def measure_receptive_field(module: Network, card: ModelCard) -> ReceptiveField:
    """Return the theoretical receptive field and the measured halo [voxels to each side]."""
    if module.why_whole is not None:
        return ReceptiveField(None, None, ENERGY_KEPT)
    theoretical = theoretical_receptive_field(module)
    halo = min(theoretical, effective_halo(module, card, theoretical))
    return ReceptiveField(theoretical, halo, ENERGY_KEPT)


def theoretical_receptive_field(module: Network) -> int:
    """Return how far one input voxel reaches at most, over all positions on the pooling grid.

    A NaN spreads through every layer exactly as far as the layer looks, whatever the weights;
    a long thin volume is enough to see how far.

    Raises
    ------
    ExportError
        If it has no end.
    """
    divisor = module.divisor
    length = 32 * divisor
    while length <= LONGEST:
        middle = length // 2
        sizes = {"n": divisor, "x": length, "y": divisor, "z": divisor}
        tensors = example_tensors(module.inputs, sizes)
        for tensor, info in zip(tensors, module.inputs, strict=True):
            for i in range(divisor if info.is_volume and info.name != "mask" else 0):
                tensor[i, :, middle + i] = float("nan")
        with torch.inference_mode():
            outputs = torch.cat(outputs_of(module, tensors), dim=1)
            reached = outputs.isnan().any(dim=-1).any(dim=-1).any(dim=1)
        distance = [
            int((torch.nonzero(row)[:, 0] - middle - i).abs().max())
            for i, row in enumerate(reached)
        ]
        if max(distance) < middle - divisor:
            return max(distance)
        length *= 2
    raise ExportError(
        f"{type(module).__name__} sees farther than {LONGEST // 2} voxels; "
        "only convolutional networks can be run in patches"
    )


def effective_halo(module: Network, card: ModelCard, theoretical: int) -> int:
    """Return the distance that holds nearly all energy of the input gradient of one voxel.

    Distance is the largest over the axes, as a patch has its halo; the gradient is that of the
    phantom's field, the largest of a few voxels counts.
    """
    inputs = phantom_inputs(card, phantom_scan(card, HEAD))
    box = [min(b, card.divisor * -(-(2 * theoretical + 16) // card.divisor)) for b in BOX]
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
