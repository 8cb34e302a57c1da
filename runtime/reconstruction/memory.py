"""Predicting the peak memory of a run before it begins.

Every stage holds known volumes; what libraries need on top was measured, in bytes per voxel.
"""

import math
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.errors import CardError
from qsm_deploy.runtime.card.card import UNROLLED, MemoryUse, ModelCard, Tiles
from qsm_deploy.runtime.console.peak_memory import address_space_bytes
from qsm_deploy.runtime.reconstruction.patches import PatchPlan
from qsm_deploy.runtime.scan.scan import Scan

if TYPE_CHECKING:
    from qsm_deploy.runtime.reconstruction.correction import Correction

PAD_VOXELS = 8  # a side, of closed forms
SAMPLE_VOXELS = 64  # a side, of what a lower precision is compared on
FLOAT = 4  # bytes of a float32 voxel
LOAD = 14  # per voxel: the compressed and the raw file, its float32 copy and what was read before
TRANSFORM = 13  # per padded voxel: input, spectrum and output of a real transform, and its result
# per voxel: estimates and spectra; a backend keeps its memory between its calls, so both add up.
# NeXtQSM's are of the padded grid, which is the whole plan's patch
UNROLLED_STEP = {"lpcnn": 33, "modl": 45, "spinet": 185, "nextqsm": 40}
TURN, TURN_BACK = 50, 22  # per voxel of the larger grid: splines in double precision
METRICS = 60  # per voxel of the mask's box: doubles
PICTURE = 7  # per voxel: the panels of a figure
# code and tables that libraries load when first used, which stay. How much of their code counts
# depends on how their files lie in the page cache: one run at 48^3 in OpenVINO took 88 MB in an
# older environment and 117 MB in one just installed; this lies between
LIBRARIES_BYTES = 30.5e6
MATPLOTLIB_BYTES = 45e6  # the same for figures

MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUP = Path("/sys/fs/cgroup")
# limit, what is used, and what of that is files that nobody reads, of both versions
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
SHARE_OF_AVAILABLE = 0.8


@dataclass(frozen=True)
class Workload:
    """What decides the memory of a run besides its patch plan.

    Attributes
    ----------
    scan
        The acquisition, as the network takes it.
    card
        The network's, with the memory of its inference.
    backend
        The one that will run it.
    evaluates
        Whether the field residual is computed.
    draws
        Whether a figure is drawn.
    compares_precision
        Whether a lower precision is compared with FP32 on a sample.
    correction
        The step that makes the map consistent with the field, if there is to be one.
    keeps_session
        Whether the backend keeps its memory for the next of several runs.
    measured
        The acquisition as the map is for it, where that has another grid.
    """

    scan: Scan
    card: ModelCard
    backend: str
    evaluates: bool
    draws: bool
    compares_precision: bool = False
    correction: "Correction | None" = None
    keeps_session: bool = False
    measured: Scan | None = None

    def peak_bytes(self, plan: PatchPlan) -> dict[str, float]:
        """Return the predicted peak memory of every stage, above that before the run [bytes]."""
        scan, card, measured = self.scan, self.card, self.measured or self.scan
        voxels = math.prod(scan.geometry.shape)
        patch = math.prod(plan.patch_shape)
        held = LIBRARIES_BYTES + measured.nbytes
        use = inference_memory(card.memory, self.backend)
        kept = use.bytes_per_voxel * patch if self.keeps_session else 0
        stages = {"load": LIBRARIES_BYTES + loading(measured) + kept}
        if self.measured is not None:
            largest = max(scan.mask.size, measured.mask.size)
            stages["load"] = max(stages["load"], held + kept + TURN * largest)
            held += scan.nbytes
        stages["prepare"] = held + kept
        inputs = sum(int(t.shape[1]) for t in card.inputs if t.is_volume)
        if card.priors:
            from qsm_deploy.runtime.reconstruction.prior_maps import prior_bytes

            stages["prepare"] += prior_bytes(card.priors, scan)
        # the inputs besides the field, the sum of patches, and, if it is the map, that in the mask
        volumes = FLOAT * voxels * (inputs + len(card.outputs) * (card.pipeline not in UNROLLED))
        if card.tiles is not None:
            volumes += _tiling(card.tiles, plan, inputs, len(card.outputs))
        if len(scan.measured) > 1 and card.inputs[0].name == "phase_rad":
            volumes += 3 * FLOAT * voxels  # the sum over the echoes, and a term of it
        session = use.fixed_bytes + use.bytes_per_voxel * patch
        stages["inference"] = held + volumes + FLOAT * patch * inputs + session
        if card.pipeline in UNROLLED:
            each = FLOAT * (len(scan.measured) - 1)  # the projection of each further field
            grid = patch if plan.whole else voxels
            stages["inference"] += (UNROLLED_STEP[card.pipeline] + each) * grid
        if self.compares_precision:
            sample = min(voxels, SAMPLE_VOXELS**3) if card.tiles is None else patch
            both = use.fixed_bytes + 2 * (use.bytes_per_voxel + FLOAT * inputs) * sample
            stages["precision check"] = held + FLOAT * voxels + both + kept
        if card.anchor is not None:
            from qsm_deploy.runtime.reconstruction.prior_maps import anchor_bytes

            maps = 2 * FLOAT * voxels
            stages["anchor"] = held + session + maps + anchor_bytes(scan)  # the session is open
        held += use.fixed_bytes + kept  # a session's code stays when it is gone
        if self.measured is not None:
            stages["bring back"] = held + FLOAT * voxels + TURN_BACK * measured.mask.size
        held += FLOAT * measured.mask.size  # the map
        if self.correction is not None:
            stages["data consistency"] = held + self.correction.needed_bytes(measured)
        evaluates = self.evaluates or self.correction is not None
        return stages | stages_after(measured, held, evaluates=evaluates, draws=self.draws)


