"""The dipole operator: its definition, the analytic sphere, and the properties it must have."""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsm_deploy.kernels import dipole
from qsm_deploy.kernels.dipole import dipole_convolve, dipole_kernel, tikhonov, tkd
from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry

GRIDS = {
    "even": Geometry((16, 12, 10)),
    "odd": Geometry((7, 9, 11)),
    "mixed oblique": Geometry((8, 9, 10), b0_direction=(0.3, -0.5, 0.8)),
    "even oblique anisotropic": Geometry((12, 8, 10), (0.6, 0.7, 2.0), (0.6, 0.2, 0.7)),
    "odd oblique anisotropic": Geometry((9, 13, 7), (2.0, 0.6, 0.9), (-0.1, 0.9, 0.4)),
    "flat": Geometry((1, 8, 5), (1.0, 1.0, 3.0), (0.5, 0.5, 0.7)),
}
Operator = Callable[..., np.ndarray]
OPERATORS: dict[str, tuple[Operator, dict[str, float], Callable[[np.ndarray], np.ndarray]]] = {
    "D": (dipole_convolve, {}, lambda d: d),
    "D squared": (dipole_convolve, {"power": 2}, lambda d: d**2),
    "TKD": (
        tkd,
        {"threshold": 0.19},
        lambda d: np.where(abs(d) < 1e-6, 0, np.sign(d)) / np.maximum(abs(d), 0.19),
    ),
    "Tikhonov": (tikhonov, {"lam": 0.01}, lambda d: d / (d**2 + 0.01)),
}
each_grid = pytest.mark.parametrize("geometry", GRIDS.values(), ids=GRIDS)
each_operator = pytest.mark.parametrize(
    ("operator", "settings_", "g"), OPERATORS.values(), ids=OPERATORS
)


