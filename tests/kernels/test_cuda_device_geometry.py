"""The operator with a geometry that lies on the GPU: that of the host, or NaN."""

import ctypes
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsm_deploy.kernels.cuda_abi import Status
from qsm_deploy.kernels.cuda_library import CudaLibrary, DipoleOperator
from qsm_deploy.kernels.errors import EngineError, GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry

SHAPES = [(8, 12, 10), (7, 9, 5), (13, 7, 4), (1, 1, 1), (2, 3, 140)]
MULTIPLIERS = ("dipole", "dipole_squared", "tkd", "tikhonov", "tikhonov_prior")
VOXEL, B0 = (0.5, 0.75, 2.0), (0.25, -0.5, 0.75)  # exact in float32
X, Y, WORKSPACE, GEOMETRY = 1 << 20, 2 << 20, 3 << 20, 4 << 20  # never followed


def operator_of(geometry, multiplier="dipole", batch=1):
    return DipoleOperator(geometry, multiplier, batch, threshold=0.19, lam=0.02)


def apply(device, operator, x, device_geometry=None):
    """Return the output for the operator's geometry, or one given in device memory."""
    library, memory = device.library, device.memory
    needed = library.dipole_workspace_bytes(operator)
    workspace, _held = memory.upload(np.full(needed, 0xFF, np.uint8))
    x_pointer, _x = memory.upload(x)
    y_pointer, y = memory.upload(np.zeros_like(x))
    buffers = (x_pointer, y_pointer, workspace, needed)
    if device_geometry is None:
        library.dipole_apply(operator, *buffers)
    else:
        vectors = [memory.upload(np.float32(vector)) for vector in device_geometry]
        pointers = tuple(pointer for pointer, _ in vectors)
        library.dipole_apply_device_geometry(operator, pointers, *buffers)
    return memory.download(y)


def volumes(shape, batch=1):
    return np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_it_is_the_geometry_of_the_host(device, multiplier, shape):
    x = volumes(shape, batch=2)
    expected = apply(device, operator_of(Geometry(shape, VOXEL, B0), multiplier, 2), x)
    seen = apply(device, operator_of(Geometry(shape), multiplier, 2), x, (VOXEL, B0))
    if device.memory.exact:
        np.testing.assert_array_equal(seen, expected)
    else:
        assert np.linalg.norm(seen - expected) <= 1e-6 * max(np.linalg.norm(expected), 1e-30)


def test_the_operator_s_own_geometry_is_not_read(device):
    x = volumes((6, 5, 4))
    others = [Geometry((6, 5, 4)), Geometry((6, 5, 4), (3.0, 0.1, 1.0), (1.0, 0.0, 0.0))]
    first, second = (apply(device, operator_of(own), x, (VOXEL, B0)) for own in others)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e30])
