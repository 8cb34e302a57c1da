"""Cases on disk, and patches of them, as a network takes them."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from training_cases import Case, draw_case
from training_volumes import TrainingVolume, head, random_geometry, random_shapes, user_maps

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.networks.network import FIELD_NOISE, LOCAL_FIELD, MASK, Network
from qsm_deploy.kernels.errors import DataError
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.kernels.threads import using_threads
from qsm_deploy.runtime.card.card import PriorMap, TensorInfo
from qsm_deploy.runtime.reconstruction.prior_maps import field_noise_ppm, prior_maps
from qsm_deploy.runtime.scan.scan import Scan

if TYPE_CHECKING:
    from train import Recipe

LEAST_IN_MASK = 0.3  # of a patch
NOISE_SPREAD = 0.1  # of what a network is told of the noise
FLIPPED_SIGNS = 0.2


@dataclass(frozen=True)
class Batch:
    """What a network takes, by name, the truth [ppm] and the mask; volumes are (n, 1, p, p, p)."""

    inputs: dict[str, Tensor]
    chi: Tensor
    mask: Tensor


def make_cases(
    network: Network,
    recipe: "Recipe",
    folder: Path,
    maps: Path | None,
    seed: int,
    processes: int,
) -> None:
    """Draw the cases that a folder lacks: volumes, parts of them, and what a network takes."""
    folder.mkdir(parents=True, exist_ok=True)
    _require_made_by(folder / "made-by.json", network, recipe, maps, seed)
    lacking = [n for n in range(recipe.cases) if not _file(folder, n).exists()]
    if not lacking:
        return
    volumes = user_maps(maps) if maps else _drawn(recipe, seed, processes)
    with ProcessPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(
                _make_case,
                volumes[n % len(volumes)],
                network.inputs,
                network.priors,
                _file(folder, n),
                (seed, n),
                axial=recipe.axial_1mm,
            )
            for n in lacking
        ]
        for made, job in enumerate(jobs, start=1):
            job.result()
            if made % 20 == 0:
                print(f"{made} of {len(jobs)} cases", flush=True)


def _require_made_by(
    told: Path, network: Network, recipe: "Recipe", maps: Path | None, seed: int
) -> None:
    """Check that what cases a folder holds are those that are asked for.

    Raises
    ------
    DataError
        If not.
    """
    volumes = ("heads", "shapes", "size_mm", "axial_1mm")
    asked = {name: getattr(recipe, name) for name in volumes} if maps is None else {}
    asked |= {"maps": str(maps and maps.resolve()), "seed": seed}
    asked |= {"inputs": [tensor.name for tensor in network.inputs]}
    asked |= {"priors": [list(vars(prior).values()) for prior in network.priors]}
    if told.exists() and json.loads(told.read_text()) != asked:
        raise DataError(f"{told.parent} holds cases of another training; remove it, or pass -o")
    told.write_text(json.dumps(asked))


def _drawn(recipe: "Recipe", seed: int, processes: int) -> list[TrainingVolume]:
    """Return heads, a third of them small ones, and random shapes."""
    rng = np.random.default_rng(seed)
    small_mm = round(recipe.size_mm * 112 / 170)
    extents = [small_mm if n % 3 == 2 else recipe.size_mm for n in range(recipe.heads)]
    extents += [small_mm] * recipe.shapes
    grids = [
        random_geometry(rng, extent, axial_1mm=recipe.axial_1mm or n % 3 == 0)
        for n, extent in enumerate(extents)
    ]
    heads, shapes = grids[: recipe.heads], grids[recipe.heads :]
    with ProcessPoolExecutor(processes) as pool:
        drawn = pool.map(head, heads, range(1000, 1000 + len(heads)))
        return [*drawn, *pool.map(random_shapes, shapes, range(2000, 2000 + len(shapes)))]


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:04}.npy"


def _make_case(
    volume: TrainingVolume,
    inputs: tuple[TensorInfo, ...],
    priors: tuple[PriorMap, ...],
    file: Path,
    seed: tuple[int, int],
    *,
    axial: bool,
) -> None:
    """Write the volumes of a case in half precision, and the numbers beside them."""
    with using_threads(1):
        case = draw_case(volume, np.random.default_rng(seed), axial=axial)
        taken, noise_ppm = _taken(case, inputs, priors)
    numbers = {"noise_ppm": noise_ppm, "voxel_size_mm": case.geometry.voxel_size_mm}
    file.with_suffix(".json").write_text(json.dumps(numbers))
    np.save(file.with_suffix(".part.npy"), taken.astype(np.float16))
    file.with_suffix(".part.npy").replace(file)


def _taken(
    case: Case, inputs: tuple[TensorInfo, ...], priors: tuple[PriorMap, ...]
) -> tuple[NDArray[np.float32], float]:
    """Return (c, x, y, z) volumes that a network takes, chi and mask; and the noise."""
    scan = Scan(case.field_ppm[None], case.mask, case.geometry, nib.Nifti1Header(), np.eye(4))
    volumes = {LOCAL_FIELD.name: case.field_ppm, MASK.name: case.mask} | prior_maps(priors, scan)
    named = [volumes[tensor.name] for tensor in inputs if tensor.is_volume]
    return np.stack([*named, case.chi_ppm, case.mask], dtype=np.float32), field_noise_ppm(scan)


class Patches:
    """Batches of patches, scaled, flipped and turned at random."""

    def __init__(
        self, network: Network, recipe: "Recipe", folder: Path, seed: int, device: str
    ) -> None:
        self.recipe, self.device, self.rng = recipe, device, np.random.default_rng(seed)
        self.inputs = network.inputs
        files = [_file(folder, n) for n in range(recipe.cases)]
        self.cases = [np.load(file, mmap_mode="r") for file in files]
        self.numbers = [json.loads(file.with_suffix(".json").read_text()) for file in files]

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches for ever."""
        while True:
            drawn = [self._patch() for _ in range(self.recipe.batch)]
            volumes = torch.stack([patch for patch, _ in drawn]).to(self.device)
            noise = torch.tensor([noise for _, noise in drawn], device=self.device)
            yield _batch(self.inputs, volumes, noise.reshape(-1, 1, 1, 1, 1))

    def _patch(self) -> tuple[Tensor, float]:
        """Return a patch at least partly inside the mask, zero-padded where the grid ends."""
        rng, size = self.rng, self.recipe.patch
        while True:
            n = rng.integers(len(self.cases))
            case = self.cases[n]
            start = [rng.integers(0, max(1, m - size + 1)) for m in case.shape[1:]]
            part = case[(slice(None), *(slice(s, s + size) for s in start))]
            if part[-1].mean(dtype=np.float32) >= LEAST_IN_MASK:
                break
        patch = torch.from_numpy(np.array(part, dtype=np.float32))
        missing = [(0, size - m) for m in reversed(patch.shape[1:])]
        patch = nn.functional.pad(patch, [pad for pair in missing for pad in pair])
        amplitude = np.exp(rng.uniform(*np.log(self.recipe.amplitude)))
        noise_ppm = amplitude * self.numbers[n]["noise_ppm"] * np.exp(rng.normal(0, NOISE_SPREAD))
        sign = -1 if rng.random() < FLIPPED_SIGNS else 1
        is_ppm = [t.unit == "ppm" for t in self.inputs if t.is_volume] + [True, False]
        patch[is_ppm] *= float(amplitude * sign)
        patch = patch.flip([axis for axis in (1, 2, 3) if rng.random() < 0.5])
        voxel = self.numbers[n]["voxel_size_mm"]
        axes = rng.permutation(3) if len(set(voxel)) == 1 else np.arange(3)
        return patch.permute(0, *(1 + axes).tolist()), float(noise_ppm)


def _batch(inputs: tuple[TensorInfo, ...], volumes: Tensor, noise_ppm: Tensor) -> Batch:
    """Return a batch of (n, c, p, p, p) volumes as they lie on disk."""
    channels = iter(volumes.split(1, dim=1))
    named = {t.name: next(channels) if t.is_volume else noise_ppm for t in inputs}
    assert set(named) - {FIELD_NOISE.name} == {t.name for t in inputs if t.is_volume}
    chi, mask = channels
    return Batch(named, chi, mask)


def held_out_batch(network: Network, device: str) -> Batch:
    """Return a head that no training has seen, at 0.0025 ppm of noise."""
    drawn = head_phantom(Geometry((96, 96, 96), (1.5, 1.5, 1.5)), seed=99, noise_ppm=0.0025)
    case = Case(drawn.local_field_ppm, drawn.mask, drawn.chi_ppm, drawn.geometry)
    taken, noise_ppm = _taken(case, network.inputs, network.priors)
    noise = torch.full((1, 1, 1, 1, 1), noise_ppm)
    return _batch(network.inputs, torch.from_numpy(taken)[None].to(device), noise.to(device))
