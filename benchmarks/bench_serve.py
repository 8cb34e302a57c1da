"""What qsm-serve adds to the network and its prior maps, and what each stage takes.

    python benchmarks/bench_serve.py -o benchmarks/results/serve.json

The server runs in a process of its own. The clock starts when the last image and CLOSE are sent,
and stops when the server's CLOSE has come, after the originals and the map; the stages are the
server's own, from its lines. Configuration ``qsm`` takes phase and magnitude of three echoes and
a mask.
"""

import io
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
from common import parser, say, write
from ismrmrd.serialization import ConfigFile, ProtocolSerializer

from qsm_deploy.calibration.phantom.phantom import head_phantom
from qsm_deploy.kernels.geometry import Geometry

SHAPE = (160, 192, 160)
REPEATS = 7
ECHO_TIMES_S = (0.005, 0.011, 0.017)
TESLA, MEGAHERTZ_PER_TESLA = 3.0, 42.577
NETWORK_STAGES = ("prepare", "inference")  # its prior maps, and the network


def slices(volume: np.ndarray, kind: int, series: int, echo: int, **meta: str) -> Iterable[Any]:
    """Cut an axial volume of 1 mm into images."""
    nx, ny, nz = volume.shape
    for k in range(nz):
        image = ismrmrd.Image.from_array(np.ascontiguousarray(volume[:, :, k].T))
        image.field_of_view[:] = (nx, ny, 1)
        image.position[:] = (0, 0, k)
        image.read_dir[:], image.phase_dir[:], image.slice_dir[:] = np.eye(3)
        image.image_type, image.image_series_index, image.contrast = kind, series, echo
        image.slice, image.image_index, image.meta = k, k + 1, ismrmrd.Meta(meta)
        yield image


def stream(config: str, parameters: dict[str, str], images: Iterable[Any]) -> tuple[bytes, bytes]:
    """Return a session as bytes: all but the last image, and the last image with CLOSE."""
    xsd = ismrmrd.xsd
    header = xsd.ismrmrdHeader(
        experimentalConditions=xsd.experimentalConditionsType(
            H1resonanceFrequency_Hz=round(1e6 * MEGAHERTZ_PER_TESLA * TESLA)
        ),
        sequenceParameters=xsd.sequenceParametersType(TE=[1000 * t for t in ECHO_TIMES_S]),
    )
    *most, last = images
    parts = []
    for messages in (
        (ConfigFile(config), header, json.dumps({"parameters": parameters}), *most),
        (last, None),
    ):
        buffer = io.BytesIO()
        out = ProtocolSerializer(buffer)
        for message in messages:
            out.close() if message is None else out.serialize(message)
        parts.append(buffer.getvalue())
    return parts[0], parts[1]


def dipole_session(head: Any) -> tuple[bytes, bytes]:
    """Return a session with the local field of a head."""
    return stream("dipole", {"units": "ppm"}, slices(head.local_field_ppm, 3, 1, 0))


def qsm_session(head: Any) -> tuple[bytes, bytes]:
    """Return a session with the echoes of a head in a smooth background field."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    field = head.local_field_ppm + 0.4 * z + 0.3 * x * y + 0.2 * (2 * z * z - x * x - y * y)
    rng = np.random.default_rng(1)
    images: list[Any] = []
    for echo, seconds in enumerate(ECHO_TIMES_S):
        turns = MEGAHERTZ_PER_TESLA * TESLA * seconds * field
        turns += np.where(head.mask, 0.005, 9) * rng.standard_normal(SHAPE)
        phase = np.floor(4096 * (turns - np.floor(turns))).astype(np.uint16)
        signal = np.where(head.mask, 900 * math.exp(-seconds / 0.03), 20).astype(np.uint16)
        images += [*slices(phase, 2, 2, echo), *slices(signal, 1, 1, echo)]
    images += slices(head.mask.astype(np.uint16), 1, 3, 0, ImageType="DERIVED\\MASK")
    return stream("qsm", {}, images)


def answer_seconds(port: int, session: tuple[bytes, bytes]) -> tuple[float, dict[str, float], int]:
    """Return the time to CLOSE [s], that of each stage, and the bytes that came back."""
    most, last = session
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(most)
        connection.sendall(last)
        began = time.perf_counter()
        answer = bytearray()
        while piece := connection.recv(1 << 20):
            answer += piece
        seconds = time.perf_counter() - began
    assert answer.endswith(b"\x04\x00"), answer[-200:]
    assert b"ERR " not in answer
    line = answer[answer.rindex(b"INFO stages: ") + len(b"INFO stages: ") :]
    stages = {}
    for part in bytes(line).split(b", "):
        found = re.match(rb"([a-z ]+) (\d+\.\d{3}) s", part)
        if found is None:
            break
        stages[found[1].decode()] = float(found[2])
    return seconds, stages, len(answer)


def measure(port: int, session: tuple[bytes, bytes]) -> dict[str, Any]:
    """Return medians over the repeats, after one to warm up."""
    answer_seconds(port, session)
    runs = [answer_seconds(port, session) for _ in range(REPEATS)]
    added = [seconds - sum(stages[s] for s in NETWORK_STAGES) for seconds, stages, _ in runs]
    return {
        "to_close_s": round(statistics.median(r[0] for r in runs), 3),
        "beyond_priors_and_network_s": round(statistics.median(added), 3),
        "beyond_min_max_s": [round(min(added), 3), round(max(added), 3)],
        "stages_s": {s: round(statistics.median(r[1][s] for r in runs), 3) for s in runs[0][1]},
        "sent_mb": round(sum(map(len, session)) / 1e6, 1),
        "returned_mb": round(runs[0][2] / 1e6, 1),
    }


def peak_mb(pid: int) -> int:
    """Return the peak resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)


def main() -> None:
    """Measure, print and write."""
    args = parser(__doc__).parse_args()
    head = head_phantom(Geometry(SHAPE), seed=1)
    sessions = {"dipole": dipole_session(head), "qsm": qsm_session(head)}
    del head
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "qsm_deploy.runtime.serve.cli", "--port", "0"]
    command += ["--method", "tv-unet"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        ready = server.stderr.readline().strip()
        port = int(ready.split("127.0.0.1:")[1].split(":")[0])
        rows = {}
        for config, session in sessions.items():
            rows[config] = {**measure(port, session), "server_peak_mb": peak_mb(server.pid)}
            say({config: rows[config]})
        server.terminate()
    write(
        args.output,
        rows,
        load_before=round(load, 2),
        shape=SHAPE,
        engine=ready.split(": ", 2)[2],
        repeats=REPEATS,
        qsm_echoes=len(ECHO_TIMES_S),
    )


if __name__ == "__main__":
    main()
