"""A Triton of the wheel nvidia-pytriton that serves a repository of ours, for a while."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {"float32": "FP32", "float64": "FP64", "uint8": "UINT8"}
READY_S = 120


@dataclass
class Server:
    """A Triton that runs: its process, the folder that it serves, and its ports."""

    pid: int
    folder: Path
    http: int
    grpc: int
    metrics: int

    @contextlib.contextmanager
    def client(self, kind: Any) -> Iterator[Any]:
        """Connect by ``tritonclient.http`` or ``tritonclient.grpc``."""
        port = self.http if kind.__name__.endswith("http") else self.grpc
        with kind.InferenceServerClient(f"127.0.0.1:{port}") as found:
            yield found

    def get(self, path: str) -> str:
        """Return what is at ``PORT/PATH``."""
        with urllib.request.urlopen(f"http://127.0.0.1:{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def stub(self, model: str) -> int:
        """Return the process that serves a model."""
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                ours = f"\nPPid:\t{self.pid}\n" in status.read_text()
                if ours and f"/{model}/".encode() in status.with_name("cmdline").read_bytes():
                    return int(status.parent.name)
        raise LookupError(f"no process serves {model}")


@contextlib.contextmanager
def started(wheel: Path, folder: Path, place: Path) -> Iterator[Server]:
    """Serve a folder of ``qsm-export --triton`` in this environment, from when it is ready.

    Parameters
    ----------
    wheel
        Of nvidia-pytriton.
    folder
        The repository's.
    place
        Where the wheel is unpacked and the log is written.
    """
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(place / "triton")
    ports = [free_port() for _ in range(3)]
    command = ["sh", str(folder / "start.sh"), sys.prefix, str(place / "triton")]
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command.append(f"--{name}-port={port}")
    command.append("--exit-timeout-secs=3")  # which it waits for a process that was killed
    log = place / "log"
    with log.open("w") as out, subprocess.Popen(command, stderr=out, stdout=out) as process:
        server = Server(process.pid, folder, *ports)
        try:
            _wait_until_ready(server, process, log)
            yield server
        finally:
            process.terminate()


def inputs_of(kind: Any, tensors: dict[str, Any]) -> list[Any]:
    """Return arrays as what a client of Triton sends."""
    inputs = [kind.InferInput(n, a.shape, KINDS[a.dtype.name]) for n, a in tensors.items()]
    for one, array in zip(inputs, tensors.values(), strict=True):
        one.set_data_from_numpy(array)
    return inputs


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    began = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            server.get(f"{server.http}/v2/health/ready")
            return
        if process.poll() is not None or time.monotonic() - began > READY_S:
            raise RuntimeError(f"Triton does not get ready: {log.read_text()[-3000:]}")
        time.sleep(0.2)