def test_the_direction_may_have_any_norm(device, scale):
    x, operator = volumes((6, 5, 4)), operator_of(Geometry((6, 5, 4)))
    seen = apply(device, operator, x, (VOXEL, np.multiply(B0, scale)))
    expected = apply(device, operator, x, (VOXEL, B0))
    assert np.linalg.norm(seen - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize(
    "geometry",
    [
        ((0.0, 1.0, 1.0), B0),
        ((1.0, -1.0, 1.0), B0),
        ((1.0, 1.0, 101.0), B0),
        ((math.nan, 1.0, 1.0), B0),
        ((1.0, math.inf, 1.0), B0),
        (VOXEL, (0.0, 0.0, 0.0)),
        (VOXEL, (math.nan, 0.0, 1.0)),
        (VOXEL, (0.0, 0.0, math.inf)),
    ],
    ids=str,
)
def test_a_geometry_that_cannot_be_gives_nothing_but_nan(device, multiplier, geometry):
    x = volumes((4, 6, 5), batch=2)
    seen = apply(device, operator_of(Geometry((4, 6, 5)), multiplier, 2), x, geometry)
    assert np.isnan(seen).all()


BAD_BUFFERS = [
    ((0, GEOMETRY, X, Y), Status.NULL_POINTER, "voxel_size_mm is a null pointer"),
    ((GEOMETRY, 0, X, Y), Status.NULL_POINTER, "b0_direction is a null pointer"),
    ((GEOMETRY + 2, GEOMETRY, X, Y), Status.MISALIGNED, "voxel_size_mm must be aligned to 4"),
    ((GEOMETRY, WORKSPACE, X, Y), Status.OVERLAP, "b0_direction and workspace overlap"),
    ((GEOMETRY, GEOMETRY, 0, Y), Status.NULL_POINTER, "x is a null pointer"),
    ((GEOMETRY, GEOMETRY, X, WORKSPACE), Status.OVERLAP, "y and workspace overlap"),
]


@pytest.mark.parametrize(("buffers", "status", "text"), BAD_BUFFERS)
def test_buffers_that_cannot_be(twin, buffers, status, text):
    op = twin.qsm_cuda_dipole_default()
    seen = twin.qsm_cuda_dipole_apply_device_geometry(op, *buffers, WORKSPACE, 4096, None)
    assert seen == status
    assert text in twin.qsm_cuda_last_error().decode()


def test_shape_and_multiplier_are_checked(twin_device):
    library, buffers = twin_device.library, (X, Y, WORKSPACE, 1 << 20)
    with pytest.raises(GeometryError, match="batch"):
        library.dipole_apply_device_geometry(
            DipoleOperator(Geometry((4, 4, 4)), batch=0), (GEOMETRY, GEOMETRY), *buffers
        )
    with pytest.raises(UsageError, match="threshold"):
        library.dipole_apply_device_geometry(
            DipoleOperator(Geometry((4, 4, 4)), "tkd", threshold=2), (GEOMETRY, GEOMETRY), *buffers
        )


sizes = st.tuples(*[st.integers(1, 9)] * 4)


@given(sizes, sizes)
def test_the_bound_is_enough_for_whatever_is_nowhere_larger(twin_device, one, other):
    library = twin_device.library

    def operator(batch, *shape):
        return DipoleOperator(Geometry(shape), batch=batch)

    largest = operator(*map(max, one, other))
    bound = library.dipole_workspace_bound(largest)
    for smaller in (operator(*one), operator(*other), largest):
        assert library.dipole_workspace_bound(smaller) <= bound
        assert library.dipole_workspace_bytes(smaller) <= bound


def test_the_bound_has_room_for_the_worst_case_of_cufft(twin_device):
    shape = (160, 192, 160)
    voxels = 2 * math.prod(shape)
    bound = twin_device.library.dipole_workspace_bound(DipoleOperator(Geometry(shape), batch=2))
    spectra = 8 * voxels // 160 * 81
    assert 64 * voxels + spectra <= bound <= 64 * voxels + spectra + (1 << 20) + 512


def test_the_bound_needs_no_gpu(twin):
    twin.host_twin_set_gpu(Status.NO_DRIVER)
    op, needed = twin.qsm_cuda_dipole_default(), ctypes.c_size_t()
    assert twin.qsm_cuda_dipole_workspace(op, needed) == Status.NO_DRIVER
    assert twin.qsm_cuda_dipole_workspace_bound(op, needed) == Status.OK
    assert needed.value > 0


def test_without_a_gpu_it_says_so(twin):
    twin.host_twin_set_gpu(Status.NO_GPU)
    with pytest.raises(EngineError):
        CudaLibrary(twin).dipole_apply_device_geometry(
            DipoleOperator(Geometry((1, 1, 1))), (GEOMETRY, GEOMETRY), X, Y, WORKSPACE, 4096
        )


def test_the_largest_threshold_may_be_rounded_to_float32(twin_device):
    largest = DipoleOperator(Geometry((4, 4, 4)), "tkd", threshold=float(np.float32(2 / 3)))
    assert largest.threshold > 2 / 3
    assert twin_device.library.dipole_workspace_bytes(largest) > 0
