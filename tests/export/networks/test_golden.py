"""The networks whose rows have golden vectors: the modules against these, the graphs against them.

A row's vector is compared with the network at its published size, built from the published keys;
the graphs are those of its small versions.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from qsm_deploy.export.networks.network import Network, outputs_of
from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.reconstruction.unrolled import nextqsm_dipole
from tests.export.golden import Arrays
from tests.export.table import NETWORKS, SMALL, VECTORS

TOLERANCE = 1e-5
BACKENDS = ("onnxruntime", "openvino")
TRACED = [case for case in SMALL if NETWORKS[case.split()[0]].vectors]


def padded(volume: np.ndarray, divisor: int, pad_front: str = "ceil") -> np.ndarray:
    """Return a volume with zeros around it, as the runtime pads it."""
    return np.pad(volume, _around(tuple(-n % divisor for n in volume.shape), pad_front))


def cropped(volume: np.ndarray, shape: tuple[int, ...], pad_front: str = "ceil") -> np.ndarray:
    """Undo :func:`padded`."""
    around = _around(tuple(m - n for m, n in zip(volume.shape, shape, strict=True)), pad_front)
    return volume[tuple(slice(f, f + n) for (f, _), n in zip(around, shape, strict=True))]


def _around(lack: tuple[int, ...], pad_front: str) -> list[tuple[int, int]]:
    front = [{"ceil": n - n // 2, "floor": n // 2, "none": 0}[pad_front] for n in lack]
    return [(f, n - f) for f, n in zip(front, lack, strict=True)]


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
        outputs = outputs_of(network, tensors)
    return [cropped(y[0, 0].numpy(), given[0].shape, network.pad_front) for y in outputs]


@pytest.mark.parametrize("case", VECTORS)
def test_equals_every_golden_voxel(case: str, known) -> None:
    network, vector, golden = known(case)
    for seen, expected in vector.outputs(golden, run_padded(network, vector.inputs(golden))):
        assert seen.shape == expected.shape
        assert np.abs(expected).max() > 1000 * TOLERANCE
        assert np.abs(seen - expected).max() <= TOLERANCE


def test_the_dipole_of_nextqsm_is_the_published_one(shared: Path) -> None:
    golden = np.load(shared / "specs" / "golden" / "nextqsm.npz")
    b0 = tuple(map(float, golden["b0_dir"]))
    grid = Geometry(golden["mask"].shape, tuple(map(float, golden["voxel_size"])), b0)
    dipole = np.fft.fftshift(nextqsm_dipole((64, 64, 64), grid))
    assert np.abs(dipole[28:37, 28:37, 28:37] - golden["dipole_plane_corner"]).max() <= 1e-7
    assert np.abs(dipole[32, 32] - golden["dipole_line_x0_y0"]).max() <= 1e-7


@pytest.mark.parametrize("case", TRACED)
def test_its_graph_equals_the_module_at_any_batch_and_size(
    case: str, small, traced, outputs
) -> None:
    network, graph, generator = small(case), traced(case), torch.Generator().manual_seed(0)
    cell = network.divisor * -(-4 // network.divisor)
    given = [
        torch.randn(2, info.shape[1], cell, 3 * cell, 2 * cell, generator=generator)
        if info.is_volume
        else torch.full(info.shape, 0.02)
        for info in network.inputs
    ]
    expected = outputs(network, *given)
    names = [info.name for info in (network.output, *network.further_outputs)]
    assert [output.name for output in graph.graph.output] == names
    assert len(expected) == len(names)
    for backend in BACKENDS:
        for seen, wanted in zip(outputs(graph, *given, backend=backend), expected, strict=True):
            assert seen.shape == given[0].shape
            assert np.abs(seen - wanted).max() <= TOLERANCE * max(1, np.abs(wanted).max())
