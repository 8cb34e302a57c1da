"""Patches: windows that sum to one, nothing outside the box, exact where the halo allows."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate

from qsm_deploy.kernels.errors import DataError, UsageError
from qsm_deploy.runtime.reconstruction.patches import PatchPlan, plan_patches, plan_whole

BLENDS = ("crop", "hann", "gaussian")
# voxels of the padding to the divisor that lie in front, of those that are missing
FRONT = {"ceil": lambda n: math.ceil(n / 2), "floor": lambda n: n // 2, "none": lambda n: 0}


def box_mask(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a mask and patch options that fit each other."""
    shape = draw(st.tuples(*[st.integers(1, 40)] * 3))
    corners = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    assume(all(a < b for a, b in corners))
    mask = box_mask(shape, *zip(*corners, strict=True))
    mask &= np.random.default_rng(draw(st.integers(0, 99))).random(shape) < 0.7
    assume(mask.any())
    divisor = draw(st.sampled_from([1, 2, 4, 8]))
    patch = divisor * draw(st.integers(1, 5))
    return {
        "mask": mask,
        "divisor": divisor,
        "patch": patch,
        "overlap": draw(st.integers(0, patch - divisor)),
        "blend": draw(st.sampled_from(BLENDS)),
        "front": draw(st.sampled_from(list(FRONT))),
    }


def random_volume(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def neighbours(plan: PatchPlan) -> list[tuple[int, int]]:
    return [
        (start, following)
        for axis in plan.axes
        for start, following in zip(axis.starts, axis.starts[1:], strict=False)
    ]


@settings(deadline=None)
@given(requests())
def test_an_identity_network_returns_its_input(request_):
    plan = plan_patches(**request_)
    mask = request_["mask"]
    volume = random_volume(mask.shape)
    result = plan.run(lambda patches: patches[0], [volume], mask)
    assert result.dtype == np.float32
    # sums of hundreds of products in float32
    np.testing.assert_allclose(result[mask], volume[mask], atol=1e-6, rtol=5e-6)


@settings(deadline=None)
@given(requests())
def test_windows_sum_to_one_in_the_box(request_):
    plan = plan_patches(**request_)
    for axis in plan.axes:
        covered = np.zeros(axis.starts[-1] + axis.size - axis.starts[0])
        for start, window in zip(axis.starts, axis.windows, strict=True):
            assert window.min() >= 0
            covered[start - axis.starts[0] :][: axis.size] += window
        np.testing.assert_allclose(covered, 1, atol=1e-6)


@settings(deadline=None)
@given(requests())
def test_the_grid_keeps_its_promises(request_):
    plan = plan_patches(**request_)
    mask, divisor, overlap = (request_[name] for name in ("mask", "divisor", "overlap"))
    margin = math.ceil(overlap / 2)
    assert plan.count == len(list(plan)) == math.prod(len(a.starts) for a in plan.axes)
    for n, axis, used in zip(mask.shape, plan.axes, np.nonzero(mask), strict=True):
        low = FRONT[request_["front"]](-n % divisor)
        assert axis.size % divisor == 0
        assert axis.size <= request_["patch"]
        assert all((start + low) % divisor == 0 for start in axis.starts)
        first, last = max(0, used.min() - margin), min(n, used.max() + 1 + margin)
        assert first - divisor < axis.starts[0] <= first
        assert last <= axis.starts[-1] + axis.size < last + divisor
    size = {axis.size for axis in plan.axes}
    for start, following in neighbours(plan):
        assert divisor <= following - start <= max(size) - overlap


@settings(deadline=None)
@given(requests())
def test_patches_without_a_voxel_of_the_mask_are_skipped(request_):
    plan = plan_patches(**request_)
    mask = request_["mask"]
    seen, done = [], []

    def infer(patches: list[np.ndarray]) -> np.ndarray:
        assert patches[0].shape == plan.patch_shape
        assert patches[0].any()
        seen.append(1)
        return patches[0]

    plan.run(infer, [mask.astype(np.float32)], mask, lambda: done.append(1))
    assert len(seen) == sum(mask[patch.inside].any() for patch in plan) > 0
    assert len(done) == plan.count


def test_most_of_an_empty_volume_is_not_run():
    mask = np.zeros((64, 48, 40), dtype=bool)
    mask[3:7, 4:9, 5] = mask[55:60, 40:44, 33:36] = True  # two corners of a large box
    plan = plan_patches(mask, 4, 16, 4, "hann")
    runs = []
    plan.run(lambda patches: runs.append(1) or patches[0], [mask.astype(np.float32)], mask)
    assert 2 <= len(runs) <= 4 < plan.count


@pytest.mark.parametrize("divisor", [1, 4])
@pytest.mark.parametrize("radius", [1, 2, 3])
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_cropped_patches_of_a_convolution_are_exact(divisor, radius, spare):
    kernel = random_volume((2 * radius + 1,) * 3, seed=1)
    shape = (29, 23, 18)
    volume = random_volume(shape)
    mask = box_mask(shape, (0, 5, 4), (27, 23, 9))

    def network(patches: list[np.ndarray]) -> np.ndarray:
        return correlate(patches[0], kernel, mode="constant")

    plan = plan_patches(mask, divisor, 16, 2 * radius + spare, "crop")
    assert plan.count >= 4
    tiled = plan.run(network, [volume], mask)
    whole = plan_whole(shape, divisor).run(network, [volume], mask)
    np.testing.assert_array_equal(tiled[mask], whole[mask])
    np.testing.assert_array_equal(whole, network([volume]))


def test_less_overlap_than_the_radius_needs_is_not_exact():
    kernel = np.ones((7, 7, 7), np.float32)
    volume = random_volume((28, 12, 9))
    mask = np.ones(volume.shape, dtype=bool)
    plan = plan_patches(mask, 1, 12, 4, "crop")
    assert plan.axes[0].starts == (0, 8, 16)
    tiled = plan.run(lambda patches: correlate(patches[0], kernel, mode="constant"), [volume], mask)
    assert np.abs(tiled - correlate(volume, kernel, mode="constant")).max() > 1


@pytest.mark.parametrize("blend", ["hann", "gaussian"])
def test_a_step_between_patches_is_faded(blend):
    mask = np.ones((40, 8, 8), dtype=bool)
    plan = plan_patches(mask, 8, 24, 8, blend)
    levels = iter(range(plan.count))
    result = plan.run(lambda p: np.full_like(p[0], next(levels)), [mask.astype(np.float32)], mask)
    line = result[:, 4, 4]
    assert plan.count == 2
    assert (line[0], line[-1]) == (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.05))
    steps = np.diff(line)
    assert steps.min() >= 0
    assert steps.max() < 0.5


