"""The pipeline around an engine: equal to the CPU's, graphs, foreign arrays, times."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Row
from benchmarks.gpu.machine import Machine, Shape
from benchmarks.gpu.networks import Networks
from benchmarks.gpu.torch_session import COMPILED, MODES
from qsm_deploy.export.bench.rounds import difference, spread
from qsm_deploy.kernels.cuda_library import DipoleOperator
from qsm_deploy.kernels.geometry import Geometry, shape_text
from qsm_deploy.runtime.embedding import Engine
from qsm_deploy.runtime.gpu.device import holding
from qsm_deploy.runtime.gpu.engines.inference import DeviceSession
from qsm_deploy.runtime.gpu.layout import DeviceWorkload
from qsm_deploy.runtime.gpu.pipeline import Gpu
from qsm_deploy.runtime.gpu.session import GpuSession
from qsm_deploy.runtime.reconstruction.correction import AUTO, Correction
from qsm_deploy.runtime.reconstruction.patches import plan_patches
from qsm_deploy.runtime.reconstructor import reconstructor_of

Rows = Iterator[tuple[str, Callable[[], Row]]]
OpenEngine = Callable[[], DeviceSession]


def rows(machine: Machine, networks: Networks) -> Rows:
    """Yield what is measured with PyTorch as the engine."""
    yield "a CUDA graph of the operator", partial(graph_row, machine)
    for other in ("torch", "cupy"):
        yield f"embedding from {other}", partial(embedding_row, networks, other)
    for name in machine.scale.compared:
        for mode in MODES:
            opened = partial(networks.torch_session, name, mode)
            yield f"{name}, PyTorch {mode}", partial(maps_row, networks, name, opened)
    yield in_the_pipeline(networks, "tv-unet", machine.scale.sizes[0], "fp32")
    for shape in machine.scale.sizes:
        for mode in MODES:
            yield from as_users_call_it(networks, shape, mode)
            yield in_the_pipeline(networks, "ir2qsm", shape, mode)


def compiled_rows(machine: Machine, networks: Networks) -> Rows:
    """Yield what takes PyTorch a minute to compile."""
    for shape in machine.scale.sizes:
        yield from as_users_call_it(networks, shape, COMPILED)


def as_users_call_it(networks: Networks, shape: Shape, mode: str) -> Rows:
    """Yield PyTorch without the pipeline."""
    name = f"times of ir2qsm {shape_text(shape)}, PyTorch {mode} as users call it"
    yield name, partial(torch_row, networks, shape, mode)


def in_the_pipeline(
    networks: Networks, name: str, shape: Shape, mode: str
) -> tuple[str, Callable[[], Row]]:
    """Return what times PyTorch as the engine."""
    opened = partial(networks.torch_session, name, mode)
    row = f"times of {name} {shape_text(shape)}, PyTorch {mode} in the pipeline"
    return row, partial(times_row, networks, name, shape, opened)


def timed(step: Callable[[], Any], repeats: int) -> tuple[Any, Row]:
    """Return what a step gives, and its times."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = step()
        seconds.append(time.perf_counter() - began)
    return result, spread(seconds)


def graph_row(machine: Machine) -> Row:
    """Compare the operator launched as a graph with the same called directly."""
    device, library = machine.device, machine.library
    operator = DipoleOperator(Geometry((12, 10, 9)), "tkd")
    x = np.random.default_rng(0).standard_normal(operator.geometry.shape, dtype=np.float32)
    needed = library.dipole_workspace_bytes(operator)
    given, *seen = (device.pinned(x.shape, x.dtype) for _ in range(3))
    np.copyto(given, x)
    with holding(device) as held:
        stream = held.stream()
        source, direct, launched = (held.buffer(x.nbytes) for _ in range(3))
        workspace = held.buffer(needed)

        def apply(to: int) -> None:
            library.dipole_apply(operator, source, to, workspace, needed, stream)

        device.copy_in(source, given, stream)
        apply(direct)
        device.zero(launched, x.nbytes, stream)
        graph = held.graph(stream, lambda: apply(launched))
        for _ in range(2):
            device.launch(graph, stream)
        for result, pointer in zip(seen, (direct, launched), strict=True):
            device.copy_out(result, pointer, stream)
        device.synchronize()
    return {"equal": bool((seen[0] == seen[1]).all()), "finite": bool(np.isfinite(seen[0]).all())}


