"""Networks that take or give more than a local field, against the outputs of the published ones.

One row for each: how its state fills, what it takes, and what of its outputs is known. The graph of
its small version is compared with the module in every backend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from qsm_deploy.export.networks import nextqsm
from qsm_deploy.export.networks.build_network import build_network
from qsm_deploy.export.networks.network import Choices, Network
from qsm_deploy.export.networks.registry import REGISTRY
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.reconstruction.unrolled import nextqsm as nextqsm_loop
from qsm_deploy.runtime.reconstruction.unrolled import nextqsm_dipole
from qsm_deploy.runtime.scan.scan import Scan

TOLERANCE = 1e-5
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


def separation_inputs(golden: Golden) -> Arrays:
    return [golden[name] for name in ("local_field", "chi", "r2prime_hz", "mask")]


def separated(golden: Golden, given: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    names = ("chi_positive", "chi_negative")
    return [(y * golden["mask"], golden[name]) for y, name in zip(given, names, strict=True)]


def statistics(pattern: str) -> Callable[[Golden], Mapping[str, np.ndarray]]:
    """Return what names a golden vector's statistics as the authors do."""
    return lambda golden: {
        pattern.format(name, what): np.array(value)
        for name, row in zip(golden["stats_names"], golden["stats_mean_std"], strict=True)
        for what, value in zip(("mean", "std"), row, strict=True)
    }


def first_block(volume: np.ndarray, context: int, mode: str) -> np.ndarray:
    """Return the first block of 64 voxels a side, with what lies before and behind the volume."""
    behind = [max(0, 64 - context - n) for n in volume.shape]
    return np.pad(volume, [(context, b) for b in behind], mode=mode)[:64, :64, :64]


