"""Everything that needs a GPU, in one command: correctness, times, memory; one JSON file.

    python benchmarks/gpu_suite.py -o benchmarks/results/gpu_suite.json

Needs a GPU, PyTorch built for CUDA and nvcc; TensorRT, TensorRT for RTX and ONNX Runtime for CUDA
where they are. What cannot load is a row that says why. Nothing from outside the repository is
read. Without the package installed: ``PYTHONPATH=.dev``.

Times are of whole reconstructions with the field in host memory, by the wall clock, one contender
after the other; accuracy is against PyTorch in FP32 on the CPU, in the same row. After the minutes
that are given no row begins; the one that runs then goes on to its end.
"""

import importlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_cuda_dipole
import numpy as np
import onnx
import torch
from common import Row, parser, say, write
from torch_on_device import MODES, TorchDeviceSession

from qsm_deploy.export.bench.rounds import difference, spread
from qsm_deploy.export.checkpoints.state import load_state
from qsm_deploy.export.graph.onnx_export import onnx_from_module, with_card
from qsm_deploy.export.graph.reduced_precision import with_precision
from qsm_deploy.export.measure.memory_use import measure_memory
from qsm_deploy.export.measure.verification import ModuleSession, phantom_scan
from qsm_deploy.export.networks import ir2qsm, tkd_unet
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import network_spec
from qsm_deploy.export.write_network import provisional_card
from qsm_deploy.kernels.cuda_library import CudaLibrary, DipoleOperator
from qsm_deploy.kernels.geometry import Geometry, Volume, shape_text
from qsm_deploy.kernels.inversion.field_noise import alpha_of_noise, field_noise
from qsm_deploy.kernels.inversion.total_variation import total_variation
from qsm_deploy.runtime.card.card import MemoryUse, ModelCard, ReceptiveField
from qsm_deploy.runtime.console.stages import Stages
from qsm_deploy.runtime.embedding import Engine
from qsm_deploy.runtime.gpu.building.builder import build_plan
from qsm_deploy.runtime.gpu.building.choices import PlanChoices
from qsm_deploy.runtime.gpu.building.config import plan_target
from qsm_deploy.runtime.gpu.building.profile import profile_from
from qsm_deploy.runtime.gpu.cuda_device import CudaDevice
from qsm_deploy.runtime.gpu.device import Device, holding
from qsm_deploy.runtime.gpu.engines.inference import DeviceSession
from qsm_deploy.runtime.gpu.layout import DeviceWorkload
from qsm_deploy.runtime.gpu.open import open_device_session
from qsm_deploy.runtime.gpu.pipeline import Gpu
from qsm_deploy.runtime.gpu.reconstruction import network_job, reconstruct_on_device
from qsm_deploy.runtime.gpu.run import Place
from qsm_deploy.runtime.gpu.session import GpuSession
from qsm_deploy.runtime.gpu.total_variation import VariationWorkload, variation_job
from qsm_deploy.runtime.reconstruction.correction import AUTO, Correction
from qsm_deploy.runtime.reconstruction.patches import PatchPlan, plan_patches, plan_whole
from qsm_deploy.runtime.reconstruction.pipeline import reconstruct
from qsm_deploy.runtime.reconstructor import reconstructor_of
from qsm_deploy.runtime.scan.scan import Scan

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "export" / "weights"
MINUTES = 8.0
HEAD = (96, 112, 88)
SIZES = ((160, 192, 160), (256, 256, 160))
FULL_WIDTHS = (16, 32, 64, 128)
REPEATS = 7
KERNEL_TEST_SECONDS = 240
SEEN = re.compile(r"(\d+) (passed|failed|skipped|error)")
OpenEngine = Callable[[], DeviceSession]


