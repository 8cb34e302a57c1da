"""The patch kernels against the runtime's patches: same voxels, same windows, same sums."""

import numpy as np
import pytest

from qsm_deploy.kernels.cuda_library import PatchBox
from qsm_deploy.runtime.reconstruction.patches import plan_patches, plan_whole

CHANNELS = 2
each_blend = pytest.mark.parametrize("blend", ["hann", "gaussian", "crop"])
each_shape = pytest.mark.parametrize("shape", [(20, 13, 17), (16, 1, 40), (8, 8, 8), (23, 29, 7)])


def random_volume(shape, seed=0):
    return np.random.default_rng(seed).standard_normal((CHANNELS, *shape), dtype=np.float32)


def plan_of(shape, blend):
    return plan_patches(np.ones(shape, bool), divisor=4, patch=12, overlap=5, blend=blend)


def box_of(patch):
    return PatchBox(patch.shape, patch.start, patch.size, CHANNELS)


def gather(device, patch, volume):
    pointer, held = device.memory.upload(volume)
    output, output_held = device.memory.upload(np.full((CHANNELS, *patch.size), np.nan, np.float32))
    device.library.patch_gather(box_of(patch), pointer, output)
    del held
    return device.memory.download(output_held)


@each_shape
def test_patches_are_gathered_with_zeros_beyond_the_volume(device, shape):
    volume = random_volume(shape)
    for plan in (plan_of(shape, "hann"), plan_whole(shape, 8)):
        for patch in plan:
            np.testing.assert_array_equal(gather(device, patch, volume), patch.gather(volume))


@pytest.mark.parametrize("start", [(-30, 0, 0), (0, 8, 0), (0, 0, -5), (2**31 - 1, 0, -(2**31))])
def test_a_patch_off_the_volume_is_zero_and_adds_nothing(twin_device, start):
    box = PatchBox((8, 8, 8), start, (5, 5, 5), CHANNELS)
    memory, library = twin_device.memory, twin_device.library
    volume, volume_held = memory.upload(random_volume((8, 8, 8)))
    patch, patch_held = memory.upload(np.full((CHANNELS, 5, 5, 5), np.nan, np.float32))
    window, window_held = memory.upload(np.ones(5, np.float32))
    library.patch_gather(box, volume, patch)
    assert (memory.download(patch_held) == 0).all()
    library.patch_accumulate(box, patch, (window, window, window), volume)
    np.testing.assert_array_equal(memory.download(volume_held), random_volume((8, 8, 8)))
    del window_held


def accumulate(device, plan, patches, shape):
    """Return the sums of windowed patches and of windows."""
    memory = device.memory
    total, total_held = memory.upload(np.zeros((CHANNELS, *shape), np.float32))
    weight, weight_held = memory.upload(np.zeros(shape, np.float32))
    for patch, values in zip(plan, patches, strict=True):
        pointer, held = memory.upload(values)
        windows = [memory.upload(window) for window in patch.windows]
        device.library.patch_accumulate(
            box_of(patch), pointer, tuple(w for w, _ in windows), total, weight
        )
        del held
    return memory.download(total_held), memory.download(weight_held)


@each_blend
@each_shape
def test_windowed_patches_add_up_as_in_numpy(device, shape, blend):
    plan = plan_of(shape, blend)
    patches = [random_volume(patch.size, seed) for seed, patch in enumerate(plan)]
    expected = np.zeros((CHANNELS, *shape), np.float32)
    for patch, values in zip(plan, patches, strict=True):
        patch.accumulate(values, expected)
    total, weight = accumulate(device, plan, patches, shape)
    if device.memory.exact:
        np.testing.assert_array_equal(total, expected)
    np.testing.assert_allclose(total, expected, atol=2e-6)
    np.testing.assert_allclose(weight, 1, atol=2e-6)


@each_blend
def test_an_identity_network_gives_its_input_back(device, blend):
    shape = (20, 13, 17)
    plan, volume = plan_of(shape, blend), random_volume(shape)
    patches = [gather(device, patch, volume) for patch in plan]
    total, _ = accumulate(device, plan, patches, shape)
    np.testing.assert_allclose(total, volume, atol=2e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("start", "size"), [((0, 0, 0), (9, 7, 11)), ((2, 0, 3), (5, 7, 1)), ((8, 6, 10), (1, 1, 1))]
)
def test_finishing_divides_masks_and_crops(device, start, size, masked, weighted):
    shape = (9, 7, 11)
    random = np.random.default_rng(1)
    total = random_volume(shape)
    weight = random.uniform(0.5, 2, shape).astype(np.float32)
    weight[0] = 0  # voxels that no patch covered
    mask = random.integers(0, 3, shape).astype(np.uint8)
    expected = total.copy()
    if weighted:
        expected = np.divide(total, weight, out=np.zeros_like(total), where=weight != 0)
    if masked:
        expected = expected * (mask != 0)
    crop = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))

    pointers = [device.memory.upload(array) for array in (total, weight, mask)]
    output, held = device.memory.upload(np.full((CHANNELS, *size), np.nan, np.float32))
    device.library.patch_finish(
        PatchBox(shape, start, size, CHANNELS),
        pointers[0][0],
        output,
        weight=pointers[1][0] if weighted else 0,
        mask=pointers[2][0] if masked else 0,
    )
    np.testing.assert_array_equal(device.memory.download(held), expected[(..., *crop)])


def test_what_is_not_finite_shows_outside_the_mask_too(device):
    total, total_held = device.memory.upload(np.full((1, 2, 2, 2), np.inf, np.float32))
    mask, mask_held = device.memory.upload(np.zeros((2, 2, 2), np.uint8))
    output, held = device.memory.upload(np.zeros((1, 2, 2, 2), np.float32))
    box = PatchBox((2, 2, 2), (0, 0, 0), (2, 2, 2))
    device.library.patch_finish(box, total, output, mask=mask)
    assert np.isnan(device.memory.download(held)).all()
    del total_held, mask_held