def louder_prior(golden: Golden, state: State) -> None:
    """Raise what NeXtQSM's prior gives, whose gradient would vanish."""
    state["vn.last_conv.weight"] *= float(golden["vn_last_conv_weight_gain"])
    state["vn.last_conv.bias"][:] = float(golden["vn_last_conv_bias"])


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
    ),
    "bfrnet": Row(
        network="bfrnet",
        inputs=lambda golden: [golden["total_field"]],
        outputs=lambda golden, given: [
            (given[0] * golden["mask"], golden["local_field"]),
            (golden["total_field"] - given[0], golden["background"]),
        ],
        golden="bfrnet",
        keys="bfrnet",
    ),
    "qsmgan": Row(
        network="qsmgan",
        inputs=lambda golden: [first_block(golden["local_field"], 8, "constant")],
        outputs=lambda golden, given: [
            (
                np.tanh(10 * given[0])[8:56:2, 8:56:2, 8:56:2],
                golden["first_patch_tanh_sub2"],
            )
        ],
        golden="qsmgan",
        keys="qsmgan_c16",
    ),
    "autoqsm": Row(
        network="autoqsm",
        inputs=lambda golden: [first_block(golden["total_field"], 16, "edge")],
        outputs=lambda golden, given: [
            (given[0][16:48:2, 16:48:2, 16:48:2], golden["first_patch_sub2"])
        ],
        golden="autoqsm",
        keys="autoqsm",
    ),
    "nextqsm bf": Row(
        network="nextqsm",
        inputs=lambda golden: [golden["total_field"] * golden["mask"]],
        outputs=lambda golden, given: [(given[0] * golden["mask"], golden["local_field"])],
        golden="nextqsm",
        keys="nextqsm",
        options={"part": "bf"},
    ),
    "nextqsm vn": Row(
        network="nextqsm",
        inputs=lambda golden: [golden["local_field"]],
        outputs=lambda golden, given: [
            (
                given[0] * golden["mask"] / 64**3,
                golden["step0_regulariser_gradient"],
            )
        ],
        golden="nextqsm",
        keys="nextqsm",
        options={"part": "vn"},
        normalisation=lambda golden: {nextqsm.LAMBDAS: golden["lambdas"]},
        fill=louder_prior,
    ),
    "chi-sepnet": Row(
        network="chi-sepnet",
        inputs=separation_inputs,
        outputs=separated,
        golden="chi_sepnet",
        keys="chi_sepnet",
        normalisation=statistics("{}_{}"),
    ),
    "susep-net": Row(
        network="susep-net",
        inputs=separation_inputs,
        outputs=separated,
        golden="susepnet",
        keys="susepnet",
        normalisation=statistics("all_mean_std.{}.{}"),
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
    return built(row, golden, shared, formula_state)


def built(row: Row, golden: Golden, shared: Path, formula_state: Callable[..., State]) -> Network:
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


def run_padded(network: Network, given: Arrays) -> Arrays:
    """Return what a network gives for volumes of any size, each (x, y, z)."""
    how = network.divisor, network.pad_front
    tensors = [
        torch.from_numpy(padded(array, *how))[None, None].float()
        if info.is_volume
        else torch.from_numpy(array).float()
        for info, array in zip(network.inputs, given, strict=True)
    ]
    with torch.inference_mode():
        output = network(*tensors)
    outputs = output if isinstance(output, tuple) else (output,)
    return [cropped(y[0, 0].numpy(), given[0].shape, network.pad_front) for y in outputs]


def test_equals_every_golden_voxel(row: Row, golden: Golden, network: Network) -> None:
    for seen, expected in row.outputs(golden, run_padded(network, row.inputs(golden))):
        assert seen.shape == expected.shape
        assert np.abs(expected).max() > 10 * TOLERANCE
        assert np.abs(seen - expected).max() <= TOLERANCE


def test_the_loop_of_nextqsm_equals_the_published_one(shared: Path, formula_state) -> None:
    row = ROWS["nextqsm vn"]
    golden = np.load(shared / "specs" / "golden" / f"{row.golden}.npz")
    network = built(row, golden, shared, formula_state)
    mask, b0 = golden["mask"] > 0, tuple(map(float, golden["b0_dir"]))
    grid = Geometry(mask.shape, tuple(map(float, golden["voxel_size"])), b0)
    scan = Scan(golden["local_field"][None], mask, grid, nib.Nifti1Header(), np.eye(4))
    chi = nextqsm_loop(scan, lambda x: run_padded(network, [x[0]])[0][None], network.constants, {})
    error = np.abs(chi - golden["chi"])[mask]
    assert np.abs(golden["chi"]).max() > 0.3
    assert np.quantile(error, 0.999) <= TOLERANCE  # where U is next to 0 its sign may be either
    assert error.max() <= 100 * TOLERANCE
    dipole = np.fft.fftshift(nextqsm_dipole((64, 64, 64), grid))
    assert np.abs(dipole[28:37, 28:37, 28:37] - golden["dipole_plane_corner"]).max() <= 1e-7
    assert np.abs(dipole[32, 32] - golden["dipole_line_x0_y0"]).max() <= 1e-7


# those of the rows above
TRACED = {
    "iqfm": 2,
    "bfrnet": 4,
    "qsmgan": 2,
    "autoqsm": 2,
    "nextqsm bf": 2,
    "nextqsm vn": 4,
    "chi-sepnet": 16,
    "susep-net": 8,
}


@pytest.mark.parametrize("name", TRACED)
def test_its_graph_equals_the_module_at_any_batch_and_size(
    name: str, small, traced, outputs
) -> None:
    network, graph, generator = small(name), traced(name), torch.Generator().manual_seed(0)
    assert network.divisor == TRACED[name]
    cell = network.divisor * -(-4 // network.divisor)
    given = [
        torch.randn(2, info.shape[1], cell, 3 * cell, 2 * cell, generator=generator)
        if info.is_volume
        else torch.full(info.shape, 0.02)
        for info in network.inputs
    ]
    expected = outputs(network, *given)
    assert len(expected) == 1 + len(network.further_outputs)
    assert [o.name for o in graph.graph.output] == [
        info.name for info in (network.output, *network.further_outputs)
    ]
    for backend in ("onnxruntime", "openvino"):
        for seen, wanted in zip(outputs(graph, *given, backend=backend), expected, strict=True):
            assert seen.shape == given[0].shape
            assert np.abs(seen - wanted).max() <= TOLERANCE * max(1, np.abs(wanted).max())
