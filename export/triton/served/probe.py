"""Have every model in the folder reconstruct a sphere of 32x32x32 voxels: exit code 0, or 1.

    python3 probe.py [--url http://127.0.0.1:8000] [--limit-s 10]

Triton answers that a model is ready though its process was killed, so that health is a map. Nothing
but Python is needed.
"""

import argparse
import json
import math
import sys
import urllib.request
from array import array
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

SIDE = 32
BRAIN, SOURCE = 12, 6  # radii [voxels]
CHI_PPM, RELAXATION_HZ, TESLA = 0.1, 5.0, 3.0
TYPES = {"TYPE_FP32": "f", "TYPE_FP64": "d", "TYPE_UINT8": "B"}


def main() -> int:
    """Ask for a map of each model."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--url", default="http://127.0.0.1:8000", help="of Triton's HTTP front end")
    p.add_argument("--limit-s", type=float, default=10, help="for each model, default 10")
    arguments = p.parse_args()
    failed = 0
    for folder in sorted(Path(__file__).resolve().with_name("models").iterdir()):
        try:
            probe(f"{arguments.url}/v2/models/{folder.name}", arguments.limit_s)
        except (OSError, HTTPException, ValueError, KeyError) as error:
            body = getattr(error, "read", bytes)().decode(errors="replace")
            print(f"{folder.name}: {error} {body}".strip(), file=sys.stderr)
            failed = 1
        else:
            print(f"{folder.name}: ok")
    return failed


def probe(url: str, limit_s: float) -> None:
    """Ask a model for a map and look at it."""
    with urllib.request.urlopen(f"{url}/config", timeout=limit_s) as answer:
        config = json.load(answer)
    inputs, body = list[dict[str, Any]](), b""
    for one in config["input"]:
        if not one.get("optional"):
            shape = shape_of([int(n) for n in one["dims"]])
            data = array(TYPES[one["data_type"]], values(one["name"], shape)).tobytes()
            about = {"name": one["name"], "datatype": one["data_type"].removeprefix("TYPE_")}
            inputs.append(about | {"shape": shape, "parameters": {"binary_data_size": len(data)}})
            body += data
    asked = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    header = json.dumps(asked).encode()
    request = urllib.request.Request(f"{url}/infer", header + body)
    request.add_header("Inference-Header-Content-Length", str(len(header)))
    with urllib.request.urlopen(request, timeout=limit_s) as answer:
        content = answer.read()
        size = int(answer.headers["Inference-Header-Content-Length"])
    for output in json.loads(content[:size])["outputs"]:
        if output["datatype"] == "FP32":
            length = output["parameters"]["binary_data_size"]
            made = array("f", content[size : size + length])
            if len(made) != SIDE**3 or not all(map(math.isfinite, made)) or not any(made):
                raise ValueError(f"{output['name']} is no map of the sphere")
            size += length


def shape_of(dims: list[int]) -> list[int]:
    """Return the shape of an input: two fields where the model takes any number."""
    volume = dims[-3:] == [-1, -1, -1]
    first = dims[:-3] if volume else dims
    return [2 if n == -1 else n for n in first] + [SIDE] * (3 if volume else 0)


def values(name: str, shape: list[int]) -> Iterator[float]:
    """Give the values of an input, in its order."""
    if len(shape) >= 3:
        for _ in range(math.prod(shape[:-3])):
            for voxel in range(SIDE**3):
                across = [n - SIDE / 2 for n in (voxel // SIDE**2, voxel // SIDE % SIDE)]
                yield volume_value(name, math.hypot(*across), voxel % SIDE - SIDE / 2)
        return
    of: dict[str, Callable[[int], float]] = {
        "B0_DIRECTION": lambda n: (0, 0.2 * (n // 3), 1)[n % 3],
        "ECHO_TIME_S": lambda n: 0.005 * (n + 1),
        "FIELD_STRENGTH_T": lambda n: TESLA,
        "VOXEL_SIZE_MM": lambda n: 1,
    }
    yield from map(of[name], range(math.prod(shape)))


def volume_value(name: str, across: float, along: float) -> float:
    """Return a voxel of a sphere in a sphere, or of the field of the one inside."""
    distance = math.hypot(across, along)
    if name == "MASK":
        return int(distance < BRAIN)
    inside = distance < SOURCE
    if name == "CHI_PPM":
        return CHI_PPM * inside
    if name == "R2PRIME_HZ":
        return RELAXATION_HZ
    if name == "MAGNITUDE":
        return 1 + inside
    if inside:
        return 0
    return CHI_PPM / 3 * (SOURCE / distance) ** 3 * (3 * (along / distance) ** 2 - 1)


if __name__ == "__main__":
    sys.exit(main())
