"""What PyTorch takes for a reconstruction, judged by what the backends took."""

from dataclasses import replace

from qsm_deploy.runtime.card.card import MemoryUse, ModelCard
from qsm_deploy.runtime.reconstruction.memory import Workload
from qsm_deploy.runtime.scan.scan import Scan

TORCH_BYTES = 3  # times those of ONNX Runtime: measured 1.6 for ir2qsm and tv-unet, up to 2.6


def in_torch(
    scan: Scan, card: ModelCard, *, evaluates: bool = False, draws: bool = False
) -> Workload:
    """Return what decides the memory of a network that PyTorch runs on the CPU.

    A plan's card has no memory: what a GPU needs is the engine's to know.
    """
    memory = {
        name: replace(use, bytes_per_voxel=TORCH_BYTES * use.bytes_per_voxel)
        for name, use in card.memory.items()
    }
    grown = replace(card, memory=memory or {"unknown": MemoryUse(0, 1)})
    return Workload(scan, grown, "pytorch", evaluates=evaluates, draws=draws)
