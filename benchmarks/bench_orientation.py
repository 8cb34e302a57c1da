"""What tilt, voxel size and order of storage cost a network, and what the turn for it costs.

    python benchmarks/bench_orientation.py ir2qsm.onnx --cosmos FOLDER \
        -o benchmarks/results/orientation.json

A head that no network was trained on, at six tilts and four voxel sizes, and a real COSMOS map
(chi_cosmos_ppm.nii.gz and mask.nii.gz in FOLDER) whose field is simulated at 20 degrees, with
0.0025 ppm of noise and what background removal leaves. ``ir2qsm`` was trained axially at 1 mm and
is turned for; ``ignored`` is --allow-geometry. ``tv-unet`` takes any grid; "as axial" it is a
good axial network that is told that B0 is the third axis.
"""

import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import bench_accuracy
import nibabel as nib
import numpy as np
from common import Row, parser, say, write

from qsm_deploy.calibration.phantom.orientation import affine_from_geometry
from qsm_deploy.calibration.phantom.phantom import head_phantom, local_field
from qsm_deploy.calibration.phantom.residual_background import residual_background
from qsm_deploy.export.networks.network import AXIAL_1MM
from qsm_deploy.kernels.bounding_box import bounding_box
from qsm_deploy.kernels.geometry import Geometry, Volume
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.metrics.metrics import hfen, nrmse, xsim
from qsm_deploy.runtime.reconstruction.correction import Correction
from qsm_deploy.runtime.reconstruction.inversion import Wants
from qsm_deploy.runtime.reconstruction.preparation import prepare
from qsm_deploy.runtime.reconstructor import Host, Reconstructor, open_reconstructor
from qsm_deploy.runtime.scan.nifti import nifti_bytes
from qsm_deploy.runtime.scan.scan import Scan
from qsm_deploy.runtime.scan.turned_grid import MARGIN_VOXELS, grid_along
from qsm_deploy.runtime.sessions.bundled import BUNDLED

SEED, SMALL = 501, (96, 112, 96)
NOISE_PPM = 0.0025
TILTS = ((0,), (2,), (5,), (20,), (35,), (45,), (20, 15))  # about the first axis, the second
VOXELS_MM = ((0.8, 0.8, 2.0), (0.5, 0.5, 2.0), (0.6, 0.6, 0.6), (1.5, 1.5, 1.5))
LEFT_OVER_PPM = (0.0, 0.002, 0.005)
STEPS = {
    "closed .3": Correction(0.3),
    "closed .1": Correction(0.1),
    "closed .03": Correction(0.03),
    "10 iterations, .05": Correction(0.05, 10),
}
SLAB = slice(15, 33)  # of slices
REPEATS = 5
PROGRAM = Path(sys.executable).parent / "qsm-run"


@dataclass(frozen=True)
class Case:
    """One acquisition with its truth."""

    name: str
    scan: Scan
    chi_ppm: Volume

    def row(self, how: str, chi_ppm: Volume) -> Row:
        """Return the errors of a map."""
        truth, mask = self.chi_ppm, self.scan.mask
        return {
            "case": self.name,
            "how": how,
            "nrmse_percent": round(nrmse(chi_ppm, truth, mask), 2),
            "xsim": round(xsim(chi_ppm, truth, mask), 3),
            "hfen_percent": round(hfen(chi_ppm, truth, mask), 1),
        }


def direction(degrees: tuple[int, ...]) -> tuple[float, float, float]:
    """Return B0 in the axes of a grid that is tilted about its first axis, then its second."""
    first, second = (*map(math.radians, degrees), 0.0)[:2]
    return (
        math.sin(second) * math.cos(first), math.sin(first), math.cos(second) * math.cos(first),
    )  # fmt: skip


def case_of(name: str, chi_ppm: Volume, scan: Scan, left_over_ppm: float = 0.0) -> Case:
    """Return an acquisition with noise, and what background removal left."""
    rng = np.random.default_rng(12345)
    field = scan.measured[0] + np.float32(NOISE_PPM) * rng.standard_normal(
        scan.mask.shape, dtype=np.float32
    )
    if left_over_ppm:
        field += residual_background(scan.mask, scan.geometry, rms_ppm=left_over_ppm, rng=rng)
    return Case(name, replace(scan, measured=(field * scan.mask)[None]), chi_ppm)


