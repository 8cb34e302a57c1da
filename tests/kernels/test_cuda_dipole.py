"""The CUDA operator against numpy: on the host twin always, on a GPU where there is one."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsm_deploy.kernels.cuda_library import DipoleOperator
from qsm_deploy.kernels.dipole import dipole_convolve, dipole_filter, tikhonov, tkd
from qsm_deploy.kernels.geometry import Geometry

GRIDS = {
    "even": Geometry((8, 12, 10)),
    "odd": Geometry((7, 9, 5)),
    "prime oblique": Geometry((13, 7, 11), b0_direction=(0.3, -0.5, 0.8)),
    "even oblique anisotropic": Geometry((12, 8, 10), (0.6, 0.7, 2.0), (0.6, 0.2, 0.7)),
    "odd oblique anisotropic": Geometry((9, 13, 7), (2.0, 0.6, 0.9), (-0.1, 0.9, 0.4)),
    "odd and even": Geometry((5, 6, 4), (1.0, 0.5, 0.8), (0.7, 0.1, 0.2)),
    "one x": Geometry((1, 8, 5), (1.0, 1.0, 3.0), (0.5, 0.5, 0.7)),
    "one z": Geometry((6, 4, 1), (1.0, 1.0, 3.0), (0.5, 0.5, 0.7)),
    "one voxel": Geometry((1, 1, 1)),
    "longer than a warp": Geometry((2, 3, 140), (1.0, 2.0, 0.5), (0.2, 0.3, 0.9)),
}
NUMPY = {
    "dipole": lambda x, geometry: dipole_convolve(x, geometry),
    "dipole_squared": lambda x, geometry: dipole_convolve(x, geometry, power=2),
    "tkd": lambda x, geometry: tkd(x, geometry, threshold=0.19),
    "tikhonov": lambda x, geometry: tikhonov(x, geometry, lam=0.02),
    "tikhonov_prior": lambda x, geometry: dipole_filter(
        x, geometry, lambda d: np.float32(0.02) / (d * d + np.float32(0.02))
    ),
}
each_grid = pytest.mark.parametrize("geometry", GRIDS.values(), ids=GRIDS)
each_multiplier = pytest.mark.parametrize("multiplier", NUMPY)
SENTINEL = 64


def random_volumes(shape, batch=1, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, *shape), dtype=np.float32)


def operator_of(geometry, multiplier="dipole", batch=1):
    return DipoleOperator(geometry, multiplier, batch, threshold=0.19, lam=0.02)


def apply(device, operator, x):
    """Return the operator's output, from memory that was NaN before, and of the exact size."""
    library, memory = device.library, device.memory
    needed = library.dipole_workspace_bytes(operator)
    workspace, workspace_held = memory.upload(np.full(needed + SENTINEL, 0xFF, np.uint8))
    x_pointer, x_held = memory.upload(x)
    y_pointer, y_held = memory.upload(np.full_like(x, np.nan))
    library.dipole_apply(operator, x_pointer, y_pointer, workspace, needed)
    y = memory.download(y_held)
    np.testing.assert_array_equal(memory.download(x_held), x)
    assert (memory.download(workspace_held)[needed:] == 0xFF).all()
    return y


def assert_close(seen, expected, tolerance=1e-6):
    size = max(np.linalg.norm(expected), 1e-30)
    assert np.linalg.norm(seen - expected) <= tolerance * size


@each_grid
@each_multiplier
def test_it_is_the_numpy_operator(device, geometry, multiplier):
    x = random_volumes(geometry.shape, batch=2)
    seen = apply(device, operator_of(geometry, multiplier, batch=2), x)
    for volume, output in zip(x, seen, strict=True):
        assert_close(output, NUMPY[multiplier](volume, geometry))


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*[st.integers(1, 7)] * 3),
    st.tuples(*[st.floats(0.2, 5)] * 3),
    st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda b: max(map(abs, b)) > 0.01),
)
def test_any_grid_gives_what_numpy_gives(twin_device, shape, voxel_size_mm, b0_direction):
    geometry = Geometry(shape, voxel_size_mm, b0_direction)
    x = random_volumes(shape)
    seen = apply(twin_device, operator_of(geometry), x)[0]
    assert np.linalg.norm(seen - dipole_convolve(x[0], geometry)) <= 2e-6 * np.linalg.norm(x)


@each_multiplier
def test_the_output_may_be_the_input(device, multiplier):
    geometry = GRIDS["prime oblique"]
    operator = operator_of(geometry, multiplier)
    x = random_volumes(geometry.shape)
    needed = device.library.dipole_workspace_bytes(operator)
    workspace, workspace_held = device.memory.upload(np.zeros(needed, np.uint8))
    pointer, held = device.memory.upload(x)
    device.library.dipole_apply(operator, pointer, pointer, workspace, needed)
    np.testing.assert_array_equal(device.memory.download(held), apply(device, operator, x))
    del workspace_held


def test_only_the_axis_of_b0_counts(device):
    geometry = GRIDS["even oblique anisotropic"]
    x = random_volumes(geometry.shape)
    expected = apply(device, operator_of(geometry, "tkd"), x)
    opposite = Geometry(
        geometry.shape, geometry.voxel_size_mm, tuple(-b for b in geometry.b0_direction)
    )
    np.testing.assert_array_equal(apply(device, operator_of(opposite, "tkd"), x), expected)


def test_the_norm_of_the_direction_means_nothing(twin):
    geometry = GRIDS["odd and even"]
    outputs = []
    for scale in (1, 1e-3, 1e50):
        struct = operator_of(geometry)._as_struct()
        struct.b0_direction = type(struct.b0_direction)(*(scale * b for b in (0.0, 0.6, -0.8)))
        x = random_volumes(geometry.shape)
        workspace = np.zeros(1 << 16, np.uint8)
        start = workspace.ctypes.data + -workspace.ctypes.data % 256
        y = np.full_like(x, np.nan)
        status = twin.qsm_cuda_dipole_apply(struct, x.ctypes.data, y.ctypes.data, start, 60000, 0)
        assert status == 0, twin.qsm_cuda_last_error()
        outputs.append(y)
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-6)
    np.testing.assert_allclose(outputs[2], outputs[0], atol=1e-6)


def test_isotropic_cubes_are_zero_on_the_magic_cone(device):
    geometry = Geometry((8, 8, 8), (0.7, 0.7, 0.7))  # 1 / (8 * 0.7) is no binary number
    impulse = np.zeros((1, 8, 8, 8), np.float32)
    impulse[0, 0, 0, 0] = 1
    gain = np.fft.fftn(apply(device, operator_of(geometry, "tkd"), impulse)[0]).real
    for index in ((1, 1, 1), (2, 2, 2), (-3, 3, 3), (1, -1, 1)):
        assert abs(gain[index]) < 1e-6


def test_threads_may_share_shapes(twin_device):
    chosen = [GRIDS["odd"], GRIDS["even"], GRIDS["prime oblique"]]
    operators = [operator_of(g, m) for g in chosen for m in NUMPY] * 20

    def run(numbered):
        number, operator = numbered
        x = random_volumes(operator.geometry.shape, seed=number)
        return apply(twin_device, operator, x)[0]

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(run, enumerate(operators)))
    for number, (operator, output) in enumerate(zip(operators, outputs, strict=True)):
        x = random_volumes(operator.geometry.shape, seed=number)[0]
        assert_close(output, NUMPY[operator.multiplier](x, operator.geometry))
