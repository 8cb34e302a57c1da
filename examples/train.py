"""Train the bundled ``tkd-unet`` or the half-width ``ir2qsm`` of the demo, on a CPU.

    python examples/train.py tkd-unet --steps 6000
    python examples/train.py ir2qsm --steps 5000

Volumes, patches, noise and initial weights follow from ``--seed``. Writes the weights as
half-precision safetensors and a log of losses beside them.
"""

import argparse
import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from training_volumes import TrainingVolume, head, random_geometry, random_shapes

from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.tkd_unet import TKD_PAD_VOXELS, TKD_THRESHOLD, TkdUnet
from qsm_deploy.kernels.geometry import Geometry


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a training besides its seed and length."""

    heads: int
    shapes: int
    axial_1mm: bool
    uses_tkd: bool
    patch: int
    batch: int
    learning_rate: float
    noise_ppm: float
    amplitude: tuple[float, float] = (0.6, 1.6)
    views_in_pool: int = 8
    patches_per_view: int = 16
    frozen_statistics: float = 0.3  # share of the steps, at the end, with fixed BatchNorm
    gradient_weight: float = 0.3
    intermediate_weight: float = 0.3


RECIPES = {
    "tkd-unet": Recipe(
        heads=16,
        shapes=14,
        axial_1mm=False,
        uses_tkd=True,
        patch=48,
        batch=4,
        learning_rate=2.5e-3,
        noise_ppm=0.005,
    ),
    "ir2qsm": Recipe(
        heads=9,
        shapes=24,
        axial_1mm=True,
        uses_tkd=False,
        patch=48,
        batch=2,
        learning_rate=2e-3,
        noise_ppm=0.004,
    ),
}


def make_volumes(recipe: Recipe, seed: int) -> list[TrainingVolume]:
    """Return heads and random shapes on the grids that the recipe asks for."""
    rng = np.random.default_rng(seed)
    heads = []
    for n in range(recipe.heads):
        geometry = random_geometry(rng, 170, axial_1mm=True)
        if not recipe.axial_1mm and n % 2:
            geometry = random_geometry(rng, 170, axial_1mm=False)
        heads.append(head(geometry, seed=1000 + n))
    shapes = [
        random_shapes(random_geometry(rng, 112, axial_1mm=recipe.axial_1mm), seed=2000 + n)
        for n in range(recipe.shapes)
    ]
    return heads + shapes


def patches(
    volumes: list[TrainingVolume], recipe: Recipe, seed: int
) -> Iterator[NDArray[np.float32]]:
    """Yield (4, p, p, p) patches: field, TKD map, chi, mask; flipped and swapped at random."""
    rng = np.random.default_rng(seed)
    pool: list[tuple[NDArray[np.float32], bool]] = []

    def new_view() -> tuple[NDArray[np.float32], bool]:
        volume = volumes[rng.integers(len(volumes))]
        amplitude = rng.uniform(*recipe.amplitude) * rng.choice([-1, 1])
        threshold = TKD_THRESHOLD if recipe.uses_tkd else None
        noise = rng.uniform(0, recipe.noise_ppm)
        view = volume.view(rng, noise, amplitude, threshold, TKD_PAD_VOXELS)
        dx, dy, _ = volume.geometry.voxel_size_mm
        return view, dx == dy

    while True:
        if len(pool) == recipe.views_in_pool:
            pool.pop(0)
        pool.append(new_view())
        for _ in range(recipe.patches_per_view):
            view, square = pool[rng.integers(len(pool))]
            yield random_patch(view, recipe.patch, rng, swap=square)


def random_patch(
    view: NDArray[np.float32], size: int, rng: np.random.Generator, *, swap: bool
) -> NDArray[np.float32]:
    """Return a patch at least a quarter inside the mask, zero-padded where the grid ends."""
    shape = np.array(view.shape[1:])
    while True:
        start = [rng.integers(0, max(1, n - size + 1)) for n in shape]
        patch = view[(slice(None), *(slice(s, s + size) for s in start))]
        if patch[3].mean() >= 0.25:
            break
    patch = np.pad(patch, [(0, 0), *((0, size - n) for n in patch.shape[1:])])
    flips = [axis for axis in (1, 2, 3) if rng.random() < 0.5]
    patch = np.flip(patch, flips)
    return patch.swapaxes(1, 2) if swap and rng.random() < 0.5 else patch


def batches(source: Iterator[NDArray[np.float32]], size: int) -> Iterator[Tensor]:
    """Yield (size, 4, p, p, p) batches, prepared by a thread ahead of the training."""
    ready: queue.Queue[Tensor] = queue.Queue(maxsize=4)

    def fill() -> None:
        while True:
            ready.put(torch.from_numpy(np.stack([next(source) for _ in range(size)])))

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield ready.get()


def outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """Return the final output, then any intermediate ones, all (n, 1, p, p, p)."""
    field, inverse = batch[:, 0:1], batch[:, 1:2]
    if isinstance(model, IR2QSM):
        final, intermediate = model.all_outputs(field)
        return [final, *intermediate]
    return [model(field, inverse)]


def loss(recipe: Recipe, estimates: list[Tensor], batch: Tensor) -> Tensor:
    """Smooth L1 plus gradient L1 in the mask; earlier iterations count half as much each."""
    chi, mask = batch[:, 2:3], batch[:, 3:4]

    def one(estimate: Tensor) -> Tensor:
        error = (estimate.float() - chi) * mask / 0.04
        value = nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.5)
        for axis in (2, 3, 4):
            value = value + recipe.gradient_weight / 3 * error.diff(dim=axis).abs().mean()
        return value

    final, *intermediate = estimates
    total = one(final)
    for back, estimate in enumerate(reversed(intermediate)):
        total = total + recipe.intermediate_weight * 0.5**back * one(estimate)
    return total


def nrmse_percent(model: nn.Module, recipe: Recipe, volume: TrainingVolume) -> float:
    """Return the demeaned error in the mask of a held-out volume at 0.0025 ppm noise [%]."""
    threshold = TKD_THRESHOLD if recipe.uses_tkd else None
    view = volume.view(np.random.default_rng(7), 0.0025, 1.0, threshold, TKD_PAD_VOXELS)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        estimate = outputs(model, torch.from_numpy(view)[None])[0][0, 0].numpy()
    model.train(was_training)
    truth, result = view[2][volume.mask], estimate[volume.mask]
    truth, result = truth - truth.mean(), result - result.mean()
    return float(100 * np.linalg.norm(result - truth) / np.linalg.norm(truth))


def train(
    name: str, steps: int, seed: int, threads: int
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Return the trained network and its log, one row for every hundredth of the steps."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    recipe = RECIPES[name]
    model: nn.Module = TkdUnet() if name == "tkd-unet" else IR2QSM(channels=(8, 16, 32, 64))
    model = model.to(memory_format=torch.channels_last_3d)
    volumes = make_volumes(recipe, seed)
    held_out = head(Geometry((96, 96, 96)), seed=99)
    source = batches(patches(volumes, recipe, seed), recipe.batch)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=steps, pct_start=0.1
    )
    log, recent, began = [], [], time.monotonic()
    for step in range(1, steps + 1):
        model.train(step <= steps * (1 - recipe.frozen_statistics))
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            estimates = outputs(model, batch)
        value = loss(recipe, estimates, batch)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent.append(value.item())
        if step % max(1, steps // 50) == 0:
            row = {
                "step": step,
                "seconds": round(time.monotonic() - began),
                "loss": round(float(np.mean(recent)), 5),
                "held_out_nrmse_percent": round(nrmse_percent(model, recipe, held_out), 2),
            }
            print(row, flush=True)
            log.append(row)
            recent.clear()
    return model.eval(), log


def main() -> None:
    """Train one network and write its weights and log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    output = args.output or Path(f"{args.model}.safetensors")
    model, log = train(args.model, args.steps, args.seed, args.threads)
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(state, output)
    settings = {"model": args.model, "steps": args.steps, "seed": args.seed}
    settings |= {"recipe": asdict(RECIPES[args.model]), "torch": torch.__version__}
    output.with_suffix(".log.json").write_text(
        json.dumps({**settings, "log": log}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
