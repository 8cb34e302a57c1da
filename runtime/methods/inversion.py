"""A method as an inversion: planned, run and reported as a network is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import scipy

from qsm_deploy.kernels.dipole import tikhonov, tkd
from qsm_deploy.kernels.errors import DataError, MemoryLimitError, UsageError
from qsm_deploy.kernels.geometry import Geometry, Mask, Volume, shape_text, vector_text
from qsm_deploy.kernels.inversion import cosmos, ilsqr
from qsm_deploy.kernels.inversion.edges import edges_of_magnitude
from qsm_deploy.kernels.inversion.field_noise import (
    AXES,
    alpha_of_noise,
    b0_contradicted,
    field_noise,
    noise_of_most,
)
from qsm_deploy.kernels.inversion.grid import padded_box
from qsm_deploy.kernels.inversion.total_variation import (
    HUBER_ITERATIONS,
    ITERATIONS,
    MOST_TRUST,
    total_variation,
    without_outliers,
)
from qsm_deploy.kernels.threads import using_threads
from qsm_deploy.runtime.card.card import GeometryLimits
from qsm_deploy.runtime.console.peak_memory import memory_text
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.reconstruction.inversion import CPU, Done, Made, Needs, Task, Wants
from qsm_deploy.runtime.reconstruction.memory import (
    FLOAT,
    PAD_VOXELS,
    TRANSFORM,
    available_bytes,
    loading,
    stages_after,
)
from qsm_deploy.runtime.reconstruction.patches import PatchPlan, plan_whole
from qsm_deploy.runtime.reconstruction.planning import Decision, PatchOptions
from qsm_deploy.runtime.scan.scan import Scan

ANY_GRID = GeometryLimits(None, None, None, None)
THRESHOLD, LAM = 0.2, 0.01  # of tkd and tikhonov, near the best at 0.0025 ppm of noise
LIBRARIES_BYTES = 8e6  # what is loaded when first used; a network's backend loads more
MANY_OUTLIERS = 3e-4  # of the mask's voxels; 1e-4 in a patient with a haemorrhage
MANY_UNSEEN = 0.05  # of the frequencies
Solved = tuple[Volume, dict[str, Any]]


@dataclass(frozen=True)
class Runner:
    """How a method runs: its map, its memory [bytes per padded voxel], as measured, and its steps.

    Those are its iterations by default, so many times over.
    """

    solve: Callable[[Scan, Method, Done], Solved]
    bytes_per_voxel: Callable[[Scan, Method], float]
    iterations: int = 1
    rounds: int = 1


class MethodInversion:
    """A method, on the CPU.

    Parameters
    ----------
    method
        Which, and what is said to it.
    threads
        Of the CPU, 0 for all cores.
    """

    def __init__(self, method: Method, threads: int = 0) -> None:
        self.method, self.threads, self._runner = method, threads, RUNNERS[method.name]

    @property
    def name(self) -> str:
        """The method, and what computes its transforms."""
        return f"{self.method.name} ({self.method.row.title}), scipy {scipy.__version__}"

    @property
    def needs(self) -> Needs:
        """Local fields on any grid."""
        name, row = self.method.name, self.method.row
        return Needs(
            name,
            "local_field_ppm",
            row.field_counts,
            ANY_GRID,
            magnitude=name == "medi",
            takes_noise="noise_map" in row.options,
        )

    def facts(self) -> dict[str, Any]:
        """Return what the report says of it."""
        row = self.method.row
        return {
            "model": {"method": self.method.name, "title": row.title, "doi": row.doi}
            | {"said": self.method.said()},
            "backend": {
                "name": "scipy",
                "version": scipy.__version__,
                "device": CPU,
                "threads": self.threads or None,
            },
        }

    def require_fields(self, count: int) -> None:
        """Check that it takes so many fields."""
        counts = self.method.row.field_counts
        if count in counts:
            return
        if counts[-1] == 1:
            raise UsageError(
                f"{self.method.name} takes one field, {count} were given; fields of several "
                "orientations need --method cosmos, or a network for them; the model, if named, "
                "comes first and ends in .onnx"
            )
        raise UsageError(
            f"{self.method.name} takes {counts[0]} fields or more, one for each orientation; "
            f"{count} was given: pass the others, or --method tv"
        )

    def limit_bytes(self) -> float:
        """Return what the machine has left."""
        return available_bytes()

    def task(self, scan: Scan, measured: Scan, wants: Wants, limit_bytes: float) -> Task:
        """Return how a scan would be run: the whole volume, or a refusal."""
        self._require(scan, wants)
        padded = padded_box(scan.mask, scan.geometry).geometry.shape
        whole = plan_whole(padded, 1)
        stages = self.stage_bytes(scan, whole, wants)
        decision = Decision(whole, "a method takes the whole volume", True, stages)
        if decision.peak_bytes > limit_bytes:
            grid = shape_text(scan.axes.inverse.sizes(padded))
            raise MemoryLimitError(
                f"{self.method.name} would need {memory_text(decision.peak_bytes)} for a grid of "
                f"{grid}, the limit is {memory_text(limit_bytes)}; raise "
                "--memory-limit or free memory, or take a network, which runs in patches"
            )
        steps = self._runner.rounds * (self.method.iterations or self._runner.iterations)
        return Task(scan, None, decision, steps + self.method.robust * HUBER_ITERATIONS)

    def stage_bytes(self, scan: Scan, whole: PatchPlan, wants: Wants) -> Mapping[str, float]:
        """Return the memory of every stage, the inversion's on the whole padded grid [bytes]."""
        held = LIBRARIES_BYTES + scan.nbytes + FLOAT * math.prod(scan.geometry.shape)
        each = self._runner.bytes_per_voxel(scan, self.method)
        inversion = held + each * math.prod(whole.patch_shape)
        return {"load": LIBRARIES_BYTES + loading(scan), "inversion": inversion} | stages_after(
            scan, held, evaluates=wants.evaluates, draws=wants.draws
        )

    def make(self, task: Task, stages: Stages, done: Done) -> Made:
        """Return the map, and what the method found."""
        with stages("inversion"), using_threads(self.threads):
            chi, found = self._runner.solve(task.scan, self.method, done)
        return self.made(task.scan, chi, found)

    def made(self, scan: Scan, chi_ppm: Volume, found: dict[str, Any]) -> Made:
        """Return the map with what was found, and what the user should know of it."""
        notes = _b0_notes(scan) + _notes(found, self.method)
        return Made(chi_ppm, {"inversion": found} | ({"notes": notes} if notes else {}))

    def _require(self, scan: Scan, wants: Wants) -> None:
        """Refuse what makes no sense for a method, with the reason."""
        name = self.method.name
        self.method.require_takes({"magnitude": scan.magnitude, "noise_map": scan.noise_ppm})
        if name == "medi" and scan.magnitude is None:
            raise UsageError(
                "medi takes the edges from a magnitude: pass --magnitude FILE, or --method tv, "
                "which is the same without one"
            )
        for flag, asked, why in (
            ("--data-consistency", wants.correction is not None, "explains its field already"),
            ("--patch, --overlap and --blend", wants.patches != PatchOptions(), "needs it whole"),
            ("--allow-geometry", wants.allow_geometry, "takes any geometry"),
        ):
            if asked:
                raise UsageError(f"{flag}: {name} {why}; drop the flag, or name a network")