def _tiling(tiles: Tiles, plan: PatchPlan, inputs: int, outputs: int) -> int:
    """Return the memory of joining tiles: padded inputs, outputs, and what others fade from."""
    margins = [size - kept for size, kept in zip(tiles.size, tiles.kept, strict=True)]
    around = math.prod(a.padded + m for a, m in zip(plan.axes, margins, strict=True))
    held = math.prod(a.padded for a in plan.axes)
    if tiles.blend == "ramp":  # tiles of one layer, and the one at hand
        layer = math.prod(len(a.starts) for a in plan.axes[:2])
        held += (layer + 1) * math.prod(tiles.kept)
    return FLOAT * (around * inputs + held * outputs)


def stages_after(
    scan: Scan, held_bytes: float, *, evaluates: bool, draws: bool
) -> dict[str, float]:
    """Return the memory of what follows an inversion, its map among what is held [bytes]."""
    voxels = math.prod(scan.geometry.shape)
    stages = {"write": held_bytes + 3 * FLOAT * voxels}
    if evaluates:
        stages["field residual"] = held_bytes + TRANSFORM * 8 * voxels
    if scan.truth_ppm is not None:
        stages["metrics"] = held_bytes + METRICS * scan.mask[bounding_box(scan.mask)].size
    if draws:
        stages["figure"] = held_bytes + MATPLOTLIB_BYTES + PICTURE * voxels
    return stages


def loading(scan: Scan) -> float:
    """Return the memory of reading a scan, less that of the libraries that this loads [bytes]."""
    voxels = math.prod(scan.geometry.shape)
    more = scan.nbytes - 5 * voxels  # than one field and its mask
    return LOAD * voxels + 1.5 * more


def inference_memory(memory: Mapping[str, MemoryUse], backend: str) -> MemoryUse:
    """Return what one inference takes, as the card measured it for a backend.

    A backend that was not there when the model was exported is taken to need as much as the
    hungriest that was.

    Raises
    ------
    CardError
        If the card has no measurement at all.
    """
    if not memory:
        raise CardError("the model's card has no memory measurements; export the model again")
    return memory.get(backend) or max(memory.values(), key=lambda use: use.bytes_per_voxel)


def available_bytes() -> int:
    """Return four fifths of what is left of the memory that this process may take.

    That is the least of what the system, every control group that it is in, of either version,
    and the limit of its address space leave.
    """
    free = [int(line.split()[1]) * 1024 for line in _lines(MEMINFO) if "MemAvailable" in line]
    return min([bounded_bytes(), *(int(SHARE_OF_AVAILABLE * size) for size in free)])


def bounded_bytes() -> int:
    """Return four fifths of what is left before the system ends or refuses, whatever is asked for.

    That is what the control groups and the limit of the address space leave.
    """
    free: list[int] = []
    for group in _control_groups():
        for limit, used, key in CGROUP_FILES:
            most, now = (_number(_lines(group / name)) for name in (limit, used))
            if most is not None and now is not None:
                stat = [
                    row.split()[1:] for row in _lines(group / "memory.stat") if f"{key} " in row
                ]
                free.append(most - now + sum(_number(row) or 0 for row in stat[:1]))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        free.append(address_space - address_space_bytes())
    if not free:
        return 2**63
    return int(SHARE_OF_AVAILABLE * max(0, min(free)))


def _control_groups() -> Iterator[Path]:
    """Yield the folders of the groups that this process is in, each with those that it is in."""
    for line in _lines(OWN_CGROUPS):
        _, controllers, inner = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for root in (CGROUP / "memory",) if controllers else (CGROUP, CGROUP / "unified"):
            group = root / inner.lstrip("/")
            yield group
            yield from (above for above in group.parents if above.is_relative_to(root))


def _number(words: list[str]) -> int | None:
    return int(words[0]) if words and words[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
