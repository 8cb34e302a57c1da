"""Networks that take or give more than a local field, against the outputs of the published ones.

One row for each: how its state fills, what it takes, and what of its outputs is known. The graph of
its small version is compared with the module in every backend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.runtime.card.card import TensorInfo

TOLERANCE_PPM = 1e-5
WRONG_PPM = 1e-3
State = dict[str, Tensor]
Golden = Mapping[str, np.ndarray]
Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Row:
    """What is known of a published network.

    Attributes
    ----------
    network
        Its name in the registry.
    inputs
        From the golden vector to what it takes: volumes (x, y, z), and numbers.
    outputs
        From the golden vector and what it gives, (x, y, z) each, to pairs of equals.
    small
        The names of its small versions.
    golden
        The name of the vector.
    keys
        The name of the list of keys.
    options
        What is chosen.
    normalisation
        From the golden vector to the authors' numbers.
    fill
        Changes the state that the formula gives.
    """

    network: str
    inputs: Callable[[Golden], Arrays]
    outputs: Callable[[Golden, Arrays], list[tuple[np.ndarray, np.ndarray]]]
    golden: str
    keys: str
    pad_front: str = "ceil"
    options: Mapping[str, str] = field(default_factory=dict)
    normalisation: Callable[[Golden], Mapping[str, np.ndarray]] = lambda golden: {}
    fill: Callable[[Golden, State], None] = lambda golden, state: None


def padded(volume: np.ndarray, divisor: int, pad_front: str = "ceil") -> np.ndarray:
    """Return a volume with zeros around it, as the runtime pads it."""
    lack = [-n % divisor for n in volume.shape]
    front = [{"ceil": n - n // 2, "floor": n // 2, "none": 0}[pad_front] for n in lack]
    return np.pad(volume, [(f, n - f) for f, n in zip(front, lack, strict=True)])


def cropped(volume: np.ndarray, shape: tuple[int, ...], pad_front: str = "ceil") -> np.ndarray:
    """Undo :func:`padded`."""
    lack = [m - n for m, n in zip(volume.shape, shape, strict=True)]
    front = [{"ceil": n - n // 2, "floor": n // 2, "none": 0}[pad_front] for n in lack]
    return volume[tuple(slice(f, f + n) for f, n in zip(front, shape, strict=True))]


def iqfm_outputs(golden: Golden, given: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(given[0] * golden["eroded_mask"], golden["local_field_echo1"])]


ROWS = {
    "iqfm": Row(
        network="iqfm",
        inputs=lambda golden: [
            -golden["phase"][..., 0],
            golden["eroded_mask"],
            golden["te_s"][:1],
            golden["b0_t"].reshape(1),
        ],
        outputs=iqfm_outputs,
        golden="iqfm",
        keys="iqfm",
        pad_front="floor",
    ),
}


@pytest.fixture(scope="module", params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@pytest.fixture(scope="module")
def golden(row: Row, shared: Path) -> Golden:
    return np.load(shared / "specs" / "golden" / f"{row.golden}.npz")


@pytest.fixture(scope="module")
def network(row: Row, golden: Golden, shared: Path, formula_state: Callable[..., State]) -> Network:
    """Return what the list of published keys builds: strict loading compares both."""
    state = formula_state(
        {
            key: torch.zeros(shape, dtype=kind)
            for key, shape, kind in keys_in(shared / "specs" / "keys" / f"{row.keys}.txt")
        }
    )
    row.fill(golden, state)
    spec = REGISTRY[row.network]
    return build_network(
        spec, state, Choices(spec.chosen_options(row.options), row.normalisation(golden))
    )


def keys_in(path: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return key, shape and type of each entry of a list."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    entries = [line.split("\t")[:3] for line in lines]
    return [
        (key, tuple(map(int, shape.strip("()").replace(",", " ").split())), getattr(torch, kind))
        for key, shape, kind in entries
    ]


def run(network: Network, given: Arrays) -> Arrays:
    """Return what a network gives for volumes of any size, each (x, y, z)."""
    tensors = []
    for info, array in zip(network.inputs, given, strict=True):
        value = padded(array, network.divisor, network.pad_front) if info.is_volume else array
        tensors.append(torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)))
    volumes = [t[None, None] if i.is_volume else t for i, t in zip(network.inputs, tensors)]
    with torch.inference_mode():
        output = network(*volumes)
    outputs = output if isinstance(output, tuple) else (output,)
    return [cropped(y[0, 0].numpy(), given[0].shape, network.pad_front) for y in outputs]


def test_equals_every_golden_voxel(row: Row, golden: Golden, network: Network) -> None:
    for seen, expected in row.outputs(golden, run(network, row.inputs(golden))):
        assert seen.shape == expected.shape
        assert np.abs(expected).max() > 10 * TOLERANCE_PPM
        assert np.abs(seen - expected).max() <= TOLERANCE_PPM
