"""What Triton adds to a reconstruction: a call in the process and calls of a server, in turns.

    make .triton/.ready && .triton/bin/python benchmarks/bench_triton.py .triton/*.whl \
        -o benchmarks/results/triton.json

The environment has the ``numpy<2`` that the server needs, and the calls in this process use it too.
A round trip begins with arrays and ends with one.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from common import parser, say, write
from triton_server import Server, inputs_of, started
from tritonclient.utils import shared_memory

import qsm_deploy.runtime as qsm
from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.export.bench.machine import version
from qsm_deploy.export.triton.repository import write_repository
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.methods.method import Method
from qsm_deploy.runtime.sessions.bundled import BUNDLED_MODEL

METHODS = ("tv-unet", "tkd")  # the second takes little itself
SHAPE = (96, 96, 96)
VOLUMES = ("FIELD_PPM", "MASK")
Call = Callable[[], Any]


@contextmanager
def over_shared_memory(
    server: Server, name: str, tensors: dict[str, Any], like: Any
) -> Iterator[Call]:
    """Give a call whose volumes go both ways in memory that client and server share."""
    kind = tritonclient.grpc
    with ExitStack() as stack, server.client(kind) as client:

        def region(tensor: str, size: int) -> Any:
            key = f"/qsm_{os.getpid()}_{tensor}"
            made = shared_memory.create_shared_memory_region(tensor, key, size)
            stack.callback(shared_memory.destroy_shared_memory_region, made)
            client.register_system_shared_memory(tensor, key, size)
            return made

        regions = {tensor: region(tensor, tensors[tensor].nbytes) for tensor in VOLUMES}
        answer = region("CHI_PPM", like.nbytes)
        output = kind.InferRequestedOutput("CHI_PPM")
        output.set_shared_memory("CHI_PPM", like.nbytes)

        def call() -> Any:
            inputs = inputs_of(kind, tensors)
            for one in inputs:
                if one.name() in regions:
                    array = tensors[one.name()]
                    shared_memory.set_shared_memory_region(regions[one.name()], [array])
                    one.set_shared_memory(one.name(), array.nbytes)
            client.infer(name, inputs, outputs=[output])
            return shared_memory.get_contents_as_numpy(answer, like.dtype, like.shape)

        yield call
        client.unregister_system_shared_memory()


@contextmanager
def over(server: Server, kind: Any, name: str, tensors: dict[str, Any]) -> Iterator[Call]:
    """Give a call over HTTP or gRPC, with binary tensors."""
    with server.client(kind) as client:
        yield lambda: client.infer(name, inputs_of(kind, tensors)).as_numpy("CHI_PPM")


def in_turns(calls: dict[str, Call], like: Any, repeats: int) -> list[dict[str, Any]]:
    """Return the times of each way, after one call to warm up, and how far its map is off."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    off = dict.fromkeys(calls, 0.0)
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            made = call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
            off[name] = max(off[name], float(np.abs(made - like).max()))
    own = seconds["in this process"]
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, own, strict=True)]
        row = {
            "way": name,
            "median_s": round(statistics.median(times), 3),
            "min_max_s": [round(min(times), 3), round(max(times), 3)],
            "median_of_ratios": round(statistics.median(ratios), 3),
            "most_off_ppm": off[name],
        }
        rows.append(row)
    return rows


def measured(
    server: Server, method: str, tensors: dict[str, Any], repeats: int
) -> list[dict[str, Any]]:
    """Return a row for each way to call a method, or bundled network."""
    name = f"qsm_{method.replace('-', '_')}"
    said = {tensor.lower(): array for tensor, array in tensors.items()}
    model = qsm.open_model(method=method, device="cpu")
    like = model.reconstruct(**said)
    with ExitStack() as stack:
        calls: dict[str, Call] = {
            "in this process": lambda: model.reconstruct(**said),
            "gRPC": stack.enter_context(over(server, tritonclient.grpc, name, tensors)),
            "gRPC and shared memory": stack.enter_context(
                over_shared_memory(server, name, tensors, like)
            ),
            "HTTP": stack.enter_context(over(server, tritonclient.http, name, tensors)),
        }
        rows = in_turns(calls, like, repeats)
    status = Path(f"/proc/{server.stub(name)}/status").read_text()
    peak_mb = round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)
    return [say({"method": method, **row, "instance_peak_mb": peak_mb}) for row in rows]


def main() -> None:
    """Measure, print and write."""
    p = parser(__doc__, repeats=11)
    p.add_argument("wheel", type=Path, help="of nvidia-pytriton")
    args = p.parse_args()
    head = head_phantom(Geometry(SHAPE), seed=1)
    tensors = {
        "FIELD_PPM": head.local_field_ppm,
        "MASK": head.mask.astype(np.uint8),
        "VOXEL_SIZE_MM": np.ones(3),
        "B0_DIRECTION": np.array([0.0, 0.0, 1.0]),
    }
    load = os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        place = Path(name)
        write_repository(place / "serve", [BUNDLED_MODEL], force=False)
        write_repository(place / "serve", Method("tkd"), force=True)
        began = time.perf_counter()
        server = stack.enter_context(started(args.wheel, place / "serve", place))
        ready_s = time.perf_counter() - began
        for method in METHODS:
            rows += measured(server, method, tensors, args.repeats)
    write(
        args.output,
        rows,
        load_before=round(load, 2),
        server=args.wheel.name,
        tritonclient=version("tritonclient"),
        shape=SHAPE,
        repeats=args.repeats,
        unpacked_and_ready_s=round(ready_s, 1),
    )


if __name__ == "__main__":
    main()
