r"""Train the bundled ``tkd-unet`` or the half-width ``ir2qsm`` of the demo, on a GPU or a CPU.

    python examples/train.py tkd-unet --steps 6000
    python examples/train.py ir2qsm --minutes 5 --patch 96 --batch 4 \
        --start-from export/weights/ir2qsm-demo.safetensors

Runs on the GPU where there is one, and computes in bfloat16 there. Volumes, patches, noise and
initial weights follow from ``--seed``; with ``--minutes``, which begin with the making of volumes,
the number of steps follows from the machine. Writes the weights, averaged over the last steps, as
half-precision safetensors, and a log of losses beside them.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_volumes import TrainingVolume, head, random_geometry, random_shapes

from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.tkd_unet import TKD_PAD_VOXELS, TKD_THRESHOLD, TkdUnet
from qsm_deploy.kernels.dipole import dipole_kernel
from qsm_deploy.kernels.geometry import Geometry

SCALE_PPM = 0.04  # of the error in the loss
LEAST_MINUTES = 0.1  # of training, however long the volumes took
CHANGEABLE = ("heads", "shapes", "size_mm", "patch", "batch")  # of a recipe


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
    size_mm: int = 170  # of a head; random shapes have 112 / 170 of it
    amplitude: tuple[float, float] = (0.6, 1.6)
    warm_up: float = 0.05  # share of the training
    frozen_statistics: float = 0.3  # share of it, at the end, with fixed BatchNorm, and averaged
    average: float = 0.99
    gradient_weight: float = 0.3
    intermediate_weight: float = 0.3
    field_weight: float = 1.5


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
        field_weight=0.0,
    ),
    "ir2qsm": Recipe(
        heads=24,
        shapes=48,
        axial_1mm=True,
        uses_tkd=False,
        patch=48,
        batch=2,
        learning_rate=2e-3,
        noise_ppm=0.005,
    ),
}


def make_volumes(recipe: Recipe, seed: int, processes: int) -> list[TrainingVolume]:
    """Return heads and random shapes on the grids that the recipe asks for."""
    rng = np.random.default_rng(seed)
    grids = [
        random_geometry(rng, recipe.size_mm, axial_1mm=recipe.axial_1mm or n % 2 == 0)
        for n in range(recipe.heads)
    ]
    small_mm = round(recipe.size_mm * 112 / 170)
    small = [
        random_geometry(rng, small_mm, axial_1mm=recipe.axial_1mm) for _ in range(recipe.shapes)
    ]
    with ProcessPoolExecutor(processes) as pool:
        heads = pool.map(head, grids, range(1000, 1000 + len(grids)))
        shapes = pool.map(random_shapes, small, range(2000, 2000 + len(small)))
        return [*heads, *shapes]


class Patches:
    """Batches of (n, 4, p, p, p): field, TKD map, chi, mask; cut, scaled and flipped at random.

    What the networks take is linear in the field, so field and noise are transformed once a volume.
    """

    def __init__(
        self, volumes: Sequence[TrainingVolume], recipe: Recipe, seed: int, device: str
    ) -> None:
        self.recipe, self.rng = recipe, np.random.default_rng(seed)
        threshold = TKD_THRESHOLD if recipe.uses_tkd else None
        self.volumes = [
            torch.from_numpy(volume.channels(self.rng, threshold, TKD_PAD_VOXELS)).to(device)
            for volume in volumes
        ]
        sizes = [volume.geometry.voxel_size_mm for volume in volumes]
        self.square = [dx == dy for dx, dy, _ in sizes]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches for ever."""
        while True:
            yield torch.stack([self._patch() for _ in range(self.recipe.batch)])

    def _patch(self) -> Tensor:
        """Return a patch at least a quarter inside the mask, zero-padded where the grid ends."""
        rng, size = self.rng, self.recipe.patch
        n = rng.integers(len(self.volumes))
        volume = self.volumes[n]
        while True:
            start = [rng.integers(0, max(1, m - size + 1)) for m in volume.shape[1:]]
            part = volume[(slice(None), *(slice(s, s + size) for s in start))]
            if part[5].mean() >= 0.25:
                break
        missing = [(0, size - m) for m in reversed(part.shape[1:])]
        part = nn.functional.pad(part, [pad for pair in missing for pad in pair])
        amplitude = rng.uniform(*self.recipe.amplitude) * rng.choice([-1, 1])
        noise = rng.uniform(0, self.recipe.noise_ppm)
        inputs = amplitude * part[0:2] + noise * part[2:4]
        patch = torch.cat([inputs, amplitude * part[4:5], part[5:6]])
        patch = patch.flip([axis for axis in (1, 2, 3) if rng.random() < 0.5])
        return patch.swapaxes(1, 2) if self.square[n] and rng.random() < 0.5 else patch


def outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """Return the final output, then any intermediate ones, all (n, 1, p, p, p)."""
    field, inverse = batch[:, 0:1], batch[:, 1:2]
    if isinstance(model, IR2QSM):
        final, intermediate = model.all_outputs(field)
        return [final, *intermediate]
    return [model(field, inverse)]


