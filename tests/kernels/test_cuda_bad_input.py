"""What a caller can get wrong: a status and one line, before CUDA is touched, never a crash."""

import ctypes
import math

import pytest

from qsm_deploy.kernels.cuda_abi import Dipole, Patch, Status

NAN, INF = math.nan, math.inf
X, Y, WORKSPACE = 1 << 20, 2 << 20, 3 << 20  # never followed: only looked at
NO_DEVICE = (Status.NO_DRIVER, Status.NO_GPU)


@pytest.fixture(params=["twin", pytest.param("cuda_handle", marks=pytest.mark.slow)])
def handle(request):
    return request.getfixturevalue(request.param)


def dipole(handle, **fields) -> Dipole:
    op = handle.qsm_cuda_dipole_default()
    op.shape[:] = (4, 5, 6)
    for name, value in fields.items():
        if isinstance(value, tuple):
            getattr(op, name)[:] = value
        else:
            setattr(op, name, value)
    return op


def patch(**fields) -> Patch:
    values = {"channels": 1, "volume": (8, 8, 8), "start": (0, 0, 0), "size": (4, 4, 4)} | fields
    box = Patch()
    for name, value in values.items():
        if isinstance(value, tuple):
            getattr(box, name)[:] = value
        else:
            setattr(box, name, value)
    return box


def expect(handle, seen: int, status: Status, text: str) -> None:
    message = handle.qsm_cuda_last_error().decode()
    assert Status(seen) is status, message
    assert text in message
    assert "\n" not in message


BAD_OPERATORS = [
    ({"batch": 0}, Status.BAD_SHAPE, "batch must be at least 1, got 0"),
    ({"batch": -3}, Status.BAD_SHAPE, "batch must be at least 1, got -3"),
    ({"shape": (4, 0, 6)}, Status.BAD_SHAPE, "three positive sizes, got 4 x 0 x 6"),
    ({"shape": (-4, -5, 6)}, Status.BAD_SHAPE, "got -4 x -5 x 6"),
    ({"shape": (2048, 1024, 1024)}, Status.TOO_LARGE, "more than 2147483647 voxels"),
    ({"shape": (2**31 - 1,) * 3}, Status.TOO_LARGE, "voxels"),
    ({"shape": (2**31 - 1, 2**31 - 1, -1)}, Status.BAD_SHAPE, "positive"),
    ({"shape": (1024, 1024, 512), "batch": 4}, Status.TOO_LARGE, "(batch: 4)"),
    ({"voxel_size_mm": (1.0, 0.0, 1.0)}, Status.BAD_GEOMETRY, "got (1, 0, 1) mm"),
    ({"voxel_size_mm": (1.0, 1.0, -1.0)}, Status.BAD_GEOMETRY, "voxel size"),
    ({"voxel_size_mm": (NAN, 1.0, 1.0)}, Status.BAD_GEOMETRY, "nan"),
    ({"voxel_size_mm": (1.0, INF, 1.0)}, Status.BAD_GEOMETRY, "inf"),
    ({"voxel_size_mm": (1.0, 1.0, 1e-3)}, Status.BAD_GEOMETRY, "0.01 to 100 mm"),
    ({"b0_direction": (0.0, 0.0, 0.0)}, Status.BAD_GEOMETRY, "non-zero, got (0, 0, 0)"),
    ({"b0_direction": (0.0, NAN, 1.0)}, Status.BAD_GEOMETRY, "finite"),
    ({"b0_direction": (0.0, INF, 1.0)}, Status.BAD_GEOMETRY, "finite"),
    ({"b0_direction": (1e200, 0.0, 1.0)}, Status.BAD_GEOMETRY, "1e+200"),
    ({"multiplier": 5}, Status.BAD_MULTIPLIER, "unknown multiplier 5"),
    ({"multiplier": -1}, Status.BAD_MULTIPLIER, "unknown multiplier -1"),
    ({"multiplier": 2, "tkd_threshold": 0.0}, Status.BAD_MULTIPLIER, "(0, 2/3], got 0"),
    ({"multiplier": 2, "tkd_threshold": 0.7}, Status.BAD_MULTIPLIER, "0.7"),
    ({"multiplier": 2, "tkd_threshold": NAN}, Status.BAD_MULTIPLIER, "nan"),
    ({"multiplier": 3, "tikhonov_lambda": 0.0}, Status.BAD_MULTIPLIER, "positive"),
    ({"multiplier": 3, "tikhonov_lambda": -1.0}, Status.BAD_MULTIPLIER, "-1"),
    ({"multiplier": 3, "tikhonov_lambda": 1e-60}, Status.BAD_MULTIPLIER, "float32"),
    ({"multiplier": 3, "tikhonov_lambda": NAN}, Status.BAD_MULTIPLIER, "nan"),
    ({"multiplier": 3, "tikhonov_lambda": INF}, Status.BAD_MULTIPLIER, "inf"),
]