def embedding_row(networks: Networks, other: str) -> Row:
    """Take the field and the mask from another library's side stream, and give it the map."""
    machine, name = networks.machine, "tv-unet"
    scan = networks.scan(machine.scale.head)
    grid = {k: getattr(scan.geometry, k) for k in ("voxel_size_mm", "b0_direction")}
    with (
        closing(networks.torch_session(name, "fp32")) as session,
        machine.lent(other, scan.measured[0], scan.mask) as (taken, back),
    ):
        gpu = GpuSession(Gpu(machine.device, machine.library, session))
        engine = Engine(reconstructor_of(gpu, Path(name)))
        chi = back(engine.reconstruct(*taken, **grid))
    expected = networks.cpu_map(name, scan, "whole", networks.whole(name, scan))
    return difference(chi, expected, scan.mask)


def maps_row(networks: Networks, name: str, open_it: OpenEngine) -> Row:
    """Compare the pipeline on the GPU with that on the CPU: whole, patched, made consistent."""
    scale = networks.machine.scale
    scan = networks.scan(scale.head)
    divisor, whole = networks.card(name).divisor, networks.whole(name, scan)
    patches = plan_patches(scan.mask, divisor, scale.patch, scale.overlap, "hann")
    began = time.perf_counter()
    with closing(open_it()) as session:
        facts: Row = {"version": session.version}
        facts["opened_in_seconds"] = round(time.perf_counter() - began, 2)
        for way, plan, step in (
            ("whole", whole, None),
            ("patches", patches, None),
            ("closed form", whole, Correction(0.05)),
            ("conjugate gradients", whole, replace(AUTO, **scale.iterations)),
        ):
            chi, _ = networks.on_gpu(session, scan, plan, step)
            expected = networks.cpu_map(name, scan, way, plan, step)
            facts[way] = difference(chi, expected, scan.mask)
            again, _ = networks.on_gpu(session, scan, plan, step)
            facts[way]["repeats_exactly"] = bool((chi == again).all())
    return facts


def times_row(networks: Networks, name: str, shape: Shape, open_it: OpenEngine) -> Row:
    """Time whole reconstructions from host memory to host memory, and predict their memory."""
    machine, scan = networks.machine, networks.scan(shape)
    plan, device = networks.whole(name, scan), machine.device
    reference = networks.gpu_map(name, scan)
    with closing(open_it()) as session:
        work = DeviceWorkload(scan, session, machine.library, None, evaluates=False)
        predicted = max(work.peak_bytes(plan).values())
        free = device.least_free = device.free_bytes()
        chi, _ = networks.on_gpu(session, scan, plan)
        peak = free - device.least_free + session.weights_bytes
        again = partial(networks.on_gpu, session, scan, plan)
        (_, stages), seconds = timed(again, machine.scale.repeats)
        return {
            "version": session.version,
            "shape": list(shape),
            "seconds": seconds,
            "stages": {stage: round(s, 5) for stage, s in stages.seconds.items()},
            "predicted_bytes": round(predicted),
            "peak_bytes": peak,
            "to_fp32_on_the_gpu": difference(chi, reference, scan.mask),
        }


def torch_row(networks: Networks, shape: Shape, mode: str) -> Row:
    """Time PyTorch as a user would call it: copy in, run, copy out."""
    machine, scan = networks.machine, networks.scan(shape)
    reference = networks.gpu_map("ir2qsm", scan)
    field = torch.from_numpy(scan.measured[None])
    with closing(networks.torch_session("ir2qsm", mode)) as session:

        def run() -> torch.Tensor:
            return session.run([field.to(machine.torch_device)])[0, 0].cpu()

        peak = machine.torch_peak_bytes(run)
        chi, seconds = timed(run, machine.scale.repeats)
        return {
            "version": session.version,
            "shape": list(shape),
            "seconds": seconds,
            "peak_bytes": peak,
            "to_fp32_on_the_gpu": difference(chi.numpy() * scan.mask, reference, scan.mask),
        }
