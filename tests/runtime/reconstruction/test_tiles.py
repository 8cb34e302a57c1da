"""Tiles at fixed places: where they lie, and how they join."""

import math
import tracemalloc
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsm_deploy.kernels.geometry import Geometry
from qsm_deploy.runtime.card.card import Tiles
from qsm_deploy.runtime.reconstruction.precision_check import precision_error
from qsm_deploy.runtime.reconstruction.tiles import plan_tiles
from qsm_deploy.runtime.scan.scan import Scan

KINDS = {
    "none": Tiles((12, 8, 8), (8, 4, 8), (8, 4, 8), "zero", "none"),
    "mean": Tiles((8, 12, 6), (8, 12, 6), (6, 9, 4), "zero", "mean"),
    "ramp": Tiles((16, 12, 12), (8, 8, 6), (6, 5, 4), "edge", "ramp"),
}
RNG = np.random.default_rng(2)


@pytest.mark.parametrize("kind", KINDS)
@given(shape=st.tuples(*[st.integers(1, 25)] * 3))
def test_a_volume_comes_back_as_it_was(kind: str, shape: tuple[int, int, int]) -> None:
    volume = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    plan = plan_tiles(shape, KINDS[kind])
    seen = []

    def network(patches):
        seen.append(patches[0].shape)
        return np.concatenate([patches[0].copy(), 2 * patches[0]])

    joined = plan.run(network, [volume], np.ones(shape, dtype=bool))
    assert len(seen) == plan.count
    assert set(seen) == {(1, *KINDS[kind].size)}
    np.testing.assert_allclose(joined[0], volume[0], atol=1e-6)
    np.testing.assert_allclose(joined[1], 2 * volume[0], atol=2e-6)


def by_hand(volume: np.ndarray, tiles: Tiles, network) -> np.ndarray:
    """Return a volume of tiles that fade, joined voxel plane by voxel plane."""
    kept, stride, size = tiles.kept, tiles.stride, tiles.size
    counts = [
        math.ceil(max(0, n - k) / s) + 1 for n, k, s in zip(volume.shape, kept, stride, strict=True)
    ]
    ends = [(c - 1) * s + k for c, s, k in zip(counts, stride, kept, strict=True)]
    margin = [(s - k) // 2 for s, k in zip(size, kept, strict=True)]
    padded = np.pad(
        volume, [(0, e - n) for e, n in zip(ends, volume.shape, strict=True)], mode="edge"
    )
    padded = np.pad(padded, [(m, m) for m in margin], mode="edge")
    total, done = np.zeros(ends, dtype=np.float32), {}
    for k in range(counts[2]):
        for j in range(counts[1]):
            for i in range(counts[0]):
                at = [n * s for n, s in zip((i, j, k), stride, strict=True)]
                box = tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))
                inner = tuple(slice(m, m + n) for m, n in zip(margin, kept, strict=True))
                tile = network(padded[box])[inner].copy()
                here = tuple(slice(a, a + n) for a, n in zip(at, kept, strict=True))
                for axis, number in enumerate((i, j, k)):
                    shared = kept[axis] - stride[axis]
                    for t in range(shared if number else 0):
                        w = 1 - t / (shared - 1)
                        plane = [slice(None)] * 3
                        plane[axis] = t
                        at_t = tuple(plane)
                        there = list(at_t)
                        there[axis] = stride[axis] + t
                        neighbour = [i, j, k]
                        neighbour[axis] -= 1
                        before = done[tuple(neighbour)][tuple(there)]
                        tile[at_t] = w * before + (1 - w) * tile[at_t]
                total[here] = done[i, j, k] = tile
    return total[tuple(slice(0, n) for n in volume.shape)]


def test_a_ramp_fades_axis_after_axis() -> None:
    volume = RNG.normal(size=(21, 17, 13)).astype(np.float32)

    def network(x):  # tells where in its tile a voxel lies
        ramp = np.arange(x.size, dtype=np.float32).reshape(x.shape) / x.size
        return x + ramp

    plan = plan_tiles(volume.shape, KINDS["ramp"])
    mask = np.ones(volume.shape, dtype=bool)
    joined = plan.run(lambda p: network(p[0][0])[None], [volume[None]], mask)
    expected = by_hand(volume, KINDS["ramp"], network)
    np.testing.assert_allclose(joined[0], expected, atol=1e-6)
    assert np.abs(joined[0] - volume).max() > 0.1


def test_no_more_tiles_are_held_than_others_fade_from() -> None:
    shape, tiles = (20, 20, 400), Tiles((32,) * 3, (8,) * 3, (4,) * 3, "zero", "ramp")
    volume, mask = np.ones((1, *shape), np.float32), np.ones(shape, bool)
    plan = plan_tiles(shape, tiles)
    padded = math.prod(axis.padded + 24 for axis in plan.axes) + 32**3
    layer = math.prod(len(axis.starts) for axis in plan.axes[:2])
    tracemalloc.start()
    plan.run(lambda p: 2 * p[0], [volume], mask)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = 4 * (padded + volume.size + 32**3 + (layer + 1) * 8**3)
    assert 0.9 * expected < peak < 1.1 * expected


def test_a_precision_is_compared_in_whole_tiles(card) -> None:
    shape = (20, 16, 12)
    field = RNG.normal(size=(1, *shape)).astype(np.float32)
    mask = np.ones(shape, bool)
    scan = Scan(field, mask, Geometry(shape), nib.Nifti1Header(), np.eye(4))
    tiles = Tiles((8, 12, 80), (8, 12, 80), (8, 12, 80), "zero", "none")
    in_tiles = replace(card, patchable="no", why_whole="in tiles", tiles=tiles)

    class Scales:
        backend, version, precision, card = "onnxruntime", "test", "fp32", in_tiles

        def __init__(self, factor: float) -> None:
            self.factor = np.float32(factor)

        def run(self, tensors):
            assert tensors["local_field_ppm"].shape == (1, 1, *tiles.size)
            return self.factor * tensors["local_field_ppm"]

    error = precision_error(Scales(1.5), Scales(1.0), scan)
    assert error["relative_error"] == pytest.approx(0.5, rel=1e-5)


def test_a_mean_counts_tiles_alike_and_the_last_is_flush() -> None:
    plan = plan_tiles((20, 12, 3), KINDS["mean"])
    assert [axis.starts for axis in plan.axes] == [(0, 6, 12), (0,), (0,)]
    counter = iter(range(10))
    joined = plan.run(
        lambda p: np.full_like(p[0], next(counter)),
        [np.ones((1, 20, 12, 3), np.float32)],
        np.ones((20, 12, 3), bool),
    )
    np.testing.assert_allclose(
        joined[0, :, 0, 0], [0] * 6 + [0.5] * 2 + [1] * 4 + [1.5] * 2 + [2] * 6
    )