class Suite:
    """Rows as they come, each written at once; what fails is a row too."""

    def __init__(self, output: Path | None, minutes: float) -> None:
        self.output, self.ends = output, time.monotonic() + 60 * minutes
        self.facts: Row = {}
        self.rows: list[Row] = []

    def row(self, section: str, name: str, measure: Callable[[], Row]) -> None:
        """Measure one thing, unless the time is over."""
        facts: Row = {"section": section, "name": name}
        began = time.monotonic()
        if began > self.ends:
            facts |= {"ok": False, "why": "the time was over"}
        else:
            try:
                facts |= {"ok": True} | measure()
            except Exception as error:  # whatever it is, the other rows must come
                reason = (str(error).strip() or "no reason").splitlines()[0]
                facts |= {"ok": False, "why": f"{type(error).__name__}: {reason}"[:400]}
        facts["took_seconds"] = round(time.monotonic() - began, 2)
        self.rows.append(say(facts))
        self.write()

    def write(self) -> None:
        """Write what there is so far."""
        write(self.output, self.rows, **self.facts)


class WatchedDevice(CudaDevice):
    """A GPU that notes how little of its memory was ever free."""

    least_free = 2**63

    def allocate(self, size: int) -> int:
        """Return a pointer to ``size`` bytes."""
        pointer = super().allocate(size)
        self._look()
        return pointer

    def synchronize(self) -> None:
        """Wait on the host; what the libraries took for themselves they keep until then."""
        super().synchronize()
        self._look()

    def _look(self) -> None:
        self.least_free = min(self.least_free, self.free_bytes())


class Networks:
    """The networks that are measured: bundled ones, and IR2QSM in full width, weights random."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        choices = Choices({"residual": "input"})
        torch.manual_seed(0)
        bundled = load_state(WEIGHTS / "ir2qsm-demo.safetensors")
        self.modules: dict[str, Network] = {
            "tkd-unet": tkd_unet.network_from_state(
                load_state(WEIGHTS / "tkd-unet.safetensors"), Choices()
            ),
            "ir2qsm demo": ir2qsm.network_from_state(bundled, choices),
            "ir2qsm": ir2qsm.IR2QSM(channels=FULL_WIDTHS).eval(),
        }
        self.graphs: dict[str, onnx.ModelProto] = {}
        self.memory: dict[str, MemoryUse] = {}
        self.maps: dict[tuple[str, str, tuple[int, ...]], Volume] = {}
        self.choices = {name: choices if "ir2qsm" in name else Choices() for name in self.modules}

    def card(self, name: str, precision: Any = "fp32") -> ModelCard:
        """Return the card of a network, as it is before anything is measured."""
        spec = network_spec(name.split()[0])
        card = provisional_card(spec, self.modules[name], self.choices[name], "none", "0" * 64)
        return replace(card, precision=precision, receptive_field=ReceptiveField(32, 32, 1.0))

    def reference(
        self, name: str, scan: Scan, way: str, plan: PatchPlan, step: Correction | None = None
    ) -> Volume:
        """Return PyTorch's map on the CPU in FP32, made once; a step starts from the whole one."""
        key = (name, way, scan.mask.shape)
        if key not in self.maps:
            if step is None:
                session = ModuleSession(self.modules[name], self.card(name))
                chi = reconstruct(session, scan, plan, Stages())
            else:
                before = self.reference(name, scan, "whole", plan)
                chi, _ = step.apply(before.copy(), scan, Stages())
            self.maps[key] = chi
        return self.maps[key]

    def engine(self, name: str, library: str, precision: Any) -> DeviceSession:
        """Write a network for a library, and load it on the GPU."""
        if library != "onnxruntime-cuda":  # which says at once whether it is there
            choices = PlanChoices(library)  # type: ignore[arg-type]
            built_for = plan_target(choices).options()
        if name not in self.graphs:
            self.graphs[name] = onnx_from_module(self.modules[name])
        model = self.graphs[name]
        if precision != "fp32":
            model = with_precision(model, precision)
        card = self.card(name, precision)
        stem = f"{name.replace(' ', '-')}-{library}-{precision}"
        if library == "onnxruntime-cuda":
            path = self.folder / f"{stem}.onnx"
            path.write_bytes(with_card(model, card))
            if name not in self.memory:
                open_device_session(path).close()  # or measuring would be for nothing
                self.memory[name] = measure_memory(path, "onnxruntime")
            card = replace(card, memory={"onnxruntime": self.memory[name]})
            path.write_bytes(with_card(model, card))
        else:
            profile = profile_from("16,160,256", card.divisor, patchable=True)
            options = card.options | built_for | {"shapes": str(profile)}
            card = replace(card, options=options)
            path = self.folder / f"{stem}.plan"
            path.write_bytes(build_plan(model.SerializeToString(), card, profile, choices).data)
        return open_device_session(path)