def head(
    degrees: tuple[int, ...], voxel_mm: tuple[float, float, float] = (1, 1, 1), left: float = 0.0
) -> Case:
    """Return the head at a tilt and a voxel size."""
    x, y, z = (round(n / edge) for n, edge in zip(SMALL, voxel_mm, strict=True))
    drawn = head_phantom(Geometry((x, y, z), voxel_mm, direction(degrees)), seed=SEED, noise_ppm=0)
    affine = affine_from_geometry(drawn.geometry)
    fields = drawn.local_field_ppm[None]
    scan = Scan(fields, drawn.mask, drawn.geometry, nib.Nifti1Header(), affine)
    name = f"head, {'x'.join(f'{v:g}' for v in voxel_mm)} mm, {' and '.join(map(str, degrees))} deg"
    return case_of(f"{name}, left over {left:g}" if left else name, drawn.chi_ppm, scan, left)


def cosmos(folder: Path, degrees: tuple[int, ...], left: float = 0.0) -> Case:
    """Return the COSMOS map, its field at a tilt."""
    (axial,) = bench_accuracy.cases({}, folder)
    grid = replace(axial.geometry, b0_direction=direction(degrees))
    rng = np.random.default_rng(0)
    field = local_field(axial.chi_ppm, axial.mask, grid, noise_ppm=0.0, rng=rng)
    scan = Scan(field[None], axial.mask, grid, nib.Nifti1Header(), affine_from_geometry(grid))
    name = f"cosmos2016, {degrees[0]} deg"
    return case_of(f"{name}, left over {left:g}" if left else name, axial.chi_ppm, scan, left)


class AsAxial(Reconstructor):
    """A network for any grid that is told that it was trained axially at 1 mm."""

    def __init__(self, reconstructor: Reconstructor) -> None:
        inversion = reconstructor.inversion
        super().__init__(inversion)
        self._needs = replace(inversion.needs, geometry=AXIAL_1MM)

    def map(self, scan: Scan, correction: Correction | None = None) -> Volume:
        """Return its map of a turned scan, brought back."""
        wants = Wants(correction=correction)
        planned = self.planned(prepare(self._needs, scan, wants), wants)
        return self.run(planned, Stages()).map_ppm

    def ignoring(self, scan: Scan) -> Volume:
        """Return its map where B0 is taken for the third axis."""
        return map_of(self, replace(scan, geometry=replace(scan.geometry, b0_direction=(0, 0, 1))))


def map_of(
    reconstructor: Reconstructor, scan: Scan, correction: Correction | None = None, **how: bool
) -> Volume:
    """Return a map as qsm-run makes it."""
    wants = Wants(correction=correction, **how)
    return reconstructor.run(reconstructor.plan(scan, wants), Stages()).map_ppm


def rows_of(case: Case, ir2qsm: Reconstructor, unet: AsAxial, *, steps: bool) -> Iterator[Row]:
    """Yield what both networks make of a case, and what data consistency makes of that."""
    scan = case.scan
    yield say(case.row("tv-unet", map_of(unet, scan)))
    yield say(case.row("tv-unet as axial, ignored", unet.ignoring(scan)))
    yield say(case.row("tv-unet as axial", unet.map(scan)))
    yield say(case.row("ir2qsm, ignored", map_of(ir2qsm, scan, allow_geometry=True)))
    yield say(case.row("ir2qsm", map_of(ir2qsm, scan)))
    if not steps:
        return
    for name, step in STEPS.items():
        yield say(case.row(f"tv-unet as axial, {name}", unet.map(scan, step)))
        yield say(case.row(f"ir2qsm, {name}", map_of(ir2qsm, scan, step)))


def there_and_back(case: Case) -> Iterator[Row]:
    """Yield what turning alone costs a map and its field, deeper than three voxels."""
    box = (slice(48, 112), slice(50, 114), slice(50, 106))
    scan = case.scan.cut(box)
    edge = math.prod(scan.geometry.voxel_size_mm) ** (1 / 3)
    grid = grid_along(scan.geometry, scan.mask, (0, 0, 1), (edge, edge, edge))
    chi = case.chi_ppm[box]
    clean = local_field(chi, scan.mask, scan.geometry, noise_ppm=0, rng=np.random.default_rng(0))
    deep = np.zeros_like(scan.mask)
    deep[3:-3, 3:-3, 3:-3] = scan.mask[3:-3, 3:-3, 3:-3]
    for what, volume in (("chi", chi), ("field", clean)):
        again = grid.turn_back(grid.turn(volume * scan.mask), scan.mask.shape)
        rms = float(np.sqrt(np.mean((again - volume)[deep] ** 2)))
        yield say(
            {"case": case.name, "how": f"{what} there and back", "rms_ppb": round(1e3 * rms, 2)}
        )


