"""Train the U-net of ``net.py`` for a few seconds on drawn heads: weights.pth, and card.toml.

python train.py [--seconds 20] [--output weights.pth]

Any training will do in its place: what is exported is a state dict and the four facts of the card.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from net import build
from torch import Tensor
from torch.nn import functional

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry

SHAPE = (96, 96, 80)  # of a head, voxels of 2 mm
VOXEL_SIZE_MM = (2.0, 2.0, 2.0)
PATCH, BATCH = 32, 2
FIELD_STD, CHI_STD = 0.02, 0.05  # ppm; they stand in card.toml too


def heads(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return fields and maps of drawn heads, (1, x, y, z), normalised."""
    made = []
    for seed in range(count):
        head = head_phantom(Geometry(SHAPE, VOXEL_SIZE_MM), seed=seed)
        pair = (head.local_field_ppm / FIELD_STD, head.chi_ppm / CHI_STD)
        made.append(tuple(torch.from_numpy(a.astype(np.float32))[None] for a in pair))
    return made


def patches(pairs: list[tuple[Tensor, Tensor]], rng: np.random.Generator) -> list[Tensor]:
    """Return a batch of fields, and of the maps in the same places."""
    cut = []
    for _ in range(BATCH):
        pair = pairs[rng.integers(len(pairs))]
        corner = [int(rng.integers(n // 4, 3 * n // 4 - PATCH // 2)) for n in SHAPE]
        box = tuple(slice(c - PATCH // 4, c - PATCH // 4 + PATCH) for c in corner)
        cut.append([a[(slice(None), *box)] for a in pair])
    return [torch.stack(parts) for parts in zip(*cut, strict=True)]


def main() -> None:
    """Train, and write the state dict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("weights.pth"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rng, network = np.random.default_rng(0), build()
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
    pairs = heads(2)
    begun, steps = time.monotonic(), 0
    while time.monotonic() - begun < arguments.seconds or steps == 0:
        field, chi = patches(pairs, rng)
        loss = functional.l1_loss(network(field), chi)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
    torch.save(network.state_dict(), arguments.output)
    print(f"{arguments.output}: {steps} steps, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
