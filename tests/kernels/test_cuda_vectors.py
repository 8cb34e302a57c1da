"""Sums and products of vectors, as conjugate gradients take them."""

import ctypes
import math

import numpy as np
import pytest

from qsm_deploy.kernels.cuda_abi import DOT_WORKSPACE_BYTES, Coefficient, Status
from qsm_deploy.kernels.cuda_library import Ratio
from qsm_deploy.kernels.errors import GeometryError, UsageError

each_count = pytest.mark.parametrize("count", [1, 31, 1024, 1025, 65536, 200_003])
X, Y, RESULT, WORKSPACE = 1 << 22, 2 << 22, 3 << 22, 4 << 22  # never followed: only looked at


def vector(count, seed):
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


def dot(device, x, y):
    upload, count = device.memory.upload, x.size
    (px, kx), (py, ky) = upload(x), upload(y)
    result, result_held = upload(np.full(1, np.nan))
    workspace, workspace_held = upload(np.full(DOT_WORKSPACE_BYTES // 8, np.nan))
    device.library.dot(count, px, py, result, workspace)
    seen = float(device.memory.download(result_held)[0])
    del kx, ky, workspace_held
    return seen


def count_beyond(device, x, limit):
    (px, kx), (result, held) = device.memory.upload(x), device.memory.upload(np.full(1, np.nan))
    workspace, workspace_held = device.memory.upload(np.full(DOT_WORKSPACE_BYTES // 8, np.nan))
    device.library.count_beyond(x.size, px, limit, result, workspace)
    seen = float(device.memory.download(held)[0])
    del kx, workspace_held
    return seen


def combine(device, a, x, b, y):
    (px, kx), (py, ky) = device.memory.upload(x), device.memory.upload(y)
    device.library.combine(x.size, a, px, b, py)
    seen = device.memory.download(ky)
    del kx
    return seen


@each_count
def test_a_dot_product_is_that_of_doubles(device, count):
    x, y = vector(count, 0), vector(count, 1)
    exact = np.dot(x.astype(np.float64), y)
    assert dot(device, x, y) == pytest.approx(exact, rel=1e-13, abs=1e-10)
    assert dot(device, x, y) == dot(device, x, y)


@each_count
def test_what_lies_beyond_a_limit_is_counted(device, count):
    x = vector(count, 2)
    x[0] = -1.5
    assert count_beyond(device, x, 1.5) == np.count_nonzero(np.abs(x) > 1.5)
    assert count_beyond(device, x, 1.4) == np.count_nonzero(np.abs(x) > 1.4) >= 1
    assert count_beyond(device, np.full_like(x, np.nan), 0) == 0


def test_small_terms_are_not_lost_beside_large_ones(device):
    x = np.full(1 << 20, 1e-4, np.float32)
    x[0] = 3e3
    exact = math.fsum(x.astype(np.float64) ** 2)
    assert dot(device, x, x) == pytest.approx(exact, rel=2e-14)


@each_count
def test_vectors_are_combined(device, count):
    x, y = vector(count, 2), vector(count, 3)
    np.testing.assert_allclose(combine(device, 2.5, x, -0.5, y), 2.5 * x - 0.5 * y, atol=2e-6)


def test_coefficients_are_read_where_the_work_runs(device):
    x, y = vector(100, 4), vector(100, 5)
    numbers, held = device.memory.upload(np.array([3.0, 4.0, 0.0]))
    three, four, nothing = (numbers + 8 * n for n in range(3))
    np.testing.assert_allclose(
        combine(device, Ratio(three, four, -2), x, 1, y), y - 1.5 * x, atol=2e-6
    )
    np.testing.assert_allclose(
        combine(device, 1, x, Ratio(four, three), y), x + 4 / 3 * y, atol=2e-6
    )
    # a residual of zero: no step, and no NaN
    np.testing.assert_array_equal(combine(device, Ratio(nothing, nothing), x, 1, y), y)
    del held


def test_a_vector_is_scaled_in_place(twin_device):
    pointer, held = twin_device.memory.upload(vector(50, 6))
    twin_device.library.combine(50, 1, pointer, 2, pointer)
    np.testing.assert_allclose(twin_device.memory.download(held), 3 * vector(50, 6), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, X, Y, RESULT, WORKSPACE), GeometryError, "count must be 1 to 2147483647, got 0"),
        ((2**31, X, Y, RESULT, WORKSPACE), GeometryError, "got 2147483648"),
        ((9, 0, Y, RESULT, WORKSPACE), UsageError, "x is a null pointer"),
        ((9, X, Y + 2, RESULT, WORKSPACE), UsageError, "y must be aligned to 4"),
        ((9, X, Y, RESULT + 4, WORKSPACE), UsageError, "result must be aligned to 8"),
        ((9, X, Y, RESULT, WORKSPACE + 8), UsageError, "workspace must be aligned to 256"),
        ((9, X, Y, WORKSPACE + 16, WORKSPACE), UsageError, "result and workspace overlap"),
        ((9, WORKSPACE + 64, Y, RESULT, WORKSPACE), UsageError, "workspace and x overlap"),
    ],
)
def test_dot_products_that_cannot_be(twin_device, arguments, error, text):
    with pytest.raises(error, match=text):
        twin_device.library.dot(*arguments)


def test_combinations_that_cannot_be(twin, twin_device):
    with pytest.raises(UsageError, match="x and y overlap"):
        twin_device.library.combine(9, 1, X, 1, X + 4)
    half = Coefficient(1.0, RESULT, None)
    seen = twin.qsm_cuda_combine(9, half, X, Coefficient(1.0, None, None), Y, None)
    assert seen == Status.NULL_POINTER
    assert "a has a numerator or a denominator" in twin.qsm_cuda_last_error().decode()
    assert ctypes.sizeof(Coefficient) == 24