def cost(ir2qsm: Reconstructor, unet: AsAxial) -> Iterator[Row]:
    """Yield what turning there and back takes beside the networks, in one run, and its voxels."""
    drawn = head_phantom(Geometry((160, 192, 160), b0_direction=direction((20,))), seed=SEED)
    fields, affine = drawn.local_field_ppm[None], affine_from_geometry(drawn.geometry)
    scan = Scan(fields, drawn.mask, drawn.geometry, nib.Nifti1Header(), affine)
    wants = Wants()
    seconds: dict[str, list[float]] = {"turn": [], "ir2qsm": [], "tv-unet": []}
    for _ in range(REPEATS):
        began = time.perf_counter()
        prepared = prepare(ir2qsm.inversion.needs, scan, wants)
        turned = time.perf_counter() - began
        stages = Stages()
        ir2qsm.run(ir2qsm.planned(prepared, wants), stages)
        seconds["turn"].append(turned + stages.seconds["bring back"])
        seconds["ir2qsm"].append(stages.seconds["inference"])
        plain = Stages()
        unet.run(unet.plan(scan, wants), plain)
        seconds["tv-unet"].append(plain.seconds["prepare"] + plain.seconds["inference"])
    turn = np.array(seconds["turn"])
    inside = scan.mask[bounding_box(scan.mask, margin=MARGIN_VOXELS)].size
    yield say(
        {
            "case": "head of 160x192x160, 20 deg",
            "how": "turn there and back, medians",
            "seconds": round(float(np.median(turn)), 2),
            **{
                f"of_{name}": round(float(np.median(turn / np.array(seconds[name]))), 3)
                for name in ("ir2qsm", "tv-unet")
            },
            "turned_voxels_of_box": round(prepared.scan.mask.size / inside, 3),
            "turned_voxels_of_file": round(prepared.scan.mask.size / scan.mask.size, 3),
        }
    )


def memory(model: Path, cases: list[Case]) -> Iterator[Row]:
    """Yield the peak memory of qsm-run beside its prediction, each in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, patch in itertools.product(cases, ("off", "64")):
            volumes = {"field": case.scan.measured[0], "mask": case.scan.mask.astype(np.float32)}
            for file, volume in volumes.items():
                (folder / f"{file}.nii.gz").write_bytes(nifti_bytes(volume, case.scan.affine))
            line = f"field.nii.gz -m mask.nii.gz -o chi.nii.gz --report run.json --patch {patch}"
            command = [PROGRAM, model.resolve(), *line.split(), "--force", "-q"]
            subprocess.run(command, check=True, cwd=folder, capture_output=True)
            run = json.loads((folder / "run.json").read_text())
            peaks, predicted = run["memory"]["stage_peak_bytes"], run["plan"]
            each = {
                stage: round(predicted["predicted_stage_bytes"][stage] / peaks[stage], 3)
                for stage in ("inference", "bring back", "field residual")
            }
            peak = run["memory"]["peak_above_baseline_bytes"]
            yield say(
                {
                    "case": case.name,
                    "how": f"memory, --patch {patch}",
                    "peak_mb": round(peak / 1e6),
                    "predicted_of_peak": round(predicted["predicted_peak_bytes"] / peak, 3),
                    "of_stages": each,
                }
            )


def main() -> None:
    """Measure and write."""
    p = parser(__doc__)
    p.add_argument("ir2qsm", type=Path)
    p.add_argument("--cosmos", type=Path, required=True)
    args = p.parse_args()
    ir2qsm = open_reconstructor([args.ir2qsm], Host())
    unet = AsAxial(open_reconstructor([BUNDLED["tv-unet"]], Host()))
    rows: list[Row] = []
    for degrees in TILTS:
        rows += rows_of(head(degrees), ir2qsm, unet, steps=degrees in ((20,), (35,), (45,)))
    for left in LEFT_OVER_PPM[1:]:
        rows += rows_of(head((20,), left=left), ir2qsm, unet, steps=True)
    for voxel in VOXELS_MM:
        rows += rows_of(head((20,), voxel), ir2qsm, unet, steps=voxel == VOXELS_MM[0])
    thick = head((20,), VOXELS_MM[0])
    box = (slice(None), slice(None), SLAB)
    slab = Case("slab of 18 slices, 20 deg", thick.scan.cut(box), thick.chi_ppm[box])
    rows += rows_of(slab, ir2qsm, unet, steps=True)
    for left in LEFT_OVER_PPM[:2]:
        rows += rows_of(cosmos(args.cosmos, (20,), left), ir2qsm, unet, steps=True)
    rows += rows_of(cosmos(args.cosmos, (5,)), ir2qsm, unet, steps=False)
    rows += there_and_back(cosmos(args.cosmos, (20,)))
    rows += memory(args.ir2qsm, [head((20,)), thick])
    rows += cost(ir2qsm, unet)
    card = ir2qsm.inversion.facts()["model"]
    write(args.output, rows, noise_ppm=NOISE_PPM, weights_sha256=card["weights_sha256"][:8])


if __name__ == "__main__":
    main()