@pytest.mark.parametrize(("fields", "status", "text"), BAD_OPERATORS)
def test_an_operator_that_cannot_be(handle, fields, status, text):
    op, needed = dipole(handle, **fields), ctypes.c_size_t(77)
    expect(handle, handle.qsm_cuda_dipole_workspace(op, needed), status, text)
    assert needed.value == 77
    seen = handle.qsm_cuda_dipole_apply(op, X, Y, WORKSPACE, 1 << 20, None)
    expect(handle, seen, status, text)


BAD_BUFFERS = [
    ((0, Y, WORKSPACE, 4096), Status.NULL_POINTER, "x is a null pointer"),
    ((X, 0, WORKSPACE, 4096), Status.NULL_POINTER, "y is a null pointer"),
    ((X, Y, 0, 4096), Status.NULL_POINTER, "workspace is a null pointer"),
    ((X + 4, Y, WORKSPACE, 4096), Status.MISALIGNED, "x must be aligned to 8 bytes"),
    ((X, Y + 1, WORKSPACE, 4096), Status.MISALIGNED, "y must be aligned to 8 bytes"),
    ((X, Y, WORKSPACE + 16, 4096), Status.MISALIGNED, "workspace must be aligned to 256"),
    ((X, Y, WORKSPACE, 0), Status.SMALL_WORKSPACE, "has 0 bytes, 1024 are needed"),
    ((X, Y, WORKSPACE, 1023), Status.SMALL_WORKSPACE, "qsm_cuda_dipole_workspace()"),
    ((WORKSPACE - 8, Y, WORKSPACE, 4096), Status.OVERLAP, "x and workspace overlap"),
    ((X, WORKSPACE + 4088, WORKSPACE, 4096), Status.OVERLAP, "y and workspace overlap"),
    ((X, X, X, 4096), Status.OVERLAP, "overlap"),
    ((WORKSPACE + 2**40, Y, WORKSPACE, 2**64 - 1), Status.OVERLAP, "x and workspace overlap"),
]


@pytest.mark.parametrize(("buffers", "status", "text"), BAD_BUFFERS)
def test_buffers_that_cannot_be(handle, buffers, status, text):
    seen = handle.qsm_cuda_dipole_apply(dipole(handle), *buffers, None)
    expect(handle, seen, status, text)


def test_a_workspace_without_room_for_the_transforms(twin):
    op, needed = dipole(twin), ctypes.c_size_t()
    assert twin.qsm_cuda_dipole_workspace(op, needed) == Status.OK
    seen = twin.qsm_cuda_dipole_apply(op, X, Y, WORKSPACE, needed.value - 1, None)
    expect(twin, seen, Status.SMALL_WORKSPACE, f"{needed.value} are needed")


def test_null_structures(handle):
    for call in (
        lambda: handle.qsm_cuda_dipole_workspace(None, ctypes.c_size_t()),
        lambda: handle.qsm_cuda_dipole_workspace(dipole(handle), None),
        lambda: handle.qsm_cuda_dipole_apply(None, X, Y, WORKSPACE, 4096, None),
        lambda: handle.qsm_cuda_patch_gather(None, X, Y, None),
        lambda: handle.qsm_cuda_patch_accumulate(None, X, X, X, X, Y, None, None),
        lambda: handle.qsm_cuda_patch_finish(None, X, None, None, Y, None),
        lambda: handle.qsm_cuda_tv_workspace(None, ctypes.c_size_t()),
        lambda: handle.qsm_cuda_tv_workspace(dipole(handle), None),
        lambda: handle.qsm_cuda_tv_split(None, X, Y, None),
        lambda: handle.qsm_cuda_tv_solve(None, WORKSPACE, 4096, None),
    ):
        expect(handle, call(), Status.NULL_POINTER, "is a null pointer")


BAD_BOXES = [
    ({"channels": 0}, Status.BAD_SHAPE, "channels must be at least 1"),
    ({"volume": (8, -8, 8)}, Status.BAD_SHAPE, "the volume must be three positive sizes"),
    ({"size": (4, 4, 0)}, Status.BAD_SHAPE, "the patch must be three positive sizes"),
    ({"volume": (2**31 - 1, 2, 1)}, Status.TOO_LARGE, "the volume of"),
    ({"size": (65536, 65536, 65536), "channels": 7}, Status.TOO_LARGE, "(channels: 7)"),
]


