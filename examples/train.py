r"""Train the bundled ``tv-unet``, or the half-width ``ir2qsm`` of the demo, on a GPU or a CPU.

    python examples/train.py tv-unet --minutes 60 -o tv-unet.safetensors
    python examples/train.py tv-unet --minutes 90 -o tv-unet.safetensors --resume
    python examples/train.py tv-unet --minutes 20 --maps FOLDER \
        --start-from export/weights/tv-unet.safetensors -o mine.safetensors

Trains on drawn heads and shapes, or on the susceptibility maps (NIfTI, in ppm) of a folder. Cases
are made once and kept beside the weights, like a checkpoint, from which ``--resume`` goes on;
minutes and steps are those of the whole training. Runs on the GPU where there is one, in bfloat16.
Writes the weights, averaged over the steps, in half precision, and a log beside them.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from training_set import Batch, Patches, held_out_batch, make_cases

from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.ir2qsm import IR2QSM
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY, recognise
from qsm_deploy.export.networks.tv_unet import TvUnet
from qsm_deploy.kernels.dipole import dipole_kernel
from qsm_deploy.kernels.errors import QsmDeployError, UsageError
from qsm_deploy.kernels.geometry import Geometry

SCALE_PPM = 0.04  # of the error in the loss
LOG_ROWS = 50
CHANGEABLE = ("cases", "heads", "shapes", "size_mm", "patch", "batch", "learning_rate")


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a training besides its seed and length.

    Attributes
    ----------
    heads, shapes, size_mm
        Volumes that are drawn, and how large a head is; random shapes have two thirds of that.
    cases
        Parts of volumes.
    axial_1mm
        Whether all are at 1 mm, axial.
    patch, batch
        Voxels a side, and how many a step.
    amplitude
        A case is scaled by.
    warm_up
        Share of the training.
    frozen_statistics
        Share of it, at the end, with fixed BatchNorm; all of it where weights are given.
    average
        Of the weights, kept at each step.
    relative_to
        The prior map whose error weighs a patch, so that hopeless ones do not rule.
    gradient_weight, intermediate_weight, field_weight
        Of terms of the loss.
    """

    heads: int
    shapes: int
    cases: int
    axial_1mm: bool
    patch: int
    batch: int
    learning_rate: float
    size_mm: int = 170
    amplitude: tuple[float, float] = (0.6, 1.6)
    warm_up: float = 0.05
    frozen_statistics: float = 0.3
    average: float = 0.995
    relative_to: str | None = None
    gradient_weight: float = 0.1
    intermediate_weight: float = 0.0
    field_weight: float = 0.0


MODELS: dict[str, tuple[Callable[[], Network], Recipe]] = {
    "tv-unet": (
        TvUnet,
        Recipe(
            heads=20,
            shapes=12,
            cases=320,
            axial_1mm=False,
            patch=48,
            batch=2,
            learning_rate=2e-3,
            relative_to="tv_chi_ppm",
        ),
    ),
    "ir2qsm": (
        lambda: IR2QSM(channels=(8, 16, 32, 64)),
        Recipe(
            heads=20,
            shapes=12,
            cases=240,
            axial_1mm=True,
            patch=48,
            batch=2,
            learning_rate=1e-3,
            intermediate_weight=0.3,
            field_weight=1.5,
        ),
    ),
}


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return the final output, then any intermediate ones, all (n, 1, p, p, p)."""
    if isinstance(model, IR2QSM):
        final, intermediate = model.all_outputs(*batch.inputs.values())
        return [final, *intermediate]
    return [model(*batch.inputs.values())]


def loss(recipe: Recipe, estimates: list[Tensor], batch: Batch, dipole: Tensor) -> Tensor:
    """Smooth L1 plus gradient L1 in the mask, and the field of the error.

    Earlier iterations count half as much each. The error has no sources outside the patch, so that
    its field is exact but for what wraps around.
    """
    axes = (1, 2, 3, 4)

    def one(estimate: Tensor) -> Tensor:
        error = (estimate.float() - batch.chi) * batch.mask / SCALE_PPM
        value = nn.functional.smooth_l1_loss(
            error, torch.zeros_like(error), beta=0.5, reduction="none"
        ).mean(axes)
        for axis in (2, 3, 4):
            value = value + recipe.gradient_weight * error.diff(dim=axis).abs().mean(axes)
        return value

    final, *intermediate = estimates
    total = one(final)
    for back, estimate in enumerate(reversed(intermediate)):
        total = total + recipe.intermediate_weight * 0.5**back * one(estimate)
    if recipe.field_weight:
        error = (final.float() - batch.chi) * batch.mask / SCALE_PPM
        spectrum = torch.fft.rfftn(error, dim=axes[1:]) * dipole
        field = torch.fft.irfftn(spectrum, s=error.shape[2:], dim=axes[1:]) * batch.mask
        total = total + recipe.field_weight * field.abs().mean(axes)
    if recipe.relative_to:
        prior = (batch.inputs[recipe.relative_to] - batch.chi) * batch.mask / SCALE_PPM
        total = total * 0.25 / (prior.abs().mean(axes) + 0.04)
    return total.mean()


def nrmse_percent(estimate: Tensor, batch: Batch) -> float:
    """Return the demeaned error in the mask [%]."""
    truth, result = (volume[batch.mask > 0] for volume in (batch.chi, estimate))
    truth, result = truth - truth.mean(), result - result.mean()
    return float(100 * torch.linalg.norm(result - truth) / torch.linalg.norm(truth))


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Return the rate at a share of the training: a line up, then a cosine down to 0.3 %."""
    if progress < recipe.warm_up:
        return recipe.learning_rate * (0.02 + 0.98 * progress / recipe.warm_up)
    rest = (progress - recipe.warm_up) / (1 - recipe.warm_up)
    return recipe.learning_rate * (0.003 + 0.997 * 0.5 * (1 + math.cos(math.pi * min(rest, 1))))