def _closed(solve: Callable[[Scan, Method], Volume]) -> Callable[[Scan, Method, Done], Solved]:
    def solved(scan: Scan, method: Method, done: Done) -> Solved:
        chi = solve(scan, method)
        chi *= scan.mask
        done()
        return chi, {}

    return solved


def _tkd(scan: Scan, method: Method) -> Volume:
    threshold = method.threshold or THRESHOLD
    return tkd(scan.measured[0], scan.geometry, threshold=threshold, pad_voxels=PAD_VOXELS)


def _tikhonov(scan: Scan, method: Method) -> Volume:
    lam = method.lam or LAM
    return tikhonov(scan.measured[0], scan.geometry, lam=lam, pad_voxels=PAD_VOXELS)


def _variation(scan: Scan, method: Method, done: Done) -> Solved:
    """TV, and MEDI, which is TV with the edges of a magnitude free and its weight."""
    field, mask, grid = scan.measured[0], scan.mask, scan.geometry
    spectrum, weight = field_noise(field, mask, grid), scan.magnitude
    stated = edges = dropped = None
    usual = noise_of_most(field, mask, spectrum)
    if scan.noise_ppm is not None:
        weight, stated = _weight_of_noise(scan.noise_ppm, field, mask)
        usual = max(usual, stated)
    if method.name == "medi":
        assert scan.magnitude is not None  # or it was refused
        edges = edges_of_magnitude(scan.magnitude, mask, grid)
    if method.robust:
        alpha = weight_of_edges(method, usual, grid)
        how: dict[str, Any] = {"weight": weight, "edges": edges, "done": done}
        field, dropped = without_outliers(
            field, mask, grid, alpha_ppm_mm=alpha, sigma_ppm=usual, **how
        )
        weight = np.where(dropped, np.float32(0), mask if weight is None else weight)
        spectrum = field_noise(field, mask, grid)
    sigma = spectrum if stated is None else stated
    alpha = weight_of_edges(method, sigma, grid)
    chi, facts = total_variation(
        field,
        mask,
        grid,
        alpha_ppm_mm=alpha,
        sigma_ppm=usual,
        weight=weight,
        edges=edges,
        iterations=method.iterations or ITERATIONS,
        done=done,
    )
    told = told_of_weights(alpha, spectrum, stated, grid) | asdict(facts)
    if dropped is not None:
        told["iterations"] = facts.iterations + HUBER_ITERATIONS
        told["outliers"] = float(dropped[mask].mean())
    return chi, told