@pytest.mark.parametrize("divisor", [1, 4, 8, 16])
@pytest.mark.parametrize("shape", [(8, 16, 32), (7, 9, 13), (1, 5, 31), (160, 3, 2)])
def test_the_whole_volume_is_one_patch(divisor, shape):
    plan = plan_whole(shape, divisor)
    assert (plan.count, plan.whole, plan.overlap) == (1, True, 0)
    assert plan.patch_shape == tuple(divisor * math.ceil(n / divisor) for n in shape)
    (patch,) = plan
    before = [-start for start in patch.start]
    after = [p - n - b for p, n, b in zip(plan.patch_shape, shape, before, strict=True)]
    assert all(b - a in (0, 1) for b, a in zip(before, after, strict=True))

    volume = random_volume(shape)
    expected = np.pad(volume, list(zip(before, after, strict=True)))
    seen = []
    result = plan.run(lambda p: seen.extend(p) or p[0], [volume], volume != 0)
    np.testing.assert_array_equal(seen[0], expected)
    np.testing.assert_array_equal(result, volume)


def test_a_network_may_want_its_padding_in_front_behind_or_halved():
    line = np.arange(1.0, 14)[:, None, None].astype(np.float32)  # 3 are missing to 16
    for front, before in {"ceil": 2, "floor": 1, "none": 0}.items():
        seen = []
        plan = plan_whole(line.shape, 16, front)
        result = plan.run(lambda p, seen=seen: seen.extend(p) or p[0], [line], line > 0)
        assert plan.patch_shape == (16, 16, 16)
        x, *others = (-axis.starts[0] for axis in plan.axes)
        assert (x, *others) == (before, *[FRONT[front](15)] * 2)
        np.testing.assert_array_equal(
            seen[0][:, others[0], others[1]], np.pad(line[:, 0, 0], (before, 3 - before))
        )
        np.testing.assert_array_equal(result, line)


def test_every_input_is_cut_alike():
    shape = (17, 12, 9)
    mask = np.ones(shape, dtype=bool)
    first, second = random_volume(shape, 1), random_volume(shape, 2)
    for plan in (plan_whole(shape, 4), plan_patches(mask, 4, 8, 4, "crop")):
        result = plan.run(lambda p: p[0] * p[1], [first, second], mask)
        np.testing.assert_allclose(result, first * second, rtol=1e-6)


@pytest.mark.parametrize(
    ("divisor", "patch", "overlap", "message"),
    [
        (16, 40, 8, "--patch 40 is not a multiple of the network's divisor 16"),
        (4, 0, 0, "--patch 0"),
        (4, -8, 0, "--patch -8"),
        (4, 16, -1, "--overlap -1 must lie between 0 and patch - divisor = 12"),
        (4, 16, 13, "--overlap 13"),
        (16, 16, 8, "--overlap 8 must lie between 0 and patch - divisor = 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(divisor, patch, overlap, message):
    with pytest.raises(UsageError, match=message):
        plan_patches(np.ones((20, 20, 20), bool), divisor, patch, overlap, "hann")


def test_an_empty_mask_is_refused():
    with pytest.raises(DataError, match="mask is empty"):
        plan_patches(np.zeros((20, 20, 20), bool), 4, 16, 4, "hann")