class Training:
    """A network, what trains it and how far it is; all of it goes into a checkpoint."""

    def __init__(self, model: nn.Module, recipe: Recipe, device: str, checkpoint: Path) -> None:
        self.recipe, self.device, self.checkpoint = recipe, device, checkpoint
        model = model.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.model, self.averaged = model, deepcopy(model).eval()
        self.optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        half = recipe.patch // 2 + 1
        dipole = dipole_kernel(Geometry((recipe.patch,) * 3))[..., :half]
        self.dipole = torch.from_numpy(dipole).to(device)

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in self._parts}
        state |= {"step": self.step, "seconds": self.seconds, "log": self.log}
        unfinished = self.checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)

    def resume(self) -> None:
        """Go on where the last checkpoint was written.

        Raises
        ------
        UsageError
            If there is none, or it is another network's.
        """
        if not self.checkpoint.exists():
            raise UsageError(f"there is no {self.checkpoint} to go on from; drop --resume")
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        try:
            for name in self._parts:
                getattr(self, name).load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError):
            raise UsageError(f"{self.checkpoint} is of another network; pass another -o") from None
        self.step, self.seconds, self.log = (state[name] for name in ("step", "seconds", "log"))

    _parts = ("model", "averaged", "optimiser")

    def run(
        self,
        batches: Iterator[Batch],
        held_out: Batch,
        *,
        steps: int,
        minutes: float,
        bfloat16: bool,
    ) -> None:
        """Train until so many steps or minutes were made in all."""
        began = time.monotonic() - self.seconds
        recent: list[Tensor] = []
        told = int(max(self.step / steps, self.seconds / 60 / minutes) * LOG_ROWS)
        told = told if self.step else -1
        while (progress := max(self.step / steps, self.seconds / 60 / minutes)) < 1:
            self.model.train(progress < 1 - self.recipe.frozen_statistics)
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(self.recipe, progress)
            batch = next(batches)
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=bfloat16):
                estimates = outputs(self.model, batch)
            value = loss(self.recipe, estimates, batch, self.dipole)
            self.optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimiser.step()
            self.step += 1
            self._average()
            recent.append(value.detach())
            self.seconds = time.monotonic() - began
            if (row := int(progress * LOG_ROWS)) > told:
                told = row
                self._tell(float(torch.stack(recent).mean()), held_out)
                recent.clear()
                self.save()
        if recent:
            self._tell(float(torch.stack(recent).mean()), held_out)
            self.save()

    def _average(self) -> None:
        """Follow the weights; take numbers that are no weights as they are."""
        kept = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = zip(self.averaged.parameters(), self.model.parameters(), strict=True)
            for average, now in pairs:
                average.lerp_(now, 1 - kept)
            buffers = zip(self.averaged.buffers(), self.model.buffers(), strict=True)
            for average, now in buffers:
                average.copy_(now)

    def _tell(self, value: float, held_out: Batch) -> None:
        with torch.inference_mode():
            estimate = outputs(self.averaged, held_out)[0]
        row = {
            "step": self.step,
            "seconds": round(self.seconds),
            "loss": round(value, 5),
            "held_out_nrmse_percent": round(nrmse_percent(estimate, held_out), 2),
        }
        print(row, flush=True)
        self.log.append(row)


def main() -> None:
    """Train one network and write its weights and log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, help="as on a GPU")
    for name in CHANGEABLE:
        kind = type(getattr(MODELS["tv-unet"][1], name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--maps", type=Path, help="folder of susceptibility maps to train on")
    parser.add_argument("--start-from", type=Path, help="weights, as a file of this script")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if not (args.minutes > 0 and args.steps > 0):
        raise UsageError("--minutes and --steps must be positive")
    if args.bfloat16 is None:
        args.bfloat16 = args.device.startswith("cuda")
    output: Path = args.output or Path(f"{args.model}.safetensors")
    make, recipe = MODELS[args.model]
    given: dict[str, Any] = {name: value for name in CHANGEABLE if (value := getattr(args, name))}
    if args.start_from:
        given["frozen_statistics"] = 1.0
    recipe = replace(recipe, **given)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True
    network = make()
    if args.start_from:
        spec, state = REGISTRY[args.model], load_state(args.start_from, fits=recognise)
        network = build_network(spec, state, Choices(spec.chosen_options({})))
    folder = output.with_suffix(".cases")
    make_cases(network, recipe, folder, args.maps, args.seed, args.threads)
    training = Training(network, recipe, args.device, output.with_suffix(".checkpoint"))
    if args.resume:
        training.resume()
    elif training.checkpoint.exists():
        raise UsageError(f"{training.checkpoint} is there: pass --resume, remove it, or pass -o")
    training.run(
        iter(Patches(network, recipe, folder, args.seed + training.step, args.device)),
        held_out_batch(network, args.device),
        steps=args.steps,
        minutes=args.minutes,
        bfloat16=args.bfloat16,
    )
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for key, value in training.averaged.state_dict().items()
    }
    save_file(state, output)
    settings = {name: getattr(args, name) for name in ("model", "seed", "device", "bfloat16")}
    settings |= {"start_from": str(args.start_from or ""), "torch": torch.__version__}
    settings |= {"recipe": asdict(recipe), "log": training.log}
    output.with_suffix(".log.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except QsmDeployError as error:
        sys.exit(f"train.py: error: {error}")