def kernel_tests() -> Row:
    """Run the tests of the kernels; those with a GPU are skipped where it cannot be used."""
    files = [str(path) for path in sorted(ROOT.glob("tests/kernels/test_cuda_*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu", *files]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=KERNEL_TEST_SECONDS
    )
    counts = {what: int(n) for n, what in SEEN.findall(run.stdout)}
    if run.returncode or not counts.get("passed"):
        last = (run.stdout + run.stderr).strip().splitlines()[-1:]
        raise RuntimeError(f"pytest ended with {run.returncode}: {counts or last}")
    return counts


def on_gpu(
    gpu: Gpu, scan: Scan, plan: PatchPlan, correction: Correction | None = None
) -> tuple[Volume, Stages]:
    """Return a map made on the GPU, and what each stage took there."""
    work = DeviceWorkload(scan, gpu.session, gpu.library, correction, evaluates=False)
    stages = Stages()
    chi, _ = reconstruct_on_device(network_job(gpu, work, plan), stages)
    return chi, stages


def session_row(
    device: WatchedDevice, library: CudaLibrary, networks: Networks, name: str, open_it: OpenEngine
) -> Row:
    """Compare the pipeline on the GPU with that on the CPU: whole, patched, made consistent."""
    card = networks.card(name)
    scan = phantom_scan(card, HEAD)
    with closing(open_it()) as session:
        gpu = Gpu(device, library, session)
        facts: Row = {"library": f"{session.backend} {session.version}"}
        for way, plan, step in (
            ("whole", plan_whole(HEAD, card.divisor), None),
            ("patches", plan_patches(scan.mask, card.divisor, 64, 32, "hann"), None),
            ("closed form", plan_whole(HEAD, card.divisor), Correction(0.05)),
            ("conjugate gradients", plan_whole(HEAD, card.divisor), AUTO),
        ):
            chi, _ = on_gpu(gpu, scan, plan, step)
            expected = networks.reference(name, scan, way, plan, step)
            facts[way] = difference(chi, expected, scan.mask)
            again, _ = on_gpu(gpu, scan, plan, step)
            facts[way]["repeats_exactly"] = bool((chi == again).all())
    return facts


def graph_row(device: Device, library: CudaLibrary) -> Row:
    """Compare the operator launched as a graph with the same called directly."""
    operator = DipoleOperator(Geometry((48, 40, 33)), "tkd")
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


def embedding_row(device: Device, library: CudaLibrary, networks: Networks, other: str) -> Row:
    """Take the field and the mask from another library's side stream, and give it the map."""
    scan = phantom_scan(networks.card("tkd-unet"), HEAD)
    plan = plan_whole(HEAD, networks.card("tkd-unet").divisor)
    grid = scan.geometry
    with closing(torch_session(networks, "tkd-unet", "fp32")) as session:
        gpu = GpuSession(Gpu(device, library, session))
        engine = Engine(reconstructor_of(gpu, Path("tkd-unet")))
        made = partial(
            engine.reconstruct,
            voxel_size_mm=grid.voxel_size_mm,
            b0_direction=grid.b0_direction,
        )
        if other == "torch":
            with torch.cuda.stream(torch.cuda.Stream()):
                field = torch.from_numpy(scan.measured[0]).cuda()
                mask = torch.from_numpy(scan.mask).cuda()
                chi = torch.from_dlpack(made(field, mask)).cpu().numpy()
        else:
            cupy = importlib.import_module(other)
            with cupy.cuda.Stream(non_blocking=True):
                taken = cupy.asarray(scan.measured[0]), cupy.asarray(scan.mask)
                chi = cupy.asnumpy(cupy.asarray(made(*taken)))
    return difference(chi, networks.reference("tkd-unet", scan, "whole", plan), scan.mask)


def variation_row(device: WatchedDevice, library: CudaLibrary, scan: Scan) -> Row:
    """Compare total variation with the CPU's, and its time with that of its transforms alone."""
    field, mask, grid = scan.measured[0], scan.mask, scan.geometry
    sigma = field_noise(field, mask, grid)
    weights = {"alpha_ppm_mm": alpha_of_noise(sigma, grid), "sigma_ppm": sigma}
    began = time.perf_counter()
    expected, facts = total_variation(field, mask, grid, **weights)
    on_cpu = time.perf_counter() - began
    work = VariationWorkload(scan, library)
    job = variation_job(Place(device, library), work, **weights)
    torch.cuda.empty_cache()
    free = device.least_free = device.free_bytes()
    chi, found = reconstruct_on_device(job, Stages())
    peak = free - device.least_free
    buffers = bench_cuda_dipole.Buffers(library, DipoleOperator(work.grid.geometry), "cuda")
    pair = bench_cuda_dipole.bare_pair(buffers)
    pairs = 2 * work.iterations + 2  # those of the start too
    seconds, kernels, floor = [], [], []
    for _ in range(REPEATS):
        stages, began = Stages(), time.perf_counter()
        again, _ = reconstruct_on_device(job, stages)
        seconds.append(time.perf_counter() - began)
        kernels.append(stages.seconds["inversion"])
        floor.append(bench_cuda_dipole.milliseconds(lambda: [pair() for _ in range(pairs)]) / 1000)
    return {
        "shape": list(mask.shape),
        "padded_shape": list(facts.padded_shape),
        "seconds": spread(seconds),
        "inversion_seconds": spread(kernels),
        "bare_pairs": pairs,
        "bare_pairs_seconds": spread(floor),
        "over_bare_pairs": round(statistics.median(kernels) / statistics.median(floor), 3),
        "cpu_seconds": round(on_cpu, 3),
        "predicted_bytes": max(work.allocated_bytes(job.plan).values()),
        "peak_bytes": peak,
        "relative_error_to_cpu": float(np.linalg.norm(chi - expected) / np.linalg.norm(expected)),
        "accuracy": difference(chi, expected, mask),
        "repeats_exactly": bool((chi == again).all()),
        "found": found,
    }


def times_row(gpu: Gpu, networks: Networks, scan: Scan, precision: str) -> Row:
    """Time whole reconstructions from host memory to host memory, and predict their memory."""
    plan = plan_whole(scan.mask.shape, networks.card("ir2qsm").divisor)
    work = DeviceWorkload(scan, gpu.session, gpu.library, None, evaluates=False)
    predicted = max(work.peak_bytes(plan).values())
    assert isinstance(gpu.device, WatchedDevice)
    free = gpu.device.least_free = gpu.device.free_bytes()
    chi, _ = on_gpu(gpu, scan, plan)
    reference = networks.reference("ir2qsm", scan, "whole", plan)
    peak = free - gpu.device.least_free + gpu.session.weights_bytes
    seconds, stages = [], {}
    for _ in range(REPEATS):
        began = time.perf_counter()
        _, seen = on_gpu(gpu, scan, plan)
        seconds.append(time.perf_counter() - began)
        stages = seen.seconds
    return {
        "library": f"{gpu.session.backend} {gpu.session.version}",
        "precision": precision,
        "shape": list(scan.mask.shape),
        "seconds": spread(seconds),
        "stages": {name: round(s, 5) for name, s in stages.items()},
        "predicted_bytes": round(predicted),
        "peak_bytes": peak,
        "accuracy": difference(chi, reference, scan.mask),
    }


def torch_row(networks: Networks, scan: Scan, mode: str) -> Row:
    """Time PyTorch as a user would call it: copy in, run, copy out."""
    plan = plan_whole(scan.mask.shape, networks.card("ir2qsm").divisor)
    reference = networks.reference("ir2qsm", scan, "whole", plan)
    session = TorchDeviceSession(networks.modules["ir2qsm"], networks.card("ir2qsm"), mode)
    field = torch.from_numpy(scan.measured[None])

    def run() -> torch.Tensor:
        output = session.run([field.cuda()])[0, 0].cpu()
        torch.cuda.synchronize()
        return output

    torch.cuda.reset_peak_memory_stats()
    chi = run().numpy() * scan.mask
    run()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated()
    session.close()
    return {
        "library": session.version,
        "precision": mode,
        "shape": list(scan.mask.shape),
        "seconds": spread(seconds),
        "peak_bytes": peak,
        "accuracy": difference(chi, reference, scan.mask),
    }


def engines(networks: Networks, name: str) -> dict[str, OpenEngine]:
    """Return what opens a network in every library and precision, PyTorch first."""
    found: dict[str, OpenEngine] = {
        f"PyTorch {mode}": partial(torch_session, networks, name, mode) for mode in MODES[:3]
    }
    for library in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda"):
        for precision in ("fp32", "fp16"):
            label = f"{library} {precision}"
            found[label] = partial(networks.engine, name, library, precision)
    return found


def torch_session(networks: Networks, name: str, mode: str) -> DeviceSession:
    """Return PyTorch as an engine."""
    return TorchDeviceSession(networks.modules[name], networks.card(name), mode)


def measure(suite: Suite, folder: Path) -> None:
    """Measure everything."""
    library = bench_cuda_dipole.open_on_gpu(folder)
    suite.facts["gpu"] = bench_cuda_dipole.hardware(library)
    device = WatchedDevice(0)
    networks = Networks(folder)
    suite.row("kernels", "tests on the GPU", kernel_tests)
    suite.row("operator", "accuracy", lambda: {"rows": bench_cuda_dipole.check(library, "cuda")})
    for shape in bench_cuda_dipole.TIMED:
        row = partial(bench_cuda_dipole.measure, library, shape, 50)
        suite.row("operator", shape_text(shape), row)
    suite.row("graphs", "the operator", partial(graph_row, device, library))
    for other in ("torch", "cupy"):
        row = partial(embedding_row, device, library, networks, other)
        suite.row("embedding", other, row)
    for shape in (HEAD, *SIZES):
        scan = phantom_scan(networks.card("tkd-unet"), shape)
        suite.row("variation", shape_text(shape), partial(variation_row, device, library, scan))
    for name in ("tkd-unet", "ir2qsm demo"):
        for label, open_it in engines(networks, name).items():
            row = partial(session_row, device, library, networks, name, open_it)
            suite.row("sessions", f"{name}, {label}", row)
    for shape in SIZES:
        scan = phantom_scan(networks.card("ir2qsm"), shape)
        size = shape_text(shape)
        for mode in MODES:
            row = partial(torch_row, networks, scan, mode)
            suite.row("times", f"ir2qsm {size}, PyTorch {mode} as users call it", row)
        for label, open_it in engines(networks, "ir2qsm").items():

            def timed(label: str = label, open_it: OpenEngine = open_it) -> Row:
                with closing(open_it()) as session:
                    gpu = Gpu(device, library, session)
                    return times_row(gpu, networks, scan, label.split()[-1])  # noqa: B023

            suite.row("times", f"ir2qsm {size}, {label} in the pipeline", timed)


def main() -> None:
    """Measure, print and write."""
    p = parser(__doc__)
    p.add_argument("--minutes", type=float, default=MINUTES)
    args = p.parse_args()
    suite = Suite(args.output, args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        measure(suite, Path(folder))
    suite.write()


if __name__ == "__main__":
    main()