def random_volume(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def exact_dipole(geometry: Geometry, sign: int = 1) -> np.ndarray:
    """Return D(sign k) in double precision, voxel by voxel as the definition reads."""
    d = np.zeros(geometry.shape)
    for index in np.ndindex(geometry.shape):
        k = np.array(
            [
                np.fft.fftfreq(n, step)[sign * i % n]
                for i, n, step in zip(index, geometry.shape, geometry.voxel_size_mm, strict=True)
            ]
        )
        if k.any():
            d[index] = 1 / 3 - (k @ geometry.b0_direction) ** 2 / (k @ k)
    return d


def relative_error(seen: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(seen - expected) / np.linalg.norm(expected))


@each_grid
@each_operator
def test_it_is_the_symmetrised_complex_transform(geometry, operator, settings_, g):
    x = random_volume(geometry.shape)
    e = (g(exact_dipole(geometry)) + g(exact_dipole(geometry, -1))) / 2
    expected = np.fft.ifftn(e * np.fft.fftn(x.astype(np.float64)))
    assert np.abs(expected.imag).max() < 1e-12  # a real operator, whatever the transform
    seen = operator(x, geometry, **settings_)
    assert seen.dtype == np.float32
    assert relative_error(seen, expected.real) < 1e-6


def test_the_square_is_not_the_operator_twice():
    geometry = GRIDS["even oblique anisotropic"]
    x = random_volume(geometry.shape)
    twice = dipole_convolve(dipole_convolve(x, geometry), geometry)
    assert relative_error(twice, dipole_convolve(x, geometry, power=2)) > 0.01


@each_grid
def test_the_kernel_is_the_symmetrised_dipole(geometry):
    expected = (exact_dipole(geometry) + exact_dipole(geometry, -1)) / 2
    kernel = dipole_kernel(geometry)
    np.testing.assert_allclose(kernel, expected, atol=1e-6)
    assert kernel[0, 0, 0] == 0
    mirrored = np.roll(kernel[::-1, ::-1, ::-1], 1, axis=(0, 1, 2))
    np.testing.assert_array_equal(kernel, mirrored)


def test_slabs_change_nothing(monkeypatch):
    geometry = GRIDS["even oblique anisotropic"]
    x = random_volume(geometry.shape)
    whole = tkd(x, geometry, threshold=0.1)
    monkeypatch.setattr(dipole, "SLAB_VOXELS", 1)
    np.testing.assert_array_equal(tkd(x, geometry, threshold=0.1), whole)


@each_grid
@each_operator
def test_it_is_linear_and_self_adjoint(geometry, operator, settings_, g):
    x, y = random_volume(geometry.shape, 1), random_volume(geometry.shape, 2)
    apply = lambda v: operator(v, geometry, **settings_, pad_voxels=(0, 2, 1))  # noqa: E731
    combined = apply(np.float32(2.5) * x - y)
    assert relative_error(combined, 2.5 * apply(x) - apply(y)) < 1e-5
    scale = np.linalg.norm(apply(x)) * np.linalg.norm(y)
    assert abs(np.vdot(apply(x), y) - np.vdot(x, apply(y))) < 1e-6 * scale


@each_grid
@each_operator
def test_without_padding_the_output_has_no_mean(geometry, operator, settings_, g):
    y = operator(random_volume(geometry.shape) + np.float32(1), geometry, **settings_)
    assert abs(y.mean(dtype=np.float64)) < 1e-6 * np.abs(y).max()


@each_operator
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_it_turns_with_b0(operator, settings_, g, order):
    geometry = GRIDS["even oblique anisotropic"]
    x = random_volume(geometry.shape)

    def turned(values):
        return tuple(np.array(values)[list(order)].tolist())

    other = Geometry(*map(turned, (geometry.shape, geometry.voxel_size_mm, geometry.b0_direction)))
    expected = operator(x, geometry, **settings_).transpose(order)
    assert relative_error(operator(x.transpose(order), other, **settings_), expected) < 1e-6


@each_operator
def test_it_turns_with_b0_by_a_right_angle(operator, settings_, g):
    axial = Geometry((9, 9, 11), b0_direction=(0.6, 0, 0.8))
    quarter_turn = Geometry((9, 9, 11), b0_direction=(0, 0.6, 0.8))
    x = random_volume(axial.shape)
    expected = np.rot90(operator(x, axial, **settings_), axes=(0, 1))
    seen = operator(np.rot90(x, axes=(0, 1)), quarter_turn, **settings_)
    assert relative_error(seen, expected) < 1e-6


@each_operator
def test_the_sign_of_b0_means_nothing(operator, settings_, g):
    geometry = GRIDS["mixed oblique"]
    opposite = Geometry(geometry.shape, b0_direction=tuple(-b for b in geometry.b0_direction))
    x = random_volume(geometry.shape)
    np.testing.assert_array_equal(
        operator(x, geometry, **settings_), operator(x, opposite, **settings_)
    )


@each_operator
@pytest.mark.parametrize("pad", [3, (0, 2, 5)])
def test_padding_is_a_larger_volume_cropped(operator, settings_, g, pad):
    geometry = GRIDS["odd oblique anisotropic"]
    x = random_volume(geometry.shape)
    pads = np.broadcast_to(pad, 3)
    larger = np.pad(x, [(p, p) for p in pads])
    whole = operator(
        larger,
        Geometry(larger.shape, geometry.voxel_size_mm, geometry.b0_direction),
        **settings_,
    )
    inner = tuple(slice(p, p + n) for p, n in zip(pads, geometry.shape, strict=True))
    np.testing.assert_array_equal(operator(x, geometry, **settings_, pad_voxels=pad), whole[inner])


def sphere(n: int, radius: float, per_axis: int = 5) -> np.ndarray:
    """Return how much of every voxel a sphere about voxel n / 2 fills, by counting subvoxels."""
    fine = ((np.arange(n * per_axis) + 0.5) / per_axis - 0.5 - n / 2).astype(np.float32)
    x, y, z = np.ix_(fine, fine, fine)
    inside = (x * x + y * y + z * z < radius**2).astype(np.float32)
    filled: np.ndarray = inside.reshape(n, per_axis, n, per_axis, n, per_axis).mean(axis=(1, 3, 5))
    return filled


@pytest.mark.parametrize(
    ("b0_direction", "tolerance"), [((0, 0, 1), 0.01), ((0, 1, 0), 0.01), ((0.5, -0.3, 0.8), 0.05)]
)
def test_the_field_of_a_sphere_is_the_analytic_one(b0_direction, tolerance):
    n, radius, chi = 48, 8, 0.1
    geometry = Geometry((n, n, n), (1.2, 1.2, 1.2), b0_direction)
    seen = dipole_convolve(chi * sphere(n, radius), geometry, pad_voxels=n // 2)

    position = np.stack(np.meshgrid(*[np.arange(n) - n / 2] * 3, indexing="ij"), axis=-1)
    r = np.linalg.norm(position, axis=-1)
    outside, inside = r > radius + 1.5, r < radius - 3
    along_b = (position @ geometry.b0_direction)[outside] / r[outside]
    expected = chi / 3 * (radius / r[outside]) ** 3 * (3 * along_b**2 - 1)
    assert relative_error(seen[outside], expected) < tolerance
    assert np.abs(seen[inside]).max() < tolerance * chi / 3


def test_tkd_is_bounded_and_zero_on_the_magic_cone():
    geometry = Geometry((8, 8, 8))
    kernel = dipole_kernel(geometry)
    on_cone = np.abs(kernel) < 1e-6
    on_cone[0, 0, 0] = False
    assert on_cone[1, 1, 1]  # k along (1, 1, 1) makes the magic angle with z

    impulse = np.zeros(geometry.shape, np.float32)
    impulse[0, 0, 0] = 1
    gain = np.fft.fftn(tkd(impulse, geometry, threshold=0.2).astype(np.float64)).real
    assert np.abs(gain[on_cone]).max() < 1e-6
    assert np.abs(gain).max() == pytest.approx(5, rel=1e-6)
    large = np.abs(kernel) > 0.2
    np.testing.assert_allclose(gain[large] * kernel[large], 1, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.floats(0.2, 5)] * 3),
    st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda b: max(map(abs, b)) > 0.01),
)
def test_any_grid_has_a_real_even_bounded_kernel(shape, voxel_size_mm, b0_direction):
    kernel = dipole_kernel(Geometry(shape, voxel_size_mm, b0_direction))
    assert kernel.shape == shape
    assert -2 / 3 - 1e-6 <= kernel.min() <= kernel.max() <= 1 / 3 + 1e-6
    assert np.abs(np.fft.ifftn(kernel).imag).max() < 1e-6


def test_a_volume_of_another_shape_is_refused():
    with pytest.raises(GeometryError, match=r"\(4, 5, 6\).*\(6, 5, 4\)"):
        dipole_convolve(random_volume((4, 5, 6)), Geometry((6, 5, 4)))


@pytest.mark.parametrize("threshold", [0.0, -0.1, 0.7, np.nan])
def test_a_threshold_outside_the_range_of_d_is_refused(threshold):
    geometry = GRIDS["even"]
    with pytest.raises(UsageError, match="threshold"):
        tkd(random_volume(geometry.shape), geometry, threshold=threshold)


@pytest.mark.parametrize("lam", [0.0, -0.1, np.nan, np.inf])
def test_a_weight_that_is_not_positive_is_refused(lam):
    geometry = GRIDS["even"]
    with pytest.raises(UsageError, match="lam"):
        tikhonov(random_volume(geometry.shape), geometry, lam=lam)