def loss(recipe: Recipe, estimates: list[Tensor], batch: Tensor, dipole: Tensor) -> Tensor:
    """Smooth L1 plus gradient L1 in the mask, and the field of the error.

    Earlier iterations count half as much each. The error has no sources outside the patch, so that
    its field is exact but for what wraps around.
    """
    chi, mask = batch[:, 2:3], batch[:, 3:4]

    def one(estimate: Tensor) -> Tensor:
        error = (estimate.float() - chi) * mask / SCALE_PPM
        value = nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.5)
        for axis in (2, 3, 4):
            value = value + recipe.gradient_weight / 3 * error.diff(dim=axis).abs().mean()
        return value

    final, *intermediate = estimates
    total = one(final)
    for back, estimate in enumerate(reversed(intermediate)):
        total = total + recipe.intermediate_weight * 0.5**back * one(estimate)
    if recipe.field_weight:
        error, axes = (final.float() - chi) * mask / SCALE_PPM, (2, 3, 4)
        spectrum = torch.fft.rfftn(error, dim=axes) * dipole
        field = torch.fft.irfftn(spectrum, s=error.shape[2:], dim=axes) * mask
        total = total + recipe.field_weight * field.abs().mean()
    return total


def held_out_batch(recipe: Recipe) -> Tensor:
    """Return (1, 4, x, y, z) of a head that no training has seen, at 0.0025 ppm noise."""
    threshold = TKD_THRESHOLD if recipe.uses_tkd else None
    volume = head(Geometry((min(96, recipe.size_mm // 8 * 8),) * 3), seed=99)
    part = torch.from_numpy(volume.channels(np.random.default_rng(7), threshold, TKD_PAD_VOXELS))
    return torch.cat([part[0:2] + 0.0025 * part[2:4], part[4:6]])[None]


def nrmse_percent(model: nn.Module, batch: Tensor) -> float:
    """Return the demeaned error in the mask of a batch [%]."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        estimate = outputs(model, batch)[0]
    model.train(was_training)
    truth, result = (volume[batch[:, 3:4] > 0] for volume in (batch[:, 2:3], estimate))
    truth, result = truth - truth.mean(), result - result.mean()
    return float(100 * torch.linalg.norm(result - truth) / torch.linalg.norm(truth))


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Return the rate at a share of the training: a line up, then a cosine down to 0.3 %."""
    if progress < recipe.warm_up:
        return recipe.learning_rate * (0.02 + 0.98 * progress / recipe.warm_up)
    rest = (progress - recipe.warm_up) / (1 - recipe.warm_up)
    return recipe.learning_rate * (0.003 + 0.997 * 0.5 * (1 + math.cos(math.pi * min(rest, 1))))


def train(
    model: nn.Module,
    volumes: Sequence[TrainingVolume],
    recipe: Recipe,
    *,
    steps: int,
    minutes: float,
    seed: int,
    device: str,
    bfloat16: bool,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Return the averaged network and its log, fifty rows; ends after steps or minutes."""
    model = model.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    held_out = held_out_batch(recipe).to(device)
    source = iter(Patches(volumes, recipe, seed, device))
    half = recipe.patch // 2 + 1
    dipole = torch.from_numpy(dipole_kernel(Geometry((recipe.patch,) * 3))[..., :half]).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    averaged: nn.Module | None = None
    log: list[dict[str, float]] = []
    recent: list[Tensor] = []
    began, step = time.monotonic(), 0
    while True:
        passed = (time.monotonic() - began) / 60
        progress = max(step / steps, passed / minutes)
        if progress >= 1:
            break
        step += 1
        frozen = progress > 1 - recipe.frozen_statistics
        model.train(not frozen)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, progress)
        batch = next(source)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bfloat16):
            estimates = outputs(model, batch)
        value = loss(recipe, estimates, batch, dipole)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        if frozen and averaged is None:
            averaged = deepcopy(model)
        elif averaged is not None:
            with torch.no_grad():
                for kept, now in zip(averaged.parameters(), model.parameters(), strict=True):
                    kept.lerp_(now, 1 - recipe.average)
        recent.append(value.detach())
        if progress * 50 >= len(log) + 1:
            row = {
                "step": step,
                "seconds": round(time.monotonic() - began),
                "loss": round(float(torch.stack(recent).mean()), 5),
                "held_out_nrmse_percent": round(nrmse_percent(averaged or model, held_out), 2),
            }
            print(row, flush=True)
            log.append(row)
            recent.clear()
    return (averaged or model).cpu().eval(), log


def main() -> None:
    """Train one network and write its weights and log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, help="as on a GPU")
    for name in CHANGEABLE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--start-from", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.bfloat16 is None:
        args.bfloat16 = args.device.startswith("cuda")
    began = time.monotonic()
    settings = {name: getattr(args, name) for name in ("model", "seed", "device", "bfloat16")}
    settings |= {"start_from": str(args.start_from or ""), "torch": torch.__version__}
    given = {name: value for name in CHANGEABLE if (value := getattr(args, name))}
    recipe = replace(RECIPES[args.model], **given)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True
    model: nn.Module = TkdUnet() if args.model == "tkd-unet" else IR2QSM(channels=(8, 16, 32, 64))
    if args.start_from:
        model.load_state_dict(load_file(args.start_from))
    volumes = make_volumes(recipe, args.seed, args.threads)
    model, log = train(
        model,
        volumes,
        recipe,
        steps=args.steps,
        minutes=max(args.minutes - (time.monotonic() - began) / 60, LEAST_MINUTES),
        seed=args.seed,
        device=args.device,
        bfloat16=args.bfloat16,
    )
    output = args.output or Path(f"{args.model}.safetensors")
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(state, output)
    settings |= {"recipe": asdict(recipe)}
    output.with_suffix(".log.json").write_text(
        json.dumps({**settings, "log": log}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