def weight_of_edges(method: Method, sigma_ppm: float, geometry: Geometry) -> float:
    """Return alpha [ppm mm], by the noise of the field unless it was said.

    Raises
    ------
    DataError
        If the field has no noise at all.
    """
    alpha = method.alpha or alpha_of_noise(sigma_ppm, geometry)
    if not alpha > 0:
        raise DataError("the field is the same everywhere, so that no map can be told from it")
    return alpha


def told_of_weights(
    alpha_ppm_mm: float, spectrum_ppm: float, stated_ppm: float | None, geometry: Geometry
) -> dict[str, Any]:
    """Return what the report says of alpha and the noise that it is for."""
    sigma = spectrum_ppm if stated_ppm is None else stated_ppm
    return {
        "sigma_ppm": sigma,
        "sigma_from": "spectrum of the field" if stated_ppm is None else "noise map",
        "spectrum_sigma_ppm": spectrum_ppm,
        "alpha_ppm_mm": alpha_ppm_mm,
        "alpha_of_noise_ppm_mm": alpha_of_noise(sigma, geometry),
    }


def _weight_of_noise(noise_ppm: Volume, field_ppm: Volume, mask: Mask) -> tuple[Volume, float]:
    """Return trust in each voxel, none where no noise is stated, and the noise in the middle.

    Raises
    ------
    DataError
        If there is more noise than field.
    """
    sigma, deviation = float(np.median(noise_ppm[noise_ppm > 0])), float(field_ppm[mask].std())
    if sigma > deviation:
        raise DataError(
            f"the noise map's median is {sigma:.3g} ppm, but the field varies by {deviation:.3g} "
            "ppm only; pass the noise of the field in ppm, or its inverse, in any unit, with "
            "--magnitude"
        )
    weight = np.zeros_like(noise_ppm)
    least = np.float32(sigma / MOST_TRUST)
    np.divide(np.float32(sigma), np.maximum(noise_ppm, least), out=weight, where=noise_ppm > 0)
    return weight, sigma