@pytest.mark.parametrize(("fields", "status", "text"), BAD_BOXES)
def test_boxes_that_cannot_be(handle, fields, status, text):
    box = patch(**fields)
    expect(handle, handle.qsm_cuda_patch_gather(box, X, Y, None), status, text)
    seen = handle.qsm_cuda_patch_accumulate(box, X, X, X, X, Y, None, None)
    expect(handle, seen, status, text)
    expect(handle, handle.qsm_cuda_patch_finish(box, X, None, None, Y, None), status, text)


@pytest.mark.parametrize("start", [(-1, 0, 0), (0, 5, 0), (0, 0, 2**31 - 1)])
def test_a_result_from_outside_the_volume(handle, start):
    seen = handle.qsm_cuda_patch_finish(patch(start=start), X, None, None, Y, None)
    expect(handle, seen, Status.BAD_SHAPE, "must lie inside the volume")


def test_buffers_of_patches_that_cannot_be(handle):
    box = patch()
    gather, accumulate, finish = (
        getattr(handle, f"qsm_cuda_patch_{name}") for name in ("gather", "accumulate", "finish")
    )
    for seen, status, text in (
        (lambda: gather(box, None, Y, None), Status.NULL_POINTER, "volume is"),
        (lambda: gather(box, X, None, None), Status.NULL_POINTER, "patch is"),
        (lambda: gather(box, X + 2, Y, None), Status.MISALIGNED, "volume"),
        (lambda: gather(box, X, X + 64, None), Status.OVERLAP, "patch and volume"),
        (lambda: accumulate(box, X, None, X, X, Y, None, None), Status.NULL_POINTER, "window_x"),
        (lambda: accumulate(box, X, X, None, X, Y, None, None), Status.NULL_POINTER, "window_y"),
        (lambda: accumulate(box, X, X, X, X + 1, Y, None, None), Status.MISALIGNED, "window_z"),
        (lambda: accumulate(box, X, X, X, X, X, None, None), Status.OVERLAP, "patch and total"),
        (lambda: accumulate(box, X, X, X, X, Y, Y, None), Status.OVERLAP, "weight and total"),
        (lambda: accumulate(box, X, X, X, X, Y, X + 2, None), Status.MISALIGNED, "weight"),
        (lambda: finish(box, None, None, None, Y, None), Status.NULL_POINTER, "total"),
        (lambda: finish(box, X, None, None, None, None), Status.NULL_POINTER, "output"),
        (lambda: finish(box, X, None, None, X, None), Status.OVERLAP, "output and total"),
        (lambda: finish(box, X, Y, None, Y, None), Status.OVERLAP, "output and weight"),
    ):
        expect(handle, seen(), status, text)


@pytest.mark.slow
def test_every_call_says_when_there_is_no_gpu(cuda_handle):
    if not cuda_handle.qsm_cuda_probe(None):
        pytest.skip("no GPU is missing here")
    op = dipole(cuda_handle)
    for call in (
        lambda: cuda_handle.qsm_cuda_probe(None),
        lambda: cuda_handle.qsm_cuda_dipole_workspace(op, ctypes.c_size_t()),
        lambda: cuda_handle.qsm_cuda_dipole_apply(op, X, Y, WORKSPACE, 1 << 20, None),
        lambda: cuda_handle.qsm_cuda_patch_gather(patch(), X, Y, None),
        lambda: cuda_handle.qsm_cuda_patch_accumulate(patch(), X, X, X, X, Y, None, None),
        lambda: cuda_handle.qsm_cuda_patch_finish(patch(), X, None, None, Y, None),
    ):
        assert call() in NO_DEVICE
        assert "GPU" in cuda_handle.qsm_cuda_last_error().decode()
    assert cuda_handle.qsm_cuda_release_plans() == Status.OK


@pytest.mark.parametrize("status", [Status.NO_DRIVER, Status.NO_GPU, Status.CUDA_ERROR])
def test_a_gpu_that_fails_is_reported_before_anything_is_read(twin, status):
    twin.host_twin_set_gpu(status)
    seen = twin.qsm_cuda_dipole_apply(dipole(twin), X, Y, WORKSPACE, 1 << 20, None)
    expect(twin, seen, status, "as the test wishes")
