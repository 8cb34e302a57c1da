"""Total variation in the CUDA library against float64 numpy: each step, and the whole iteration."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.fft

from qsm_deploy.kernels.cuda_library import DipoleOperator, VariationBuffers
from qsm_deploy.kernels.dipole import dipole_kernel, tkd
from qsm_deploy.kernels.errors import GeometryError, UsageError
from qsm_deploy.kernels.geometry import Geometry

GRIDS = {
    "even": Geometry((8, 12, 10)),
    "odd oblique anisotropic": Geometry((9, 13, 7), (2.0, 0.6, 0.9), (-0.1, 0.9, 0.4)),
    "even oblique anisotropic": Geometry((12, 8, 10), (0.6, 0.7, 2.0), (0.6, 0.2, 0.7)),
    "longer than a warp": Geometry((3, 2, 70), (1.0, 2.0, 0.5), (0.2, 0.3, 0.9)),
    "one slice": Geometry((6, 4, 1), (1.0, 1.0, 3.0), (0.5, 0.5, 0.7)),
    "one voxel": Geometry((1, 1, 1)),
}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
ALPHA, MU3 = 2e-4, 0.01
VOLUMES = ("x", "q2", "b", "s3")


def gradient(x, grid):
    return np.stack([(np.roll(x, -1, a) - x) / h for a, h in enumerate(grid.voxel_size_mm)])


def adjoint(v, grid):
    return sum((np.roll(v[a], 1, a) - v[a]) / h for a, h in enumerate(grid.voxel_size_mm))


class Reference:
    """The iteration in float64, as its equations read."""

    def __init__(self, grid, field, mask, support, alpha=ALPHA):
        self.grid, self.field, self.mask, self.support = grid, field, mask, support
        self.mu1, self.d = 100 * alpha, dipole_kernel(grid).astype(np.float64)
        delta = np.zeros(grid.shape)
        delta[0, 0, 0] = 1
        laplacian = scipy.fft.fftn(adjoint(gradient(delta, grid), grid)).real
        self.normal = self.d**2 + self.mu1 * laplacian + MU3
        self.s1, self.s3 = np.zeros((3, *grid.shape)), np.zeros(grid.shape)

    def split(self, x, predicted, limit=0.01):
        v = gradient(x, self.grid) + self.s1
        self.s1 = np.clip(v, -limit, limit)
        self.s3 = ~self.support * (self.s3 + x)
        b = MU3 * (self.support * x - self.s3)
        b += self.mu1 * adjoint(v - 2 * self.s1, self.grid)
        return b, self.field * self.mask + ~self.mask * predicted

    def solve(self, b, q2):
        spectrum = (scipy.fft.fftn(b) + self.d * scipy.fft.fftn(q2)) / self.normal
        return scipy.fft.ifftn(spectrum).real, scipy.fft.ifftn(self.d * spectrum).real

    def run(self, iterations):
        x = self.mask * tkd(self.field.astype(np.float64) * self.mask, self.grid, threshold=0.2)
        predicted = scipy.fft.ifftn(self.d * scipy.fft.fftn(x)).real
        for n in range(iterations):
            x, predicted = self.solve(*self.split(x, predicted, 0.01 * (n > 0)))
        return x, predicted


class Problem:
    """Volumes on a device, those that are made full of NaN."""

    def __init__(self, device, grid, *, seed=0, alpha=ALPHA, mu3=MU3):
        random = np.random.default_rng(seed)
        self.device, self.grid = device, grid
        self.mask = random.random(grid.shape) < 0.5
        self.support = self.mask | (random.random(grid.shape) < 0.3)
        self.field = (0.03 * random.standard_normal(grid.shape)).astype(np.float32)
        self.at, self.held = {}, {}
        blank = np.full(grid.shape, np.nan, np.float32)
        for name, value in {
            "field": np.where(self.mask, self.field, np.float32(np.nan)),
            "mask": self.mask.view(np.uint8),
            "support": 255 * self.support.view(np.uint8),
            **dict.fromkeys(VOLUMES, blank),
            **{name: np.stack([blank] * 3) for name in ("s1", "s1_next")},
        }.items():
            self.put(name, value)
        self.workspace_bytes = device.library.tv_workspace_bytes(grid)
        self.put("workspace", np.full(self.workspace_bytes, 0xFF, np.uint8))
        named = {name: self.at[name] for name in ("field", "mask", "support", *VOLUMES)}
        self.tv = VariationBuffers(grid, alpha, 100 * alpha, mu3, **named)

    def put(self, name, value):
        self.at[name], self.held[name] = self.device.memory.upload(value)

    def get(self, name):
        return self.device.memory.download(self.held[name])

    def write(self, **volumes):
        for name, value in volumes.items():
            self.put(name, value.astype(np.float32))
        self.tv = replace(self.tv, **{n: self.at[n] for n in volumes if n in (*VOLUMES, "field")})

    def split(self, first=False):
        tv = replace(self.tv, alpha=0.0) if first else self.tv
        self.device.library.tv_split(tv, self.at["s1"], self.at["s1_next"])

    def solve(self):
        self.device.library.tv_solve(self.tv, self.at["workspace"], self.workspace_bytes)

    def reference(self):
        return Reference(self.grid, self.field, self.mask, self.support)


def assert_close(seen, expected, tolerance=1e-6):
    assert np.linalg.norm(seen - expected) <= tolerance * max(np.linalg.norm(expected), 1e-30)


@each_grid
def test_a_solve_is_numpy_s(device, grid):
    problem = Problem(device, grid)
    b, q2 = np.random.default_rng(1).standard_normal((2, *grid.shape), dtype=np.float32)
    problem.write(b=b, q2=q2)
    problem.solve()
    x, predicted = problem.reference().solve(b.astype(np.float64), q2)
    assert_close(problem.get("x"), x, 2e-6)
    assert_close(problem.get("q2"), predicted, 2e-6)
    np.testing.assert_array_equal(problem.get("b"), b)


@each_grid
@pytest.mark.parametrize("first", [False, True])
def test_a_split_is_numpy_s(device, grid, first):
    problem, reference = Problem(device, grid), Problem(device, grid).reference()
    x, predicted, s3 = 0.05 * np.random.default_rng(2).standard_normal((3, *grid.shape))
    s1 = np.random.default_rng(3).uniform(-0.01, 0.01, (3, *grid.shape))
    problem.write(x=x, q2=predicted, s3=np.where(problem.support, np.nan, s3), s1=s1)
    reference.s1, reference.s3 = s1, s3 * ~problem.support
    problem.split(first)
    b, q2 = reference.split(x, predicted, 0 if first else 0.01)
    assert_close(problem.get("b"), b)
    assert_close(problem.get("q2"), q2)
    assert_close(problem.get("s1_next"), reference.s1)
    outside = ~problem.support  # what lies inside is never read
    assert_close(problem.get("s3")[outside], reference.s3[outside])
    np.testing.assert_array_equal(problem.get("s1"), s1.astype(np.float32))


@each_grid
def test_a_split_takes_the_adjoint_of_the_gradient(device, grid):
    """<G x, v> = <x, G^T v>, which b holds where there is no map."""
    problem = Problem(device, grid)
    x, zeros = np.random.default_rng(4).standard_normal(grid.shape), np.zeros(grid.shape)
    v = np.random.default_rng(5).standard_normal((3, *grid.shape)).astype(np.float32)
    problem.write(x=zeros, s3=zeros, q2=zeros, s1=v)
    problem.split(first=True)
    seen = np.vdot(x, problem.get("b").astype(np.float64)) / problem.tv.mu1
    assert seen == pytest.approx(np.vdot(gradient(x, grid), v), rel=1e-5, abs=1e-12)


@each_grid
def test_the_iteration_is_numpy_s(device, grid):
    problem, zeros = Problem(device, grid), np.zeros(grid.shape)
    problem.write(field=problem.field * problem.mask, s3=zeros, s1=np.stack([zeros] * 3))
    library, scratch = device.library, (problem.at["workspace"], problem.workspace_bytes)
    start = DipoleOperator(grid, "tkd", threshold=0.2)
    library.dipole_apply(start, problem.at["field"], problem.at["x"], *scratch)
    problem.write(x=problem.get("x") * problem.mask)
    library.dipole_apply(DipoleOperator(grid), problem.at["x"], problem.at["q2"], *scratch)
    for n in range(30):
        problem.split(first=n == 0)
        for held in (problem.at, problem.held):
            held["s1"], held["s1_next"] = held["s1_next"], held["s1"]
        problem.solve()
    expected, predicted = problem.reference().run(30)
    assert_close(problem.get("x"), expected, 1e-5)
    assert_close(problem.get("q2"), predicted, 1e-5)


def test_a_batch_is_its_volumes(device):
    grid = GRIDS["odd oblique anisotropic"]
    problems = [Problem(device, grid, seed=seed) for seed in (0, 1)]
    state = np.random.default_rng(5).standard_normal((2, 7, *grid.shape))
    handle = device.library._handle
    both = Problem(device, replace(grid, shape=(18, 13, 7)))  # as many voxels as two
    names = ("field", "x", "q2", "s3")
    for problem, (x, q2, s3, *s1, _) in zip(problems, state, strict=True):
        problem.write(x=x, q2=q2, s3=s3, s1=np.stack(s1), field=problem.field)
    joined = {n: np.concatenate([p.get(n) for p in problems]) for n in names}
    s1 = np.concatenate([p.get("s1") for p in problems], axis=1)
    both.write(**joined, s1=s1)
    for name in ("mask", "support"):
        both.put(name, np.concatenate([p.get(name) for p in problems]))
    named = {name: both.at[name] for name in ("field", "mask", "support", *VOLUMES)}
    struct = replace(both.tv, geometry=grid, **named)._as_struct()
    struct.grid.batch = 2
    assert handle.qsm_cuda_tv_split(struct, both.at["s1"], both.at["s1_next"], None) == 0
    for problem in problems:
        problem.split()
    seen = [both.get("b"), both.get("q2")]
    for volume, name in zip(seen, ("b", "q2"), strict=True):
        np.testing.assert_array_equal(volume, np.concatenate([p.get(name) for p in problems]))
    seen = both.get("s1_next")
    np.testing.assert_array_equal(
        seen, np.concatenate([p.get("s1_next") for p in problems], axis=1)
    )


@pytest.fixture
def places():
    """Return addresses that are never followed: only looked at."""
    return {n: (i + 1) << 20 for i, n in enumerate(("field", "mask", "support", *VOLUMES))}


S1, S1_NEXT, WORKSPACE = 20 << 20, 21 << 20, 22 << 20
MANY = 1 << 16


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"mu1": 0.0}, UsageError, "mu1 and mu3 must be positive"),
        ({"mu3": -1.0}, UsageError, r"got 0.02, -1 and 0.0002"),
        ({"mu1": 1e-60}, UsageError, "finite in float32"),
        ({"alpha": -1e-9}, UsageError, "alpha not negative"),
        ({"alpha": np.nan}, UsageError, "nan"),
        ({"x": 0}, UsageError, "x is a null pointer"),
        ({"q2": (6 << 20) + 4}, UsageError, "q2 must be aligned to 8"),
        ({"field": 2}, UsageError, "field must be aligned to 4"),
        ({"b": 7 << 20}, UsageError, "b and s3 overlap"),
        ({"mask": (4 << 20) + 799}, UsageError, "x and mask overlap"),
        ({"geometry": Geometry((2048, 2048, 1024))}, GeometryError, "voxels"),
    ],
)
def test_problems_that_cannot_be(twin_device, places, wrong, error, text):
    tv = replace(VariationBuffers(Geometry((4, 5, 10)), ALPHA, 100 * ALPHA, MU3, **places), **wrong)
    with pytest.raises(error, match=text):
        twin_device.library.tv_split(tv, S1, S1_NEXT)
    with pytest.raises(error, match=text):
        twin_device.library.tv_solve(tv, WORKSPACE, MANY)


def test_buffers_beside_the_volumes_that_cannot_be(twin_device, places):
    library, grid = twin_device.library, Geometry((4, 5, 10))
    tv = VariationBuffers(grid, ALPHA, 100 * ALPHA, MU3, **places)
    needed = library.tv_workspace_bytes(grid)
    for call, text in (
        (lambda: library.tv_split(tv, 0, S1_NEXT), "s1 is a null pointer"),
        (lambda: library.tv_split(tv, S1, S1 + 2396), "s1 and s1_next overlap"),
        (lambda: library.tv_split(tv, S1, tv.x - 1600), "s1_next and x overlap"),
        (lambda: library.tv_solve(tv, WORKSPACE + 16, MANY), "workspace must be aligned to 256"),
        (lambda: library.tv_solve(tv, WORKSPACE, needed - 1), f"{needed} are needed; ask qsm_cuda"),
        (lambda: library.tv_solve(tv, WORKSPACE, 100), "2048 are needed"),
        (lambda: library.tv_solve(tv, tv.b, MANY), "workspace and b overlap"),
    ):
        with pytest.raises(UsageError, match=text):
            call()


def test_its_workspace_is_enough_for_the_dipole(twin_device):
    for grid in GRIDS.values():
        needed = twin_device.library.tv_workspace_bytes(grid)
        assert needed >= twin_device.library.dipole_workspace_bytes(DipoleOperator(grid))