def _b0_notes(scan: Scan) -> list[str]:
    """Return which fields show another direction of B0 than theirs: an axis, or another field's."""
    directions = [scan.geometry.b0_direction, *scan.more_b0_directions]
    notes = []
    for n, (field, stated) in enumerate(zip(scan.measured, directions, strict=True)):
        grid = replace(scan.geometry, b0_direction=stated)
        found = b0_contradicted(field, scan.mask, grid, [*directions, *AXES])
        if found is not None:
            which = f"field {n + 1}" if len(directions) > 1 else "the field"
            seen, said = (vector_text(scan.axes.inverse.vector(b0)) for b0 in (found, stated))
            notes.append(
                f"{which} looks as if B0 lay along {seen}, not along {said} (voxel axes): check "
                "the header, or pass --b0-direction"
            )
    return notes


def _notes(found: Mapping[str, Any], method: Method) -> list[str]:
    """Return what the user should know of a map that was made."""
    if found.get("unseen", 0) > MANY_UNSEEN:
        return [
            f"{found['unseen']:.0%} of all frequencies lie near the magic cone of every "
            "orientation: streaks stay; turn the head farther"
        ]
    if _far(found.get("sigma_ppm"), found.get("spectrum_sigma_ppm"), 30, 3):
        return [
            f"the noise map's median is {found['sigma_ppm']:.2g} ppm, the spectrum of the field "
            f"says {found['spectrum_sigma_ppm']:.2g}: is the map in ppm?"
        ]
    if _far(found.get("alpha_ppm_mm"), found.get("alpha_of_noise_ppm_mm"), 10, 10):
        return [
            f"alpha {found['alpha_ppm_mm']:g} ppm mm, where the noise of the field asks for "
            f"{found['alpha_of_noise_ppm_mm']:.2g}: more makes a map flat, less noisy"
        ]
    share = found.get("outliers", 0)
    said = f"{100 * share:.3g} % of the mask's voxels"
    if method.robust:
        return [f"{said} were dropped as outliers"] if share else []
    if share > MANY_OUTLIERS:
        return [
            f"{said} have a field that this map misses by more than ten times the noise, as wrong "
            "wraps or voxels without signal do: look at the field, or try --robust"
        ]
    return []


def _far(value: float | None, usual: float | None, below: float, above: float) -> bool:
    """Return whether a value is known and so many times less or more than usual."""
    if value is None or usual is None:
        return False
    return not usual / below <= value <= usual * above


def _variation_bytes(scan: Scan, method: Method) -> float:
    """Return what the state of the iteration takes; weights have a dual of their own."""
    weighted = method.robust or scan.magnitude is not None or scan.noise_ppm is not None
    return 50 + 8 * weighted + 12 * method.robust + 4 * (method.name == "medi")


def _ilsqr(scan: Scan, method: Method, done: Done) -> Solved:
    steps = method.iterations or ilsqr.ITERATIONS
    field, mask = scan.measured[0], scan.mask
    chi, fit = ilsqr.ilsqr(field, mask, scan.geometry, iterations=steps, done=done)
    return chi, asdict(fit)


def _cosmos(scan: Scan, method: Method, done: Done) -> Solved:
    """COSMOS; where a field is 0, it was not measured, since masks may differ."""
    directions = [scan.geometry.b0_direction, *scan.more_b0_directions]
    chi, fit = cosmos.cosmos(
        list(scan.measured),
        [scan.mask & (field != 0) for field in scan.measured],
        directions,
        scan.geometry,
        iterations=method.iterations or cosmos.ITERATIONS,
        done=done,
    )
    seen = cosmos.coverage(directions, scan.geometry)
    return chi, asdict(fit) | asdict(seen)


def _cosmos_bytes(scan: Scan, method: Method) -> float:
    return 33 + 4.5 * len(scan.measured)


def _closed_bytes(scan: Scan, method: Method) -> float:
    return TRANSFORM


TV = Runner(_variation, _variation_bytes, ITERATIONS)
RUNNERS: dict[str, Runner] = {
    "tv": TV,
    "medi": TV,
    "tkd": Runner(_closed(_tkd), _closed_bytes),
    "tikhonov": Runner(_closed(_tikhonov), _closed_bytes),
    "ilsqr": Runner(_ilsqr, lambda scan, method: 49, ilsqr.ITERATIONS, rounds=2),
    "cosmos": Runner(_cosmos, _cosmos_bytes, cosmos.ITERATIONS),
}
