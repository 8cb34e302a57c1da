"""The kernels and what iterates on them: right, then how fast."""

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.common import Row
from benchmarks.gpu import dipole
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.networks import ROOT, Networks
from benchmarks.gpu.pipeline import Rows, timed
from qsm_deploy.export.bench.rounds import difference, spread
from qsm_deploy.kernels.cuda_library import LIBRARY_VARIABLE, DipoleOperator
from qsm_deploy.kernels.geometry import Volume, shape_text
from qsm_deploy.kernels.inversion.field_noise import alpha_of_noise, field_noise
from qsm_deploy.kernels.inversion.total_variation import total_variation
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.gpu.reconstruction import reconstruct_on_device
from qsm_deploy.runtime.gpu.run import Place
from qsm_deploy.runtime.gpu.total_variation import VariationWorkload, variation_job
from qsm_deploy.runtime.gpu.two_prior import TwoPriorOnGpu
from qsm_deploy.runtime.local_field.background.removal import Task
from qsm_deploy.runtime.local_field.background.two_prior import TwoPrior
from qsm_deploy.runtime.scan.scan import Scan

SEEN = re.compile(r"(\d+) (passed|failed|skipped|error)")
BACKGROUND_PPM = 0.5
REPEATS = 3  # of what the host has a large part in


def rows(machine: Machine, networks: Networks) -> Rows:
    """Yield what is right first, then times."""
    yield "build", partial(build_row, machine)
    yield "tests on the GPU", partial(tests_row, machine)
    yield "accuracy of the operator", partial(dipole.accuracy_row, machine)
    for shape in (machine.scale.head, *machine.scale.sizes[:1]):
        size, scan = shape_text(shape), partial(networks.scan, shape)
        yield f"total variation {size}", partial(variation_row, machine, scan)
        yield f"two-prior background removal {size}", partial(background_row, machine, scan)
        if shape == machine.scale.head:
            for grid in machine.scale.transforms:
                yield f"operator {shape_text(grid)}", partial(dipole.times_row, machine, grid)


def build_row(machine: Machine) -> Row:
    """Build the kernels for this GPU, and find it usable."""
    machine.library.require_gpu()
    return machine.library.versions()


def tests_row(machine: Machine) -> Row:
    """Run the tests of the kernels; those with a GPU are skipped where it cannot be used."""
    files = [str(path) for path in sorted(ROOT.glob("tests/kernels/test_cuda_*.py"))]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", machine.scale.tests, *files],
        cwd=ROOT,
        env=os.environ | {LIBRARY_VARIABLE: str(machine.library_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    counts = {what: int(n) for n, what in SEEN.findall(run.stdout)}
    if run.returncode or not counts.get("passed"):
        last = (run.stdout + run.stderr).strip().splitlines()[-1:]
        raise RuntimeError(f"pytest ended with {run.returncode}: {counts or last}")
    return counts


def compared(machine: Machine, on_gpu: Callable[[], Volume], on_cpu: Callable[[], Volume]) -> Row:
    """Return times of both, and how much the volumes differ."""
    expected, on_cpu_seconds = timed(on_cpu, 1)
    first = on_gpu()
    volume, seconds = timed(on_gpu, min(REPEATS, machine.scale.repeats))
    return {
        "seconds": seconds,
        "cpu_seconds": on_cpu_seconds["median"],
        "relative_difference": float(np.linalg.norm(volume - expected) / np.linalg.norm(expected)),
        "repeats_exactly": bool((volume == first).all()),
    }


def variation_row(machine: Machine, make_scan: Callable[[], Scan]) -> Row:
    """Compare total variation with the CPU's, and its time with that of its transforms alone."""
    scan, more = make_scan(), machine.scale.iterations
    field, mask, grid = scan.measured[0], scan.mask, scan.geometry
    sigma = field_noise(field, mask, grid)
    weights = {"alpha_ppm_mm": alpha_of_noise(sigma, grid), "sigma_ppm": sigma}
    work = VariationWorkload(scan, machine.library, **more)
    job = variation_job(Place(machine.device, machine.library), work, **weights)
    torch.cuda.empty_cache()
    free = machine.device.least_free = machine.device.free_bytes()
    kernels: list[float] = []
    found: Row = {}

    def on_gpu() -> Volume:
        stages = Stages()
        chi, facts = reconstruct_on_device(job, stages)
        kernels.append(stages.seconds["inversion"])
        found.update(facts)
        return chi

    row = compared(
        machine, on_gpu, lambda: total_variation(field, mask, grid, **weights, **more)[0]
    )
    peak = free - machine.device.least_free
    pair = machine.bare_pair(dipole.Buffers(machine, DipoleOperator(work.grid.geometry)).x)
    pairs = 2 * work.iterations + 2  # those of the start too
    floor = [
        machine.milliseconds(lambda: [pair() for _ in range(pairs)]) / 1000
        for _ in range(machine.scale.repeats)
    ]
    return row | {
        "inversion_seconds": spread(kernels),
        "bare_pairs": pairs,
        "bare_pairs_seconds": spread(floor),
        "over_bare_pairs": round(statistics.median(kernels) / statistics.median(floor), 3),
        "predicted_bytes": max(work.allocated_bytes(job.plan).values()),
        "peak_bytes": peak,
        "found": found,
    }


def background_row(machine: Machine, make_scan: Callable[[], Scan]) -> Row:
    """Compare background removal with the CPU's, at its first iteration and at its last.

    Between these two, rounding that conjugate gradients multiply sets any two machines apart; how
    far each is then from the local field itself says whether that matters.
    """
    scan = make_scan()
    field, mask = scan.measured[0], scan.mask
    x, y, _ = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in mask.shape)]
    total = ((field + BACKGROUND_PPM * (x**2 - y**2)) * mask).astype(np.float32)
    task = Task(total, mask, mask, scan.geometry)
    place, row = Place(machine.device, machine.library), {}
    for name, method in (
        ("one iteration", TwoPrior(iterations=1)),
        ("all iterations", TwoPrior(**machine.scale.iterations)),
    ):
        remove = TwoPriorOnGpu(place, method)
        seen: dict[str, Volume] = {}

        def kept(where: str, method: TwoPrior, seen: dict[str, Volume] = seen) -> Volume:
            seen[where], _ = method(task)
            return seen[where]

        row[name] = compared(machine, partial(kept, "gpu", remove), partial(kept, "cpu", method))
        row[name]["to_the_truth"] = {
            where: difference(local, field, mask) for where, local in seen.items()
        }
    return row
